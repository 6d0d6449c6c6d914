"""Which genome assembly peaks belong to: chromosome names, lengths and order.

The lengths in ``resources/genome`` are those of the UCSC assemblies hg19, hg38 and mm10 (standard chromosomes).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless import resources
from headless.errors import MosaicError

ASSEMBLIES: Final[tuple[str, ...]] = ("hg19", "hg38", "mm10")

#: Bases by which a peak may overhang the end of a chromosome: peak callers extend fragments without looking.
OVERHANG: Final = 1000

_STANDARD = re.compile(r"^chr(\d{1,3}[A-Za-z]?|[XYZW])$")
_BARE = re.compile(r"^(\d{1,3}|[XYZWM]|MT)$")


@cache
def sizes(assembly: str) -> Mapping[str, int]:
    """Lengths of the standard chromosomes of an assembly in bases, in natural order."""
    with resources.path("genome", f"{assembly}.tsv").open("r", encoding="utf-8") as file:
        return {row["chromosome"]: int(row["length"]) for row in csv.DictReader(file, delimiter="\t")}


def chromosome_name(name: str) -> str:
    """The UCSC form of a chromosome name: ``1`` and ``Chr1`` become ``chr1``, ``MT`` becomes ``chrM``."""
    name = name.strip()
    if name[:3].lower() == "chr":
        name = "chr" + name[3:]
    elif _BARE.match(name):
        name = "chr" + name
    return "chrM" if name == "chrMT" else name


def is_standard(chromosomes: NDArray[Any]) -> NDArray[np.bool_]:
    """Which chromosome names are nuclear chromosomes (numbered or sex), not scaffolds or the mitochondrial genome."""
    return _each(chromosomes, lambda name: bool(_STANDARD.match(name)))


def is_autosome(chromosomes: NDArray[Any]) -> NDArray[np.bool_]:
    """Which chromosome names are numbered chromosomes."""
    return _each(chromosomes, lambda name: bool(_STANDARD.match(name)) and name[3].isdigit())


def order(chromosomes: NDArray[Any], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.intp]:
    """The permutation that sorts intervals by position: chr1, chr2 ... chr22, chrX, chrY, then everything else."""
    codes, names = pd.factorize(pd.Series(chromosomes, dtype=object))
    rank = np.empty(len(names), dtype=np.int64)
    rank[sorted(range(len(names)), key=lambda i: _natural(str(names[i])))] = np.arange(len(names))
    return np.lexsort((ends, starts, rank[codes]))


def compatible(peaks: pd.DataFrame) -> tuple[str, ...]:
    """The assemblies into whose chromosomes all peaks (``chrom``, ``end``) fit; scaffolds are not looked at.

    A peak may overhang the end by :data:`OVERHANG` bases.
    """
    return tuple(assembly for assembly in ASSEMBLIES if not misfit(peaks, assembly))


def misfit(peaks: pd.DataFrame, assembly: str) -> str:
    """The first peak that lies outside the assembly, in words; empty if all fit."""
    standard = peaks[is_standard(peaks["chrom"].to_numpy())]
    last = standard["end"].groupby(standard["chrom"].to_numpy()).max()
    known = sizes(assembly)
    for chromosome in sorted(last.index, key=_natural):
        length = known.get(chromosome)
        if length is None:
            return f"{assembly} has no {chromosome}"
        if last[chromosome] > length + OVERHANG:
            end = f"{chromosome}:{last[chromosome]:,}"
            return f"a peak ends at {end}, but {chromosome} of {assembly} has {length:,} bases"
    return ""


def check(tables: Sequence[pd.DataFrame], sources: Sequence[str], wish: str = "auto") -> tuple[str | None, list[str]]:
    """The common assembly of several peak tables, and what that rests on.

    Parameters
    ----------
    tables, sources
        Peaks (``chrom``, ``start``, ``end``) of each matrix, and its name for messages.
    wish
        An assembly that the user named, or ``auto``.

    Returns
    -------
    The assembly (``None`` when several are possible or none is known) and notes.

    Raises
    ------
    MosaicError
        ``data.wrong_genome`` when peaks lie outside the named assembly, when no known assembly fits two files although
        one fits each, or when files name their chromosomes differently.
    """
    if wish != "auto":
        for table, source in zip(tables, sources, strict=True):
            fault = misfit(table, wish)
            if fault:
                fits = ", ".join(compatible(table)) or "none of those known here"
                raise _wrong(f"The peaks of {source} are not on {wish}: {fault}.", source,
                             f"Assemblies that fit: {fits}. Name the right one, or leave it to 'auto'.")
        return wish, [f"Peaks fit the genome assembly {wish}."]
    _same_chromosomes(tables, sources)
    fitting = [compatible(table) for table in tables]
    for i, first in enumerate(fitting):
        for j in range(i):
            other = fitting[j]
            if first and other and not set(first) & set(other):
                fault = misfit(tables[i], other[0])
                raise _wrong(
                    f"{sources[j]} and {sources[i]} are on different genome assemblies ({_or(other)} against "
                    f"{_or(first)}): {fault}.",
                    sources[i],
                    "Lift the peaks of one file over to the other assembly, or count its fragments again.",
                )
            if bool(first) != bool(other):
                bare, named = (i, j) if not first else (j, i)
                raise _wrong(
                    f"The peaks of {sources[named]} fit {_or(fitting[named])}, those of {sources[bare]} do not: "
                    f"{misfit(tables[bare], fitting[named][0])}.",
                    sources[bare],
                    "Use data of one species and one assembly.",
                )
    left = [name for name in ASSEMBLIES if all(name in names for names in fitting)]
    if not left:
        return None, ["The genome assembly of the peaks is none of those known here; positions are not checked."]
    if len(left) > 1:
        return None, [f"Peak positions fit {_or(left)}; which one it is cannot be told from them."]
    return left[0], [f"Peaks fit the genome assembly {left[0]} and no other known one."]


def _same_chromosomes(tables: Sequence[pd.DataFrame], sources: Sequence[str]) -> None:
    found = [set(table["chrom"].unique()) for table in tables]
    for i in range(1, len(found)):
        if found[0] and found[i] and not found[0] & found[i]:
            shown = " against ".join(", ".join(sorted(names, key=_natural)[:3]) for names in (found[0], found[i]))
            raise _wrong(
                f"{sources[0]} and {sources[i]} share no chromosome name ({shown}).",
                sources[i],
                "Peaks must be counted on the same genome assembly, with the same chromosome names.",
            )


def _wrong(message: str, source: str, hint: str) -> MosaicError:
    return MosaicError("data.wrong_genome", message, hint, field="preparation.genome", file=source, modality="atac")


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


def _natural(name: str) -> tuple[int, int, str]:
    match = re.match(r"^chr(\d+)(.*)$", name)
    if match and not match.group(2):
        return 0, int(match.group(1)), ""
    if match and _STANDARD.match(name):
        return 0, int(match.group(1)), match.group(2)
    if _STANDARD.match(name):
        return 1, "WXYZ".index(name[3]), ""
    return (2, 0, "") if name == "chrM" else (3, 0, name)


def _each(names: NDArray[Any], rule: Any) -> NDArray[np.bool_]:
    codes, levels = pd.factorize(pd.Series(names, dtype=object))
    return np.array([rule(str(level)) for level in levels], dtype=bool)[codes] if len(levels) else np.zeros(0, bool)
