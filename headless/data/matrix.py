"""What readers give: descriptions of a file (from its headers) and single matrices of counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.sources import RowSource

if TYPE_CHECKING:
    import scipy.sparse as sp

ColumnKind = Literal["categorical", "text", "integer", "number", "bool"]


@dataclass(frozen=True)
class ObsColumn:
    """A column that describes cells.

    ``n_levels`` is the number of distinct values present; ``None`` where finding it would mean reading a long column.
    """

    name: str
    kind: ColumnKind
    n_levels: int | None
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix of a file as far as headers and a sample of its values tell.

    Attributes
    ----------
    key
        Its name inside the file: ``X``, ``mod/adt``, ``Antibody Capture`` ...
    modality, reason
        ``rna``, ``adt``, ``atac`` or ``None`` when it was not recognised, and what that rests on.
    n_cells, n_features
        Shape of the proposed layer (approximate for very long text tables; ``reason`` then says so).
    layer, layer_reason
        Where the raw counts are (``X``, ``layers/counts``, ``raw/X``), and why this layer.
    layers
        Every layer that could be read instead.
    counts
        ``counts``, ``binary`` or ``not counts: values 0.31, 1.76``, from a sample of the proposed layer.
    genome
        Assembly named in the file (``GRCh38``; several joined by ``+``), ``None`` if it names none.
    """

    key: str
    modality: str | None
    reason: str
    n_cells: int
    n_features: int
    layer: str
    layer_reason: str
    layers: tuple[str, ...]
    counts: str
    genome: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """What a file holds, from its headers."""

    path: Path
    format: str
    matrices: tuple[MatrixInfo, ...]
    obs_columns: tuple[ObsColumn, ...] = ()

    def matrix(self, key: str) -> MatrixInfo:
        """The matrix of that key (``KeyError`` if there is none)."""
        for info in self.matrices:
            if info.key == key:
                return info
        raise KeyError(key)


@dataclass(frozen=True)
class Matrix:
    """Raw counts of one modality, cells x features.

    Attributes
    ----------
    x
        ``(n_cells, n_features)`` CSR float32; with ``on_disk=True``, where the layout allows it, a
        :class:`~headless.data.sources.ZarrRows` that reads rows when asked.
    barcodes
        ``(n_cells,)`` str as in the file; duplicates are kept.
    features
        Index = unique names; columns where known: ``id``, ``chrom``, ``start``, ``end``, ``feature_type``,
        ``genome``, ``isotype_control``.
    obs
        Index = barcodes; the columns that :class:`FileInfo` lists.
    source
        ``file:key``, for messages.
    """

    x: sp.csr_matrix | RowSource
    barcodes: NDArray[np.object_]
    features: pd.DataFrame
    obs: pd.DataFrame
    modality: str
    source: str
