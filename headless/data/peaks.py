"""ATAC peaks of several files: names, merging of overlapping peaks, filter and order.

Peaks that overlap by at least one base, directly or through others, become one interval; the counts of a file's peaks
inside it are added. A single peak set is left as it is. Follows section "ATAC" of the MIDAS preprocessing (merged over
batches, kept if open in more than 4 % of the cells of a batch, sorted) without counting fragments again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import genome
from headless.data.readers.names import intervals
from headless.data.union import FeatureUnion
from headless.errors import MosaicError


def parse(features: pd.DataFrame, source: str = "") -> pd.DataFrame:
    """``chrom`` (UCSC form), ``start``, ``end`` of every peak, from columns or from names.

    Names are ``chr1:1-2``, ``chr1-1-2`` or ``chr1_1_2``. A peak is half-open, 0-based, as in BED.

    Raises
    ------
    MosaicError
        ``data.peaks_unreadable`` with examples.
    """
    table = features.reindex(columns=["chrom", "start", "end"])
    if bool(table.isna().to_numpy().any()):
        found = intervals(features.index)
        bad = np.ones(len(features), bool) if found is None else found["chrom"].isna().to_numpy()
        if found is None or bad.any():
            shown = ", ".join(map(str, features.index[bad][:3]))
            raise MosaicError(
                "data.peaks_unreadable",
                f"{int(bad.sum()):,} of {len(bad):,} peaks have no position, such as {shown}.",
                "Name peaks like chr1:10000-10500, or give columns chrom, start and end.",
                modality="atac",
                file=source or None,
            )
        table = found
    codes, chromosomes = pd.factorize(table["chrom"].astype(str).to_numpy())
    named = np.array([genome.chromosome_name(str(name)) for name in chromosomes], dtype=object)
    start, end = (table[key].to_numpy(dtype=np.int64) for key in ("start", "end"))
    if (end < start).any():
        worst = int(np.flatnonzero(end < start)[0])
        raise MosaicError(
            "data.peaks_unreadable",
            f"Peak {features.index[worst]} ends before it starts.",
            "Mend the coordinates of the peaks.",
            modality="atac",
            file=source or None,
        )
    return pd.DataFrame({"chrom": named[codes], "start": start, "end": end}, index=features.index)


def union(tables: Sequence[pd.DataFrame], sources: Sequence[str]) -> FeatureUnion:
    """The union of parsed peak tables, overlapping peaks of different files merged, in natural order.

    Features are named ``chrom:start-end`` and have the columns ``chrom``, ``start``, ``end``.

    Raises
    ------
    MosaicError
        ``data.no_shared_feature`` when no peak of a file overlaps any peak of the others.
    """
    names = [_labels(table) for table in tables]
    distinct = pd.unique(np.concatenate(names))
    if all(len(own) == len(distinct) and set(own) == set(distinct) for own in names):
        first = tables[0].set_axis(names[0])
        features = first.iloc[_order(first)]
        return FeatureUnion(features, tuple(features.index.get_indexer(pd.Index(own)) for own in names))
    together = pd.concat(list(tables), ignore_index=True)
    file = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    by_position = _order(together)
    chrom, start, end = (together[key].to_numpy()[by_position] for key in ("chrom", "start", "end"))
    group = merged(chrom, start, end)
    head = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    features = pd.DataFrame(
        {"chrom": chrom[head], "start": start[head], "end": np.maximum.reduceat(end, head)}
    )
    features.index = pd.Index(_labels(features))
    number = np.empty(len(group), dtype=np.int64)
    number[by_position] = group
    columns = tuple(number[file == i] for i in range(len(tables)))
    return FeatureUnion(features, columns, _describe(features, columns, sources))


def merged(chrom: NDArray[Any], start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group numbers 0, 1, ... of intervals sorted by position: chains of intervals that overlap share a number.

    Half-open intervals: [1, 5) and [5, 9) do not overlap.
    """
    if not len(start):
        return np.zeros(0, dtype=np.int64)
    new_chrom = np.r_[True, chrom[1:] != chrom[:-1]]
    # Running maximum of the ends within a chromosome: chromosomes are laid end to end.
    offset = np.cumsum(new_chrom) * (int(end.max()) + 2)
    reach = np.maximum.accumulate(end + offset)
    fresh = np.r_[True, (start + offset)[1:] >= reach[:-1]]
    return np.cumsum(fresh | new_chrom) - 1


