"""Tiles: from the rows of a batch over a file's own features to rows over the features that are kept.

First the features of all files are united, then those that a model is to see are chosen, modality by modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import features, genome, peaks, union
from headless.data.batching import Part, Segment
from headless.data.columns import column_stats, renumbered, stacked
from headless.data.mosaic import Tile
from headless.data.pairing import PairingReport
from headless.data.pattern import MODALITIES
from headless.data.preparation import Preparation
from headless.data.sources import MemoryRows, RowSource
from headless.data.union import FeatureUnion
from headless.errors import MosaicError


@dataclass(frozen=True)
class Batch:
    """Cells of a batch and, for each modality, its segments, the rows used of them (stacked) and the cell of each."""

    barcodes: NDArray[np.object_]
    segments: Mapping[str, list[Segment]]
    rows: Mapping[str, NDArray[np.int64]]
    cells: Mapping[str, NDArray[np.int64]]
    report: PairingReport

    def keep(self, cells: NDArray[np.bool_], rows: Mapping[str, NDArray[np.bool_]]) -> Batch:
        """The batch with fewer cells, and fewer rows in some modalities."""
        number = np.cumsum(cells) - 1
        kept_rows, kept_cells = {}, {}
        for modality, own in self.cells.items():
            stay = cells[own] & rows[modality]
            if stay.any():
                kept_rows[modality] = self.rows[modality][stay]
                kept_cells[modality] = number[own[stay]]
        return replace(self, barcodes=self.barcodes[cells], rows=kept_rows, cells=kept_cells)


#: Told every decision as it is made.
Note = Callable[[str], None]


class Log:
    """Keeps every note and passes it on."""

    def __init__(self, note: Note) -> None:
        self.lines: list[str] = []
        self._note = note

    def __call__(self, *lines: str) -> None:
        for line in lines:
            self.lines.append(line)
            self._note(line)


def rows_of(parts: Sequence[Part], batch: Batch, modality: str) -> list[tuple[int, RowSource]]:
    """Part and rows over the file's own features, segment by segment; only the rows that the batch uses."""
    rows = batch.rows[modality]
    segments = batch.segments[modality]
    found = []
    for segment in segments:
        source = as_source(parts[segment.part].matrix.x)
        # Several segments keep all their rows here; they are stacked and put in order afterwards.
        wanted = segment.rows[rows] if len(segments) == 1 else segment.rows
        whole = len(wanted) == source.n_rows and bool((wanted == np.arange(source.n_rows)).all())
        found.append((segment.part, source if whole else source.take(wanted)))
    return found


def as_source(x: Any) -> RowSource:
    """Counts of a matrix as rows, wherever they are."""
    return x if isinstance(x, RowSource) else MemoryRows(x)


def unite(
    parts: Sequence[Part], batches: Mapping[str, Batch], preparation: Preparation, log: Log
) -> dict[str, FeatureUnion]:
    """For each modality the union of features; ``columns`` has an entry for every part, empty for other modalities.

    Raises
    ------
    MosaicError
        ``data.no_shared_feature``, ``data.wrong_genome``, ``data.peaks_unreadable``.
    """
    used = {s.part for b in batches.values() for m in b.rows for s in b.segments[m]}
    present = {parts[i].matrix.modality for i in used}
    united: dict[str, FeatureUnion] = {}
    for modality in [*(m for m in MODALITIES if m in present), *sorted(present - set(MODALITIES))]:
        numbers = [i for i in sorted(used) if parts[i].matrix.modality == modality]
        tables = [parts[i].matrix.features for i in numbers]
        sources = [parts[i].matrix.source for i in numbers]
        if modality == "rna":
            space = union.genes(tables)
        elif modality == "adt":
            rna = united["rna"].features.index if "rna" in united else None
            space = union.antibodies(tables, drop_isotype_controls=preparation.drop_isotype_controls, rna=rna)
        elif modality == "atac":
            space = _peaks(tables, sources, preparation, log)
        else:
            space = union.named(tables)
        log(*space.notes)
        columns = [np.zeros(0, dtype=np.int64)] * len(parts)
        for i, own in zip(numbers, space.columns, strict=True):
            columns[i] = own
        united[modality] = replace(space, columns=tuple(columns))
        masks = {name: _mask(united[modality], b, modality) for name, b in batches.items() if modality in b.rows}
        union.require_shared(masks, modality)
        everywhere = int(np.logical_and.reduce(list(masks.values())).sum())
        if len(masks) > 1 and everywhere < len(space.features):
            total = len(space.features)
            log(f"{modality}: {total:,} features in all, {everywhere:,} of them in every batch that has it.")
    return united


