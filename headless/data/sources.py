"""Where the rows of a tile come from: memory or disk, behind one interface.

A source hands out sparse rows and nothing else; it never makes anything dense and never writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True)
class Rows:
    """Sparse rows in CSR form: ``indptr`` (n + 1,) int64, ``indices`` (nnz,) int32, ``data`` (nnz,) float32."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[np.float32]
    n_columns: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def to_scipy(self) -> sp.csr_matrix:
        """The rows as a scipy matrix that shares their memory."""
        import scipy.sparse as sp

        return sp.csr_matrix((self.data, self.indices, self.indptr), shape=(self.n_rows, self.n_columns))


class RowSource(ABC):
    """Sparse rows by number."""

    n_rows: int
    n_columns: int

    @abstractmethod
    def rows(self, which: NDArray[np.int64]) -> Rows:
        """The rows ``which`` in that order (repeats allowed)."""

    @abstractmethod
    def take(self, which: NDArray[np.int64]) -> RowSource:
        """A source of the rows ``which`` only; no copy where the source is on disk."""

    def all_rows(self) -> Rows:
        """Every row in order; large for sources on disk, so use :meth:`rows` in blocks there."""
        return self.rows(np.arange(self.n_rows))


class MemoryRows(RowSource):
    """Rows of a scipy CSR matrix held in memory (float32 data, int32 indices; explicit zeros removed)."""

    def __init__(self, matrix: Any) -> None:
        import scipy.sparse as sp

        matrix = sp.csr_matrix(matrix)
        if matrix.dtype != np.float32:
            matrix = matrix.astype(np.float32)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        if (matrix.data == 0).any():
            matrix = matrix.copy()
            matrix.eliminate_zeros()
        self.matrix = matrix
        self.n_rows, self.n_columns = matrix.shape

    def rows(self, which: NDArray[np.int64]) -> Rows:
        return self._as_rows(self.matrix[which])

    def all_rows(self) -> Rows:
        return self._as_rows(self.matrix)

    def take(self, which: NDArray[np.int64]) -> MemoryRows:
        return MemoryRows(self.matrix[which])

    @staticmethod
    def _as_rows(matrix: Any) -> Rows:
        return Rows(
            matrix.indptr.astype(np.int64),
            matrix.indices.astype(np.int32, copy=False),
            matrix.data,
            matrix.shape[1],
        )


class ZarrRows(RowSource):
    """Rows of a CSR group on disk (arrays ``data``, ``indices``, ``indptr``: a zarr group or an HDF5 group).

    Only the row pointers are held in memory. Rows asked for are sorted, neighbours are read in one go, and columns
    are renumbered through ``columns`` (file column -> union column, -1 = left out) on the way.
    """

    #: Runs of rows closer than this many stored values are read together: a seek costs more than the bytes.
    GAP = 16_384

    def __init__(
        self,
        group: Any,
        n_columns: int,
        columns: NDArray[np.int64] | None = None,
        which: NDArray[np.int64] | None = None,
        indptr: NDArray[np.int64] | None = None,
    ) -> None:
        self.group = group
        self.indptr = np.asarray(group["indptr"][:], dtype=np.int64) if indptr is None else indptr
        self.columns = columns
        self.which = np.arange(len(self.indptr) - 1) if which is None else which
        self.n_rows = len(self.which)
        self.n_columns = n_columns

    def take(self, which: NDArray[np.int64]) -> ZarrRows:
        return ZarrRows(self.group, self.n_columns, self.columns, self.which[which], self.indptr)

    def rows(self, which: NDArray[np.int64]) -> Rows:
        wanted = self.which[np.asarray(which)]
        unique, back = np.unique(wanted, return_inverse=True)
        starts, stops = self.indptr[unique], self.indptr[unique + 1]
        lengths = stops - starts
        offsets = np.r_[0, np.cumsum(lengths)]
        indices = np.empty(offsets[-1], dtype=np.int32)
        data = np.empty(offsets[-1], dtype=np.float32)
        breaks = np.flatnonzero(starts[1:] - stops[:-1] > self.GAP) + 1
        for run in np.split(np.arange(len(unique)), breaks):
            if not len(run):
                continue
            first, last = starts[run[0]], stops[run[-1]]
            run_indices = np.asarray(self.group["indices"][first:last])
            run_data = np.asarray(self.group["data"][first:last])
            pick = _spans(starts[run] - first, lengths[run])
            target = slice(offsets[run[0]], offsets[run[-1] + 1])
            indices[target] = run_indices[pick]
            data[target] = run_data[pick]
        if self.columns is not None:
            indices = self.columns[indices].astype(np.int32)
            keep = indices >= 0
            kept = np.r_[0, np.cumsum(keep)]
            offsets = kept[offsets]
            lengths = np.diff(offsets)
            indices, data = indices[keep], data[keep]
        pick = _spans(offsets[:-1][back], lengths[back])
        indptr = np.r_[0, np.cumsum(lengths[back])]
        return Rows(indptr, indices[pick], data[pick], self.n_columns)


def _spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers ``starts[i] ... starts[i] + lengths[i] - 1`` of every span, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    spans: NDArray[np.int64] = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return spans
