"""Which modality a matrix holds, and what that rests on.

Asked in order: the feature types written by the pipeline, the name of the matrix, coordinates, the look of feature
names, the file name. What is found is always said, so that a person can disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

_TYPES: Final[Mapping[str, str]] = {
    "gene expression": "rna", "gex": "rna", "rna": "rna", "gene": "rna", "genes": "rna",
    "antibody capture": "adt", "adt": "adt", "antibody": "adt", "protein": "adt", "protein expression": "adt",
    "peaks": "atac", "peak": "atac", "atac": "atac", "chromatin accessibility": "atac",
}  # fmt: skip
_NAMES: Final[Mapping[str, str]] = {
    **_TYPES,
    "mrna": "rna", "scrna": "rna", "snrna": "rna", "transcriptome": "rna", "expression": "rna",
    "prot": "adt", "proteins": "adt", "ab": "adt", "abs": "adt", "antibodies": "adt", "cite": "adt",
    "surface": "adt", "epitopes": "adt", "adts": "adt",
    "scatac": "atac", "snatac": "atac", "chromatin": "atac", "accessibility": "atac",
}  # fmt: skip
#: What files hold beside the three modalities; named so that the reason can say why it is left out.
_FOREIGN: Final[Mapping[str, str]] = {
    "crispr guide capture": "guide RNAs", "crispr": "guide RNAs", "guide": "guide RNAs", "guides": "guide RNAs",
    "multiplexing capture": "sample tags", "hto": "sample tags", "hashtag": "sample tags", "cmo": "sample tags",
    "custom": "a custom assay", "antigen capture": "antigen barcodes", "vdj": "receptor sequences",
    "airr": "receptor sequences", "tcr": "receptor sequences", "bcr": "receptor sequences",
}  # fmt: skip

_PEAK = re.compile(r"^.*\w[:_-]\d+[-_]\d+$")
_TAGGED = re.compile(r"totalseq|^(adt|ab|prot|protein|anti)[-_.: ]|[-_.: ](adt|ab|prot|protein|antibody)$", re.I)
_CLUSTER = re.compile(r"^(anti[-_. ]?)?((human|mouse|rat|hu|mu|ms)[-_./ ]*)*cd\d+[a-z]{0,2}($|[^a-z0-9])", re.I)
_GENE_ID = re.compile(r"^(ENS[A-Z]*G\d{6,}|FBgn\d+|WBGene\d+)", re.I)
_COMMON_GENE = re.compile(
    r"^(\w+_+)?(RP[LS]\d+[A-Z]?\d*|MT-\w+|MALAT1|ACTB|GAPDH|B2M|EEF1A1|TMSB4X|ISG15|HSP90AB1)$", re.I
)
_SYMBOL = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.\-_@/]*$")


def from_type(feature_type: str) -> tuple[str | None, str]:
    """Modality of a feature type as pipelines write it (``Gene Expression``, ``GEX`` ...), with the reason."""
    known = _TYPES.get(feature_type.strip().lower())
    if known:
        return known, f"feature type '{feature_type}'"
    what = _FOREIGN.get(feature_type.strip().lower(), "something unknown here")
    return None, f"skipped: feature type '{feature_type}' is {what}"


def from_name(name: str) -> str | None:
    """Modality that the name of a matrix states (``rna``, ``prot``, ``peaks`` ...)."""
    return _NAMES.get(re.sub(r"[-_. ]+", " ", name.strip().lower()))


def recognise(
    names: Sequence[str],
    n_features: int,
    *,
    key: str = "",
    feature_type: str = "",
    widths: Sequence[int] = (),
    file_name: str = "",
) -> tuple[str | None, str]:
    """The modality and the reason.

    Parameters
    ----------
    names
        Feature names, or the first some thousand of them.
    n_features
        How many features there are.
    key
        Name of the matrix where a person chose it (``rna`` of ``mod/rna``).
    feature_type
        The one feature type of the matrix, if it states any.
    widths
        ``end - start`` of features in bases where the file has coordinates.
    file_name
        Asked last.
    """
    if feature_type:
        known, reason = from_type(feature_type)
        if known or feature_type.strip().lower() in _FOREIGN:
            return known, reason
    if key:
        known = from_name(key)
        if known:
            return known, f"named '{key}'"
        if key.strip().lower() in _FOREIGN:
            return None, f"skipped: '{key}' holds {_FOREIGN[key.strip().lower()]}"
    found = _by_features(names, n_features, widths)
    if found:
        return found
    for token in re.split(r"[^a-z0-9]+", file_name.lower()):
        if token in _NAMES:
            return _NAMES[token], f"'{token}' in the file name"
    shown = ", ".join(map(str, names[:3]))
    return None, f"not recognised: {n_features} features such as {shown}"


def _by_features(names: Sequence[str], n_features: int, widths: Sequence[int]) -> tuple[str, str] | None:
    if not len(names):
        return None
    if _share(_PEAK, names) >= 0.8:
        return "atac", f"peak-like names such as {names[0]}"
    if _share(_GENE_ID, names) >= 0.5:
        return "rna", f"gene identifiers such as {_first(_GENE_ID, names)}"
    # Genes have coordinates too, but span tens of kilobases; peaks are some hundred bases wide.
    if len(widths) and 0 < float(np.median(widths)) <= 5000:
        return "atac", f"coordinates with a median width of {int(np.median(widths))} bases"
    if _share(_TAGGED, names) >= 0.5:
        return "adt", f"antibody names such as {_first(_TAGGED, names)}"
    if n_features <= 1000 and _share(_CLUSTER, names) >= 0.3:
        return "adt", f"few features ({n_features}), antibody names such as {_first(_CLUSTER, names)}"
    common = _first(_COMMON_GENE, names)
    if common:
        return "rna", f"gene names such as {common}"
    if n_features >= 1000 and _share(_SYMBOL, names) >= 0.9 and _share(re.compile(r"[A-Za-z]{2}"), names) >= 0.8:
        return "rna", f"{n_features} features with names like gene symbols, such as {names[0]}"
    return None


def _share(pattern: re.Pattern[str], names: Sequence[str]) -> float:
    return sum(1 for name in names if pattern.search(name)) / len(names)


def _first(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    return next((name for name in names if pattern.search(name)), "")
