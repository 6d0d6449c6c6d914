"""From files to the mosaic: read, join by barcode, judge cells, unite and choose features.

:func:`build_mosaic` reads; :func:`assemble` does the rest from matrices in memory or on disk. Input files are only
read, and nothing is ever made dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import batching, celltable, features, genome, pairing, peaks, qc, union
from headless.data.batching import Part
from headless.data.columns import column_stats, renumbered, stacked
from headless.data.datasets import DatasetRef
from headless.data.mosaic import Mosaic, Tile
from headless.data.pairing import Joined, PairingReport
from headless.data.pattern import MODALITIES
from headless.data.preparation import Preparation, Thresholds
from headless.data.sources import MemoryRows, RowSource
from headless.data.union import FeatureUnion
from headless.errors import MosaicError

Note = Callable[[str], None]


def _silent(_: str) -> None:
    """Notes go nowhere but into the mosaic."""


def build_mosaic(
    datasets: Sequence[DatasetRef],
    preparation: Preparation | None = None,
    base: Path = Path(),
    note: Note = _silent,
    *,
    on_disk: bool = False,
) -> Mosaic:
    """Read the matrices of all datasets and assemble them.

    Parameters
    ----------
    datasets
        References, resolved from the project's folder ``base``.
    preparation
        What to leave out, choose and rename; the defaults if ``None``.
    note
        Called with every decision as it is made; ``Mosaic.notes`` keeps them all.
    on_disk
        Leave matrices on disk where the format allows it.

    Raises
    ------
    MosaicError
        ``data.*`` of the readers and of :func:`assemble`; ``project.moved_data``, ``project.data_changed``.
    """
    return assemble(read_parts(datasets, base, on_disk=on_disk), preparation, note)


def read_parts(datasets: Sequence[DatasetRef], base: Path, *, on_disk: bool = False) -> list[Part]:
    """The matrices of all datasets with the batch and label of each row."""
    from headless.data.locate import resolve
    from headless.data.read import read_matrix

    parts = []
    for dataset in datasets:
        path = resolve(dataset, base)
        for ref in dataset.matrices:
            matrix = read_matrix(path, ref.key, ref.layer, modality=ref.modality, on_disk=on_disk)
            if dataset.batch_column is None:
                batch = np.full(len(matrix.barcodes), dataset.batch_name or dataset.id, dtype=object)
            else:
                batch = _column(matrix.obs, dataset.batch_column, dataset.id, "batch_column")
            label = (
                None
                if dataset.label_column is None
                else _column(matrix.obs, dataset.label_column, dataset.id, "label_column")
            )
            if dataset.batch_column == "batch" and "batch" in matrix.obs:
                matrix = replace(matrix, obs=matrix.obs.drop(columns="batch"))
            parts.append(Part(dataset.id, matrix, batch, label))
    return parts


def assemble(parts: Sequence[Part], preparation: Preparation | None = None, note: Note = _silent) -> Mosaic:
    """The mosaic of matrices that were read.

    Cells stand batch by batch: datasets in the order given, the batches of each in natural order of their names, the
    barcodes of each in the order of the first modality, then what the others add.

    Raises
    ------
    MosaicError
        ``data.no_cells``, ``data.no_shared_feature``, ``data.no_shared_barcode``, ``data.duplicate_barcodes``,
        ``data.duplicate_cells``, ``data.unknown_batch``, ``data.wrong_genome``, ``data.peaks_unreadable``,
        ``data.no_feature``.
    """
    preparation = preparation or Preparation()
    log = _Log(note)
    _check_limits(preparation)
    batches = _joined_batches(parts, preparation, log)
    batches = {name: _judged(parts, name, batch, preparation, log) for name, batch in batches.items()}
    _check_qc_names(preparation, batches)
    united = _united(parts, batches, preparation, log)
    offsets = np.cumsum([0, *(len(batch.barcodes) for batch in batches.values())])
    tiles: dict[tuple[str, str], Tile] = {}
    for offset, (name, batch) in zip(offsets, batches.items(), strict=False):
        for modality in batch.rows:
            tiles[name, modality] = _tile(parts, name, modality, batch, united[modality], int(offset))
    chosen = {modality: _chosen(modality, space, tiles, united, preparation, log) for modality, space in united.items()}
    tables = [_describe(parts, name, batch) for name, batch in batches.items()]
    return Mosaic(
        cells=celltable.joined(tables),
        batches=tuple(batches),
        features={modality: space.features for modality, (space, _) in chosen.items()},
        tiles={key: tile for modality in chosen for key, tile in chosen[modality][1].items()},
        notes=tuple(log.lines),
    )


def pairing_reports(parts: Sequence[Part], preparation: Preparation | None = None) -> tuple[PairingReport, ...]:
    """How the barcodes of every batch go together, before quality control."""
    batches = _joined_batches(parts, preparation or Preparation(), _Log(_silent))
    return tuple(batch.report for batch in batches.values())


def quality(parts: Sequence[Part], preparation: Preparation | None = None) -> dict[tuple[str, str], pd.DataFrame]:
    """Quality metrics (:func:`headless.data.qc.metrics`) of every tile by (batch, modality), index = barcodes."""
    batches = _joined_batches(parts, preparation or Preparation(), _Log(_silent))
    return {
        (name, modality): _metrics(parts, batch, modality).set_axis(batch.barcodes[batch.cells[modality]])
        for name, batch in batches.items()
        for modality in batch.rows
    }


def suggest_qc(
    tables: Mapping[tuple[str, str], pd.DataFrame], n_mads: float = qc.N_MADS
) -> dict[str, dict[str, Thresholds]]:
    """Suggested limits for what :func:`quality` gave, in the form of ``Preparation.qc``."""
    limits: dict[str, dict[str, Thresholds]] = {}
    for (batch, modality), table in tables.items():
        limits.setdefault(batch, {})[modality] = qc.suggest(table, n_mads)
    return limits


@dataclass(frozen=True)
class _Batch:
    """Cells of a batch and, for each modality, its segments, the rows used of them (stacked) and the cell of each."""

    barcodes: NDArray[np.object_]
    segments: Mapping[str, list[batching.Segment]]
    rows: Mapping[str, NDArray[np.int64]]
    cells: Mapping[str, NDArray[np.int64]]
    report: PairingReport

    def keep(self, cells: NDArray[np.bool_], rows: Mapping[str, NDArray[np.bool_]]) -> _Batch:
        """The batch with fewer cells, and fewer rows in some modalities."""
        number = np.cumsum(cells) - 1
        kept_rows, kept_cells = {}, {}
        for modality, own in self.cells.items():
            stay = cells[own] & rows[modality]
            if stay.any():
                kept_rows[modality] = self.rows[modality][stay]
                kept_cells[modality] = number[own[stay]]
        return replace(self, barcodes=self.barcodes[cells], rows=kept_rows, cells=kept_cells)


class _Log:
    def __init__(self, note: Note) -> None:
        self.lines: list[str] = []
        self._note = note

    def __call__(self, *lines: str) -> None:
        for line in lines:
            self.lines.append(line)
            self._note(line)


def _column(obs: pd.DataFrame, name: str, dataset: str, field: str) -> NDArray[np.object_]:
    if name not in obs:
        raise MosaicError(
            "data.no_column",
            f"The data {dataset!r} have no cell column {name!r}.",
            f"Columns that there are: {', '.join(map(str, obs.columns)) or 'none'}.",
            field=f"datasets.{dataset}.{field}",
        )
    values = obs[name].astype(object)
    return np.array([None if pd.isna(value) else str(value) for value in values], dtype=object)


def _joined_batches(parts: Sequence[Part], preparation: Preparation, log: _Log) -> dict[str, _Batch]:
    grouping, notes = batching.group(parts, preparation)
    log(*notes)
    batches = {}
    for name, modalities in grouping.items():
        barcodes = {
            modality: np.concatenate([parts[s.part].matrix.barcodes[s.rows] for s in segments])
            for modality, segments in modalities.items()
        }
        files = {parts[s.part].dataset for segments in modalities.values() for s in segments}
        joined: Joined = pairing.join(
            name,
            barcodes,
            how=preparation.pairing,
            match_without_suffix=preparation.match_without_suffix,
            duplicates=preparation.duplicates,
            may_be_disjoint=len(files) == 1,
        )
        batches[name] = _Batch(joined.barcodes, modalities, joined.rows, joined.cells, joined.report)
        log(joined.report.in_words())
    return batches


def _sources(parts: Sequence[Part], batch: _Batch, modality: str) -> list[tuple[int, RowSource]]:
    """Part and rows over the file's own features, segment by segment; only the rows that the batch uses."""
    rows = batch.rows[modality]
    segments = batch.segments[modality]
    found = []
    for segment in segments:
        x = parts[segment.part].matrix.x
        source = x if isinstance(x, RowSource) else MemoryRows(x)
        # Several segments keep all their rows here; they are stacked and put in order afterwards.
        wanted = segment.rows[rows] if len(segments) == 1 else segment.rows
        whole = len(wanted) == source.n_rows and bool((wanted == np.arange(source.n_rows)).all())
        found.append((segment.part, source if whole else source.take(wanted)))
    return found