def choose(
    shares: NDArray[np.float64],
    cells: NDArray[np.int64],
    *,
    min_share: float,
    min_cells: int,
    at_least: int,
    at_most: int | None,
) -> tuple[NDArray[np.bool_], list[str]]:
    """Which peaks to keep, and why.

    Parameters
    ----------
    shares
        ``(n_peaks,)``: the largest share of open cells in any batch.
    cells
        ``(n_peaks,)``: cells of the whole mosaic in which the peak is open.
    min_share, min_cells, at_least, at_most
        See :class:`~headless.data.preparation.Preparation` (``at_least`` = ``min_peaks``).
    """
    seen = cells >= min_cells
    keep = seen & (shares > min_share)
    notes: list[str] = []
    if (~seen).any():
        rare = "no cell" if min_cells <= 1 else f"fewer than {min_cells} cells"
        notes.append(f"{int((~seen).sum()):,} peaks open in {rare} left out.")
    passed = int(keep.sum())
    if passed < min(at_least, int(seen.sum())):
        keep = _most_open(seen, shares, at_least)
        kept, of = int(keep.sum()), int(seen.sum())
        which = f"all {of:,}" if kept == of else f"the {kept:,} most often open ones of {of:,}"
        notes.append(
            f"Only {passed:,} peaks are open in more than {min_share:.0%} of the cells of a batch: {which} are kept."
        )
    elif passed < int(seen.sum()):
        notes.append(f"{passed:,} of {len(keep):,} peaks: open in more than {min_share:.0%} of the cells of a batch.")
    if at_most is not None and int(keep.sum()) > at_most:
        keep = _most_open(keep, shares, at_most)
        notes.append(f"The {at_most:,} most often open peaks are kept.")
    return keep, notes


def _most_open(among: NDArray[np.bool_], shares: NDArray[np.float64], number: int) -> NDArray[np.bool_]:
    candidates = np.flatnonzero(among)
    best = candidates[np.argsort(-shares[candidates], kind="stable")[:number]]
    keep = np.zeros(len(among), dtype=bool)
    keep[best] = True
    return keep


def _labels(table: pd.DataFrame) -> NDArray[np.object_]:
    text = table["chrom"].astype(str) + ":" + table["start"].astype(str) + "-" + table["end"].astype(str)
    return np.asarray(text, dtype=object)


def _order(table: pd.DataFrame) -> NDArray[np.intp]:
    return genome.order(table["chrom"].to_numpy(), table["start"].to_numpy(), table["end"].to_numpy())


def _describe(
    features: pd.DataFrame, columns: Sequence[NDArray[np.int64]], sources: Sequence[str]
) -> tuple[str, ...]:
    files = np.zeros(len(features), dtype=np.int64)
    for own in columns:
        files += np.bincount(np.unique(own), minlength=len(features)).astype(np.int64)
    widest = int((features["end"] - features["start"]).max())
    notes = [
        f"Peaks of {len(columns)} files: {sum(map(len, columns)):,} merged by overlap into {len(features):,}, of which "
        f"{int((files > 1).sum()):,} lie in more than one file; the widest has {widest:,} bases."
    ]
    if len(columns) == 1:
        return (f"Overlapping peaks of {sources[0]} merged: {len(columns[0]):,} into {len(features):,}.",)
    for own, source in zip(columns, sources, strict=True):
        shared = float((files[own] > 1).mean()) if len(own) else 0.0
        if not shared:
            raise MosaicError(
                "data.no_shared_feature",
                f"No peak of {source} overlaps a peak of the other files.",
                "Check that all files were counted on the same genome assembly, best on common peaks.",
                modality="atac",
                file=source,
            )
        if shared < 0.1:
            notes.append(
                f"Only {shared:.1%} of the peaks of {source} overlap those of other files: the same genome assembly?"
            )
    return tuple(notes)
