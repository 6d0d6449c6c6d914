"""A matrix as it lies in a file: CSR, CSC or dense, HDF5 or zarr; sampled for previews, read whole, or left on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from headless.data.counts import Tally
from headless.data.readers.faults import truncated
from headless.data.readers.store import attribute, is_group, member, missing_chunks
from headless.data.sources import ZarrRows

if TYPE_CHECKING:
    import scipy.sparse as sp

#: Stored values handled at a time while reading.
_BLOCK = 8_000_000
#: A preview looks at this many runs of this many stored values.
_RUNS, _RUN = 8, 20_000


@dataclass(frozen=True)
class Stored:
    """A matrix in a file, ``shape`` = (cells, features) whatever the file's own orientation.

    ``node`` is a group with ``data``, ``indices`` and ``indptr`` (``csr``: rows are cells, ``csc``: rows are
    features) or a two-dimensional array (``dense``).
    """

    node: Any
    layout: Literal["csr", "csc", "dense"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, node: Any) -> Stored | None:
        """The matrix behind an element of an AnnData file; ``None`` if it is no matrix."""
        if node is None:
            return None
        if not is_group(node):
            if len(node.shape) != 2 or getattr(node.dtype, "kind", "O") not in "fiub":
                return None
            return cls(node, "dense", (int(node.shape[0]), int(node.shape[1])))
        layout = attribute(node, "encoding-type").removesuffix("_matrix") or attribute(node, "h5sparse_format")
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        if layout not in ("csr", "csc") or shape is None:
            return None
        rows, columns = (int(n) for n in shape)
        return cls(node, "csr" if layout == "csr" else "csc", (rows, columns))

    def sample(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Some stored values and the features they belong to, from all over the matrix; a few small reads."""
        if self.layout == "dense":
            n = min(self.shape[0], max(1, _RUNS * _RUN // max(self.shape[1], 1)))
            block = np.asarray(self.node[:n])
            features = np.broadcast_to(np.arange(self.shape[1]), block.shape)
            return block.ravel(), features.ravel()
        data, indices = self.node["data"], self.node["indices"]
        total = int(data.shape[0])
        starts = sorted({max(0, (total - _RUN) * i // (_RUNS - 1)) for i in range(_RUNS)})
        spans = [np.arange(start, min(start + _RUN, total)) for start in starts]
        values = np.concatenate([np.asarray(data[span[0] : span[-1] + 1]) for span in spans if len(span)] or [data[:0]])
        where = np.concatenate(spans)
        if self.layout == "csc":
            pointers = np.asarray(self.node["indptr"][...])
            return values, np.searchsorted(pointers, where, side="right") - 1
        columns = np.concatenate([np.asarray(indices[s[0] : s[-1] + 1]) for s in spans if len(s)] or [indices[:0]])
        return values, columns.astype(np.int64)

    def read(self, path: Path, columns: NDArray[np.int64] | None, tally: Tally) -> sp.csr_matrix:
        """Cells x features as CSR float32; every value is shown to ``tally`` before it is converted.

        ``columns`` picks features. Raises ``data.truncated`` or ``data.unreadable`` for a damaged matrix.
        """
        import scipy.sparse as sp

        if self.layout == "dense":
            return self._read_dense(path, columns, tally)
        pointers = self._pointers(path)
        total = int(pointers[-1])
        n_minor = self.shape[1] if self.layout == "csr" else self.shape[0]
        indices = np.empty(total, dtype=np.int32)
        values = np.empty(total, dtype=np.float32)
        wanted = None
        if columns is not None:
            wanted = np.zeros(self.shape[1], dtype=bool)
            wanted[columns] = True
        for start, stop, data, minor in self._blocks(total):
            _check_indices(minor, n_minor, self.node["indices"], path)
            if wanted is None:
                tally.add(data)
            elif self.layout == "csr":
                tally.add(data[wanted[minor]])
            else:
                major = np.searchsorted(pointers, np.arange(start, stop), side="right") - 1
                tally.add(data[wanted[major]])
            indices[start:stop] = minor
            values[start:stop] = data
        if self.layout == "csr":
            matrix = sp.csr_matrix((values, indices, pointers), shape=self.shape)
        else:
            matrix = sp.csc_matrix((values, indices, pointers), shape=self.shape).tocsr()
        return matrix if columns is None else matrix[:, columns]

    def lazily(self, path: Path, columns: NDArray[np.int64] | None, tally: Tally) -> ZarrRows:
        """Rows that stay on disk (``csr`` only); the values are still all looked at once, block by block."""
        pointers = self._pointers(path)
        renumber = None
        if columns is not None:
            renumber = np.full(self.shape[1], -1, dtype=np.int64)
            renumber[columns] = np.arange(len(columns))
        for _, _, data, minor in self._blocks(int(pointers[-1])):
            _check_indices(minor, self.shape[1], self.node["indices"], path)
            tally.add(data if renumber is None else data[renumber[minor] >= 0])
        n_columns = self.shape[1] if columns is None else len(columns)
        return ZarrRows(self.node, n_columns, renumber, indptr=pointers)

    def _pointers(self, path: Path) -> NDArray[np.int64]:
        for name in ("data", "indices", "indptr"):
            if member(self.node, name) is None:
                raise truncated(path, f"the matrix lacks '{name}'")
        pointers = np.asarray(self.node["indptr"][...], dtype=np.int64)
        total = int(self.node["data"].shape[0])
        n_major = self.shape[0] if self.layout == "csr" else self.shape[1]
        # A chunk that is absent from a zarr store reads as zeros, without a word from the library.
        if missing_chunks(self.node["data"]) or (total and missing_chunks(self.node["indptr"])):
            raise truncated(path, "chunks of the matrix are missing")
        if (
            len(pointers) != n_major + 1
            or pointers[0] != 0
            or int(pointers[-1]) != total
            or int(self.node["indices"].shape[0]) != total
            or (np.diff(pointers) < 0).any()
        ):
            raise ValueError("the row pointers of the sparse matrix do not fit its values")
        return pointers

    def _blocks(self, total: int) -> Iterator[tuple[int, int, NDArray[Any], NDArray[Any]]]:
        for start in range(0, total, _BLOCK):
            stop = min(start + _BLOCK, total)
            data, indices = self.node["data"][start:stop], self.node["indices"][start:stop]
            yield start, stop, np.asarray(data), np.asarray(indices)

    def _read_dense(self, path: Path, columns: NDArray[np.int64] | None, tally: Tally) -> sp.csr_matrix:
        import scipy.sparse as sp

        step = max(1, _BLOCK // max(self.shape[1], 1))
        parts = []
        for start in range(0, self.shape[0], step):
            block = np.asarray(self.node[start : start + step])
            block = block if columns is None else block[:, columns]
            tally.add(block)
            parts.append(sp.csr_matrix(block.astype(np.float32)))
        n_columns = self.shape[1] if columns is None else len(columns)
        matrix: sp.csr_matrix = sp.vstack(parts, format="csr") if parts else sp.csr_matrix(np.empty((0, n_columns)))
        # A zarr chunk of zeros alone may rightly be left out; one that empties whole cells may not.
        if missing_chunks(self.node) and (np.diff(matrix.indptr) == 0).any():
            raise truncated(path, "chunks of the matrix are missing")
        return matrix


def _check_indices(indices: NDArray[Any], n: int, array: Any, path: Path) -> None:
    if not len(indices):
        return
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise ValueError("the sparse matrix points at columns that do not exist")
    if n > 1 and missing_chunks(array):
        raise truncated(path, "chunks of the matrix are missing")