def _metrics(parts: Sequence[Part], batch: _Batch, modality: str) -> pd.DataFrame:
    sources = _sources(parts, batch, modality)
    tables = [qc.metrics(source, parts[part].matrix.features.index, modality) for part, source in sources]
    if len(tables) == 1:
        return tables[0]
    return pd.concat(tables, ignore_index=True).iloc[batch.rows[modality]].reset_index(drop=True)


def _judged(parts: Sequence[Part], name: str, batch: _Batch, preparation: Preparation, log: _Log) -> _Batch:
    """The batch without the cells (or their modalities) that fail the limits."""
    cells = np.ones(len(batch.barcodes), dtype=bool)
    rows = {modality: np.ones(len(own), dtype=bool) for modality, own in batch.rows.items()}
    for modality in batch.rows:
        limits = preparation.thresholds(name, modality)
        if limits is None or limits == Thresholds():
            continue
        passed = qc.passes(_metrics(parts, batch, modality), limits)
        log(f"Batch {name}, {modality}: {int(passed.sum()):,} of {len(passed):,} cells within the quality limits.")
        if preparation.qc_drops == "cell":
            cells[batch.cells[modality][~passed]] = False
        else:
            rows[modality] = passed
    if preparation.qc_drops == "modality":
        cells[:] = False
        for modality, own in batch.cells.items():
            cells[own[rows[modality]]] = True
    if not cells.any():
        raise MosaicError(
            "data.no_cells",
            f"No cell of batch {name} is within the quality limits.",
            "Loosen the limits of this batch, take the suggested ones, or leave the batch out.",
            field="preparation.qc",
            batch=name,
        )
    if cells.all() and all(own.all() for own in rows.values()):
        return batch
    log(f"Batch {name}: {int(cells.sum()):,} of {len(cells):,} cells kept by quality control.")
    return batch.keep(cells, rows)


