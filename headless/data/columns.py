"""Columns of a source: counted in blocks, and renumbered from a file's features to the union of the mosaic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headless.data.sources import MemoryRows, Rows, RowSource, ZarrRows

#: Rows that are looked at together; bounds the memory of passes over sources on disk.
BLOCK = 8192


def blocks(source: RowSource) -> Iterator[Rows]:
    """The rows of a source in order, block by block."""
    if isinstance(source, MemoryRows):
        yield source.all_rows()
        return
    for start in range(0, source.n_rows, BLOCK):
        yield source.rows(np.arange(start, min(start + BLOCK, source.n_rows)))


@dataclass(frozen=True)
class ColumnStats:
    """Of each column: ``cells``, in how many rows it is not zero, and ``total``, its sum; both ``(n_columns,)``."""

    cells: NDArray[np.int64]
    total: NDArray[np.float64]


def column_stats(source: RowSource) -> ColumnStats:
    """Non-zero rows and sum of every column, in one sparse pass."""
    cells = np.zeros(source.n_columns, dtype=np.int64)
    total = np.zeros(source.n_columns, dtype=np.float64)
    for rows in blocks(source):
        seen = rows.indices[rows.data != 0]
        cells += np.bincount(seen, minlength=source.n_columns)
        total += np.bincount(rows.indices, weights=rows.data, minlength=source.n_columns)
    return ColumnStats(cells, total)


def renumbered(source: RowSource, columns: NDArray[np.int64], n_columns: int) -> RowSource:
    """A source whose column ``j`` is column ``columns[j]`` of ``n_columns`` (-1 = left out; several to one = summed).

    In memory the result is a new sparse matrix; on disk only the numbering is kept.
    """
    if n_columns == source.n_columns and bool((columns == np.arange(n_columns)).all()):
        return source
    if isinstance(source, ZarrRows):
        if source.columns is not None:
            columns = np.where(source.columns >= 0, columns[source.columns], -1)
        moved = ZarrRows(source.group, n_columns, columns, source.which, source.indptr)
        return SummedRows(moved) if _collide(columns) else moved
    if isinstance(source, SummedRows):
        return SummedRows(renumbered(source.inner, columns, n_columns))
    return MemoryRows(_moved(source.all_rows(), columns, n_columns))


class SummedRows(RowSource):
    """Rows of another source with values of equal columns added up (peaks of a file that were merged into one)."""

    def __init__(self, inner: RowSource) -> None:
        self.inner = inner
        self.n_rows, self.n_columns = inner.n_rows, inner.n_columns

    def rows(self, which: NDArray[np.int64]) -> Rows:
        return MemoryRows(self.inner.rows(which).to_scipy()).all_rows()

    def take(self, which: NDArray[np.int64]) -> SummedRows:
        return SummedRows(self.inner.take(which))


def stacked(sources: list[RowSource]) -> RowSource:
    """The rows of several sources below one another (in memory if there is more than one)."""
    if len(sources) == 1:
        return sources[0]
    import scipy.sparse as sp

    return MemoryRows(sp.vstack([source.all_rows().to_scipy() for source in sources], format="csr"))


def _moved(rows: Rows, columns: NDArray[np.int64], n_columns: int) -> Any:
    import scipy.sparse as sp

    target = columns[rows.indices]
    keep = target >= 0
    indptr = np.r_[0, np.cumsum(keep)][rows.indptr]
    matrix = sp.csr_matrix(
        (rows.data[keep], target[keep].astype(np.int32), indptr), shape=(rows.n_rows, n_columns), copy=False
    )
    matrix.sum_duplicates()  # sorts the indices too
    return matrix


def _collide(columns: NDArray[np.int64]) -> bool:
    kept = columns[columns >= 0]
    return len(np.unique(kept)) < len(kept)