def _peaks(tables: Sequence[pd.DataFrame], sources: Sequence[str], preparation: Preparation, log: Log) -> FeatureUnion:
    try:
        parsed = [peaks.parse(table, source) for table, source in zip(tables, sources, strict=True)]
    except MosaicError as error:
        if any(set(table.index) != set(tables[0].index) for table in tables):
            raise
        log(f"{error.message} Peaks are matched by name, without chromosomes.")
        return union.named([table[[]] for table in tables])
    _, notes = genome.check(parsed, sources, preparation.genome)
    log(*notes)
    return peaks.union(parsed, sources)


def _mask(space: FeatureUnion, batch: Batch, modality: str) -> NDArray[np.bool_]:
    """Features measured in a tile: those that every one of its segments measured."""
    masks = [space.measured(segment.part) for segment in batch.segments[modality]]
    return np.asarray(np.logical_and.reduce(masks), dtype=bool)


def make_tile(parts: Sequence[Part], name: str, modality: str, batch: Batch, space: FeatureUnion, offset: int) -> Tile:
    """One modality of a batch over the union of features; ``offset`` is the number of the batch's first cell."""
    n = len(space.features)
    mask = _mask(space, batch, modality)
    pieces = [renumbered(source, space.columns[part], n) for part, source in rows_of(parts, batch, modality)]
    source = pieces[0]
    if len(pieces) > 1:
        source = stacked(pieces).take(batch.rows[modality])
        if not mask.all():  # features that only some of the merged files measured count as unmeasured
            source = renumbered(source, np.where(mask, np.arange(n), -1), n)
    cells = batch.cells[modality] + offset
    return Tile(name, modality, source, cells, None if mask.all() else mask)


def choose(
    modality: str,
    space: FeatureUnion,
    tiles: Mapping[tuple[str, str], Tile],
    united: Mapping[str, FeatureUnion],
    preparation: Preparation,
    log: Log,
) -> tuple[FeatureUnion, dict[tuple[str, str], Tile]]:
    """The features that are kept, and the tiles over them.

    Raises
    ------
    MosaicError
        ``data.no_feature``, ``data.no_shared_feature``.
    """
    own = {key: tile for key, tile in tiles.items() if tile.modality == modality}
    n = len(space.features)
    keep = np.ones(n, dtype=bool)
    notes: list[str] = []
    if modality == "rna":
        encoded = united["adt"].features["genes"] if "adt" in united else ()
        wanted = {gene for text in encoded for gene in text.split(";") if gene}
        genes = [features.GeneTile(t.batch, t.source, _measured(t, n)) for t in own.values()]
        keep, notes = features.choose(genes, space.features.index, preparation, wanted)
    elif modality == "atac":
        keep, notes = _chosen_peaks(space.features, list(own.values()), preparation)
    log(*notes)
    if not keep.any():
        raise MosaicError(
            "data.no_feature",
            f"No {modality} feature is left.",
            "Loosen the filters of features.",
            field="preparation",
            modality=modality,
        )
    if keep.all():
        return space, own
    columns = np.where(keep, np.cumsum(keep) - 1, -1)
    kept = int(keep.sum())
    reduced = {}
    for key, tile in own.items():
        mask = _measured(tile, n)[keep]
        source = renumbered(tile.source, columns, kept)
        reduced[key] = replace(tile, source=source, mask=None if mask.all() else mask)
    masks = {key[0]: _measured(tile, kept) for key, tile in reduced.items()}
    union.require_shared(masks, modality, "preparation.n_top_genes" if modality == "rna" else "preparation.min_peaks")
    return replace(space, features=space.features[keep]), reduced


def _chosen_peaks(
    table: pd.DataFrame, tiles: Sequence[Tile], preparation: Preparation
) -> tuple[NDArray[np.bool_], list[str]]:
    shares = np.zeros(len(table))
    cells = np.zeros(len(table), dtype=np.int64)
    for tile in tiles:
        seen = column_stats(tile.source).cells
        cells += seen
        shares = np.maximum(shares, seen / tile.source.n_rows)
    allowed, notes = np.ones(len(table), dtype=bool), []
    if "chrom" in table:
        chrom = table["chrom"].to_numpy()
        standard = genome.is_autosome(chrom) if preparation.autosomes_only else genome.is_standard(chrom)
        # Species whose chromosomes are named otherwise (roman numbers, accessions) are left whole.
        if standard.sum() > (0 if preparation.autosomes_only else len(table) / 2) and not standard.all():
            allowed = standard
            what = "outside the autosomes" if preparation.autosomes_only else "on scaffolds or the mitochondrial genome"
            notes.append(f"{int((~standard).sum()):,} peaks {what} left out.")
    keep, more = peaks.choose(
        shares[allowed],
        cells[allowed],
        min_share=preparation.peaks_min_share,
        min_cells=preparation.min_cells,
        at_least=preparation.min_peaks,
        at_most=preparation.max_peaks,
    )
    allowed[allowed] = keep
    return allowed, [*notes, *more]


def _measured(tile: Tile, n: int) -> NDArray[np.bool_]:
    return np.ones(n, dtype=bool) if tile.mask is None else tile.mask
