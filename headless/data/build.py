"""From files to the mosaic: read, join by barcode, judge cells, unite and choose features.

:func:`build_mosaic` reads; :func:`assemble` does the rest from matrices in memory or on disk. Input files are only
read, and nothing is ever made dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import batching, celltable, pairing, qc
from headless.data.batching import Part
from headless.data.datasets import DatasetRef
from headless.data.mosaic import Mosaic, Tile
from headless.data.pairing import Joined, PairingReport
from headless.data.preparation import Preparation, Thresholds
from headless.data.tiling import Batch, Log, Note, as_source, choose, make_tile, rows_of, unite
from headless.errors import MosaicError


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
    log = Log(note)
    # Once here, not once a batch: a matrix of many batches is checked and brought into order a single time.
    parts = [replace(part, matrix=replace(part.matrix, x=as_source(part.matrix.x))) for part in parts]
    _check_limits(preparation)
    batches = _joined_batches(parts, preparation, log)
    batches = {name: _judged(parts, name, batch, preparation, log) for name, batch in batches.items()}
    _check_qc_names(preparation, batches)
    united = unite(parts, batches, preparation, log)
    offsets = np.cumsum([0, *(len(batch.barcodes) for batch in batches.values())])
    tiles: dict[tuple[str, str], Tile] = {}
    for offset, (name, batch) in zip(offsets, batches.items(), strict=False):
        for modality in batch.rows:
            tiles[name, modality] = make_tile(parts, name, modality, batch, united[modality], int(offset))
    chosen = {modality: choose(modality, space, tiles, united, preparation, log) for modality, space in united.items()}
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
    batches = _joined_batches(parts, preparation or Preparation(), Log(_silent))
    return tuple(batch.report for batch in batches.values())


def quality(parts: Sequence[Part], preparation: Preparation | None = None) -> dict[tuple[str, str], pd.DataFrame]:
    """Quality metrics (:func:`headless.data.qc.metrics`) of every tile by (batch, modality), index = barcodes."""
    batches = _joined_batches(parts, preparation or Preparation(), Log(_silent))
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


def _joined_batches(parts: Sequence[Part], preparation: Preparation, log: Log) -> dict[str, Batch]:
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
        batches[name] = Batch(joined.barcodes, modalities, joined.rows, joined.cells, joined.report)
        log(joined.report.in_words())
    return batches


def _metrics(parts: Sequence[Part], batch: Batch, modality: str) -> pd.DataFrame:
    tables = [
        qc.metrics(source, parts[part].matrix.features.index, modality)
        for part, source in rows_of(parts, batch, modality)
    ]
    if len(tables) == 1:
        return tables[0]
    return pd.concat(tables, ignore_index=True).iloc[batch.rows[modality]].reset_index(drop=True)


def _judged(parts: Sequence[Part], name: str, batch: Batch, preparation: Preparation, log: Log) -> Batch:
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


def _check_qc_names(preparation: Preparation, batches: Mapping[str, Batch]) -> None:
    unknown = [name for name in preparation.qc if name != "*" and name not in batches]
    if unknown:
        raise MosaicError(
            "data.unknown_batch",
            f"There are quality limits for batch {unknown[0]!r}, but no such batch.",
            f"Batches: {', '.join(batches)}; '*' stands for all.",
            field="preparation.qc",
            batch=unknown[0],
        )


def _describe(parts: Sequence[Part], name: str, batch: Batch) -> pd.DataFrame:
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