def _check_limits(preparation: Preparation) -> None:
    for batch, modalities in preparation.qc.items():
        for modality, limits in modalities.items():
            for low, high in ((limits.min_counts, limits.max_counts), (limits.min_features, limits.max_features)):
                if low is not None and high is not None and low > high:
                    raise MosaicError(
                        "data.bad_limits",
                        f"The lower quality limit {low} is above the upper one {high}.",
                        "Swap them, or empty one.",
                        field="preparation.qc",
                        batch=batch,
                        modality=modality,
                    )


def _check_qc_names(preparation: Preparation, batches: Mapping[str, _Batch]) -> None:
    unknown = [name for name in preparation.qc if name != "*" and name not in batches]
    if unknown:
        raise MosaicError(
            "data.unknown_batch",
            f"There are quality limits for batch {unknown[0]!r}, but no such batch.",
            f"Batches: {', '.join(batches)}; '*' stands for all.",
            field="preparation.qc",
            batch=unknown[0],
        )


def _united(
    parts: Sequence[Part], batches: Mapping[str, _Batch], preparation: Preparation, log: _Log
) -> dict[str, FeatureUnion]:
    """For each modality the union of features; ``columns`` has an entry for every part, empty for other modalities."""
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


def _peaks(tables: Sequence[pd.DataFrame], sources: Sequence[str], preparation: Preparation, log: _Log) -> FeatureUnion:
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


def _mask(space: FeatureUnion, batch: _Batch, modality: str) -> NDArray[np.bool_]:
    """Features measured in a tile: those that every one of its segments measured."""
    masks = [space.measured(segment.part) for segment in batch.segments[modality]]
    return np.asarray(np.logical_and.reduce(masks), dtype=bool)


def _tile(parts: Sequence[Part], name: str, modality: str, batch: _Batch, space: FeatureUnion, offset: int) -> Tile:
    n = len(space.features)
    mask = _mask(space, batch, modality)
    pieces = [renumbered(source, space.columns[part], n) for part, source in _sources(parts, batch, modality)]
    source = pieces[0]
    if len(pieces) > 1:
        source = stacked(pieces).take(batch.rows[modality])
        if not mask.all():  # features that only some of the merged files measured count as unmeasured
            source = renumbered(source, np.where(mask, np.arange(n), -1), n)
    cells = batch.cells[modality] + offset
    return Tile(name, modality, source, cells, None if mask.all() else mask)


def _chosen(
    modality: str,
    space: FeatureUnion,
    tiles: Mapping[tuple[str, str], Tile],
    united: Mapping[str, FeatureUnion],
    preparation: Preparation,
    log: _Log,
) -> tuple[FeatureUnion, dict[tuple[str, str], Tile]]:
    """The features that are kept, and the tiles over them."""
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


def _describe(parts: Sequence[Part], name: str, batch: _Batch) -> pd.DataFrame:
    pieces: dict[str, list[celltable.Piece]] = {}
    for modality, cells in batch.cells.items():
        cell_of = np.full(sum(len(s.rows) for s in batch.segments[modality]), -1, dtype=np.int64)
        cell_of[batch.rows[modality]] = cells
        start = 0
        for segment in batch.segments[modality]:
            own = cell_of[start : start + len(segment.rows)]
            start += len(segment.rows)
            part, rows = parts[segment.part], segment.rows[own >= 0]
            label = None if part.label is None else part.label[rows]
            pieces.setdefault(modality, []).append(celltable.Piece(part.matrix.obs.iloc[rows], own[own >= 0], label))
    return celltable.table(name, batch.barcodes, pieces)
