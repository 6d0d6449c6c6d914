"""The Mosaic: batches x modalities x masks over the union of features. What every method trains on.

Cells are numbered 0 ... N-1 in the order of ``cells``; those of one batch stand together. A tile (one modality of
one batch) holds sparse rows over the *union* of that modality's features, the number of the cell that each row
belongs to, and which features were measured there. A missing modality is absent: it has no rows and takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.covariates import Covariate, find_covariates
from headless.data.pattern import MODALITIES, Pattern, TilePattern
from headless.data.sources import RowSource


@dataclass(frozen=True)
class Tile:
    """One modality of one batch.

    Attributes
    ----------
    batch, modality
        Where the tile lies in the mosaic.
    source
        Sparse rows, ``n_rows`` x ``len(mosaic.features[modality])``.
    cells
        ``(n_rows,)`` int64: the number of the cell of each row, ascending.
    mask
        ``(n_features,)`` bool: features measured in this tile; ``None`` when all of them were.
    """

    batch: str
    modality: str
    source: RowSource
    cells: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None

    @property
    def n_features(self) -> int:
        """Number of features measured in this tile."""
        return self.source.n_columns if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True)
class Mosaic:
    """Cells, features and tiles.

    Attributes
    ----------
    cells
        One row a cell, index = unique cell name; columns ``batch`` and ``barcode`` always, ``label`` where a label
        column was named, then the other obs columns of the input.
    batches
        Batch names; cells are grouped in this order.
    features
        For each modality (canonical order) the union of features, index = feature name; columns where known:
        ``chrom``, ``start``, ``end`` (RNA: gene interval; ATAC: peak), ``gene`` (protein -> gene symbol),
        ``isotype_control``.
    tiles
        Measured tiles by (batch, modality).
    notes
        What was decided on the way in words (features chosen, names harmonised, cells dropped), for reports.
    """

    cells: pd.DataFrame
    batches: tuple[str, ...]
    features: Mapping[str, pd.DataFrame]
    tiles: Mapping[tuple[str, str], Tile]
    notes: tuple[str, ...] = field(default=())

    @property
    def n_cells(self) -> int:
        """Number of cells in all batches."""
        return len(self.cells)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in the canonical order."""
        known = [name for name in MODALITIES if name in self.features]
        return (*known, *(name for name in self.features if name not in MODALITIES))

    @property
    def batch_codes(self) -> NDArray[np.int64]:
        """``(n_cells,)``: position of each cell's batch in ``batches``."""
        codes = pd.Categorical(self.cells["batch"], categories=list(self.batches)).codes
        return np.asarray(codes, dtype=np.int64)

    def measured(self, modality: str) -> NDArray[np.bool_]:
        """``(n_cells,)``: which cells have the modality."""
        found = np.zeros(self.n_cells, dtype=bool)
        for tile in self.tiles.values():
            if tile.modality == modality:
                found[tile.cells] = True
        return found

    def pattern(self) -> Pattern:
        """The shape of the mosaic without its numbers."""
        codes = self.batch_codes
        counts = np.bincount(codes, minlength=len(self.batches))
        tiles = [
            TilePattern(
                batch=batch, modality=modality, n_cells=len(tile.cells), n_features=tile.n_features
            )
            for batch in self.batches
            for modality in self.modalities
            if (tile := self.tiles.get((batch, modality))) is not None
        ]
        return Pattern(
            batches=self.batches,
            n_cells={batch: int(n) for batch, n in zip(self.batches, counts, strict=True)},
            n_features={modality: len(self.features[modality]) for modality in self.modalities},
            tiles=tuple(tiles),
        )

    def without(self, hidden: Mapping[str, NDArray[np.int64]]) -> Mosaic:
        """The mosaic with a modality hidden in some cells (``hidden``: modality -> cell numbers).

        Hidden rows are absent from the result, so that no method can see them; the original keeps the truth.
        """
        tiles: dict[tuple[str, str], Tile] = {}
        for key, tile in self.tiles.items():
            drop = hidden.get(tile.modality)
            if drop is None or not len(drop):
                tiles[key] = tile
                continue
            keep = np.flatnonzero(~np.isin(tile.cells, drop))
            if len(keep):
                tiles[key] = replace(tile, source=tile.source.take(keep), cells=tile.cells[keep])
        return replace(self, tiles=tiles)


@dataclass(frozen=True)
class Layout:
    """What a network must know of a mosaic: the saved model keeps it, and refuses data that differ.

    Attributes
    ----------
    batches
        Batch names; the position is the batch code.
    features
        Modality -> feature names of the union, canonical order.
    measured_in
        Modality -> names of the batches in which it was measured (its own running batch index).
    chunks
        Modality -> sizes of the runs of neighbouring features that share a sub-network (chromosomes for ATAC);
        one chunk of all features when chromosomes are unknown.
    covariates
        Columns of the table of cells that the method was asked to know, with their levels.
    """

    batches: tuple[str, ...]
    features: Mapping[str, tuple[str, ...]]
    measured_in: Mapping[str, tuple[str, ...]]
    chunks: Mapping[str, tuple[int, ...]]
    covariates: tuple[Covariate, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in the canonical order."""
        return tuple(self.features)

    def n_features(self, modality: str) -> int:
        """Size of the union of a modality's features."""
        return len(self.features[modality])

    @classmethod
    def of(cls, mosaic: Mosaic, covariates: Sequence[str] = ()) -> Layout:
        """The layout of a mosaic; peaks must stand grouped by chromosome (the builder orders them).

        Raises
        ------
        MosaicError
            ``data.unknown_covariate``, ``data.bad_covariate``.
        """
        return cls(
            batches=mosaic.batches,
            features={m: tuple(map(str, mosaic.features[m].index)) for m in mosaic.modalities},
            measured_in={
                m: tuple(b for b in mosaic.batches if (b, m) in mosaic.tiles) for m in mosaic.modalities
            },
            chunks={m: _chunks(m, mosaic.features[m]) for m in mosaic.modalities},
            covariates=find_covariates(mosaic.cells, covariates),
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "batches": list(self.batches),
            "features": {m: list(names) for m, names in self.features.items()},
            "measured_in": {m: list(names) for m, names in self.measured_in.items()},
            "chunks": {m: list(sizes) for m, sizes in self.chunks.items()},
            "covariates": [covariate.as_dict() for covariate in self.covariates],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """The layout that :meth:`as_dict` wrote."""

        def frozen(mapping: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
            return {key: tuple(items) for key, items in mapping.items()}

        return cls(
            batches=tuple(values["batches"]),
            features=frozen(values["features"]),
            measured_in=frozen(values["measured_in"]),
            chunks=frozen(values["chunks"]),
            covariates=tuple(Covariate.from_dict(entry) for entry in values.get("covariates", ())),
        )


def _chunks(modality: str, features: pd.DataFrame) -> tuple[int, ...]:
    if modality != "atac" or "chrom" not in features or features["chrom"].isna().any():
        return (len(features),)
    chrom = features["chrom"].astype(str).to_numpy()
    starts = np.flatnonzero(np.r_[True, chrom[1:] != chrom[:-1]])
    if len(starts) != len(set(chrom)):
        raise ValueError("peaks are not grouped by chromosome")
    return tuple(np.diff(np.r_[starts, len(chrom)]).tolist())
