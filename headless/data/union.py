"""The union of a modality's features over files: which of a file's features are the same as those of others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import proteins
from headless.errors import MosaicError

_ENSEMBL = re.compile(r"^(ENS[A-Z]*[GT]\d{6,})(\.\d+)?$")


@dataclass(frozen=True)
class FeatureUnion:
    """Features of all files.

    Attributes
    ----------
    features
        Index = unique feature names; columns as in :class:`~headless.data.mosaic.Mosaic`.
    columns
        For each file ``(n_features of the file,)`` int64: the union feature of each of its features, -1 = left out.
    notes
        What was done, in words.
    """

    features: pd.DataFrame
    columns: tuple[NDArray[np.int64], ...]
    notes: tuple[str, ...] = ()

    def measured(self, file: int) -> NDArray[np.bool_]:
        """``(n_features,)``: which features of the union the file measured."""
        mask = np.zeros(len(self.features), dtype=bool)
        own = self.columns[file]
        mask[own[own >= 0]] = True
        return mask


def genes(tables: Sequence[pd.DataFrame]) -> FeatureUnion:
    """Genes of several files, matched by symbol, or by Ensembl id where all files have ids and those agree better."""
    symbols = [np.array([_unversioned(str(name)) for name in table.index], dtype=object) for table in tables]
    ids = [_ids(table) for table in tables]
    notes: list[str] = []
    keys = symbols
    if len(tables) > 1 and all(own is not None for own in ids):
        known = [own for own in ids if own is not None]
        if _agreement(known) > _agreement(symbols):
            keys = known
            notes.append("Genes of the files are matched by Ensembl id, because their symbols agree less.")
    union = _plain(tables, keys, symbols)
    return FeatureUnion(union.features, union.columns, tuple(notes))


def named(tables: Sequence[pd.DataFrame]) -> FeatureUnion:
    """Features of any kind, matched by their exact name."""
    names = [np.asarray(table.index.astype(str), dtype=object) for table in tables]
    return _plain(tables, names, names)


def antibodies(
    tables: Sequence[pd.DataFrame], *, drop_isotype_controls: bool = True, rna: pd.Index | None = None
) -> FeatureUnion:
    """Proteins of several files under harmonised names (:mod:`headless.data.proteins`).

    Columns of the result: ``gene`` (the encoding gene that is the best marker, missing if unknown), ``genes`` (all,
    joined by ``;``) and ``isotype_control``. Gene symbols are written as the genes of ``rna`` are (human or mouse).
    """
    panels = proteins.harmonise([[str(name) for name in table.index] for table in tables])
    mouse = rna is not None and looks_like_mouse(rna)
    known = {name.upper(): name for name in map(str, rna)} if rna is not None else {}
    keep: dict[str, dict[str, Any]] = {}
    kept_names, isotypes, renamed = [], set(), Counter[str]()
    for table, panel in zip(tables, panels, strict=True):
        stated = _stated_isotypes(table)
        names: list[str | None] = []
        for original, protein, control in zip(table.index, panel, stated, strict=True):
            if protein.isotype or control:
                isotypes.add(protein.name)
                if drop_isotype_controls:
                    names.append(None)
                    continue
            encoded = [proteins.mouse_symbol(gene) if mouse else gene for gene in protein.genes]
            if not encoded and protein.name.upper() in known:
                encoded = [known[protein.name.upper()]]
            keep.setdefault(
                protein.name,
                {
                    "gene": encoded[0] if encoded else None,
                    "genes": ";".join(encoded),
                    "isotype_control": protein.isotype or control,
                },
            )
            names.append(protein.name)
            if str(original) != protein.name:
                renamed[f"{original} -> {protein.name}"] += 1
        kept_names.append(names)
    order = _ordered([[name for name in names if name is not None] for names in kept_names])
    position = {name: i for i, name in enumerate(order)}
    columns = tuple(
        np.array([-1 if name is None else position[name] for name in names], dtype=np.int64) for names in kept_names
    )
    features = pd.DataFrame([keep[name] for name in order], index=pd.Index(order, dtype=object))
    return FeatureUnion(features, columns, _protein_notes(renamed, isotypes, drop_isotype_controls))


def looks_like_mouse(names: pd.Index) -> bool:
    """Whether gene symbols are written as those of the mouse are (``Cd3e``), not as human ones (``CD3E``)."""
    cased = [name for name in map(str, names) if re.match(r"^[A-Z][A-Za-z]{2}", name) and not _ENSEMBL.match(name)]
    return bool(cased) and sum(name[1:] != name[1:].upper() for name in cased) > len(cased) / 2


def require_shared(masks: Mapping[str, NDArray[np.bool_]], modality: str, chosen_by: str = "") -> None:
    """Check that the batches of a modality hang together by shared features.

    Parameters
    ----------
    masks
        Batch -> ``(n_features,)``, which features of the union it measured.
    chosen_by
        The field that chose these features, where more of them might be shared.

    Raises
    ------
    MosaicError
        ``data.no_shared_feature``, with the groups of batches that share nothing.
    """
    groups: list[tuple[list[str], NDArray[np.bool_]]] = []
    for batch, mask in masks.items():
        names, together = [batch], mask
        rest = []
        for other_names, other in groups:
            if (other & mask).any():
                names, together = other_names + names, together | other
            else:
                rest.append((other_names, other))
        groups = [*rest, (names, together)]
    if len(groups) > 1:
        shown = "; ".join(", ".join(names[:4]) + (" ..." if len(names) > 4 else "") for names, _ in groups)
        raise MosaicError(
            "data.no_shared_feature",
            f"These groups of batches share no {modality} feature: {shown}.",
            "Choose more features."
            if chosen_by
            else "Check that files name their features alike (one species, symbols or Ensembl ids), or leave one out.",
            field=chosen_by or "datasets",
            modality=modality,
        )


def _plain(
    tables: Sequence[pd.DataFrame], keys: Sequence[NDArray[Any]], labels: Sequence[NDArray[Any]]
) -> FeatureUnion:
    """Union by ``keys``; a feature is shown under the smallest of its ``labels``, so file order does not matter."""
    order = _ordered([list(map(str, own)) for own in keys])
    position = {key: i for i, key in enumerate(order)}
    columns = tuple(np.array([position[str(key)] for key in own], dtype=np.int64) for own in keys)
    shown: list[str | None] = [None] * len(order)
    for own, texts in zip(columns, labels, strict=True):
        for j, text in zip(own, texts, strict=True):
            best = shown[j]
            if best is None or (_ENSEMBL.match(text) is not None, text) < (_ENSEMBL.match(best) is not None, best):
                shown[j] = str(text)
    repeated = Counter(shown)
    index = [f"{text} ({key})" if repeated[text] > 1 else text for text, key in zip(shown, order, strict=True)]
    features = pd.DataFrame(index=pd.Index(index, dtype=object))
    for name in ("id", "chrom", "start", "end"):
        values: NDArray[Any] = np.full(len(order), None, dtype=object)
        for table, own in zip(tables, columns, strict=True):
            if name in table:
                fresh = np.asarray(table[name], dtype=object)
                use = pd.isna(values[own]) & ~pd.isna(fresh)
                values[own[use]] = fresh[use]
        if not pd.isna(values).all():
            series = pd.Series(values, index=features.index)
            features[name] = series.astype("Int64") if name in ("start", "end") else series
    return FeatureUnion(features, columns)


def _ordered(names: Sequence[Sequence[str]]) -> list[str]:
    """Names in the order of the files where all agree, else sorted, so that the order of files does not matter."""
    if all(list(own) == list(names[0]) for own in names[1:]):
        return list(dict.fromkeys(names[0])) if names else []
    return sorted(set().union(*map(set, names)))


def _ids(table: pd.DataFrame) -> NDArray[np.object_] | None:
    """Ensembl ids of a table's genes, from the column ``id`` or from the names; ``None`` if some are missing."""
    for texts in (table.get("id", ()), table.index):
        found = [match.group(1) if (match := _ENSEMBL.match(str(text))) else None for text in texts]
        if found and all(found) and len(set(found)) == len(found):
            return np.array(found, dtype=object)
    return None


def _agreement(keys: Sequence[NDArray[Any]]) -> int:
    counts = Counter(key for own in keys for key in set(own))
    return sum(n - 1 for n in counts.values())


def _unversioned(name: str) -> str:
    match = _ENSEMBL.match(name)
    return match.group(1) if match else name


def _stated_isotypes(table: pd.DataFrame) -> NDArray[np.bool_]:
    if "isotype_control" not in table:
        return np.zeros(len(table), dtype=bool)
    texts = table["isotype_control"].astype(str).str.lower()
    return np.asarray(texts.isin(["true", "1", "1.0", "yes"]), dtype=bool)


def _protein_notes(renamed: Counter[str], isotypes: set[str], dropped: bool) -> tuple[str, ...]:
    notes = []
    if renamed:
        shown = ", ".join(list(renamed)[:5]) + (" ..." if len(renamed) > 5 else "")
        notes.append(f"{len(renamed)} protein names harmonised: {shown}.")
    if isotypes:
        what = "left out" if dropped else "kept"
        notes.append(f"{len(isotypes)} isotype controls {what}: {', '.join(sorted(isotypes))}.")
    return tuple(notes)
