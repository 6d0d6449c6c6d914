"""Minibatches: sparse rows gathered from the tiles, made dense (or not) where the arithmetic happens.

No cell is touched by Python, a missing modality takes no memory, and a mask is kept once a tile. On a GPU the sparse
rows of every tile live on the device (where they fit) and are gathered there; on the CPU they are sliced by scipy.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headless.data.covariates import Covariate, covariate_values
from headless.data.mosaic import Mosaic, Tile
from headless.data.sources import MemoryRows, Rows

T = TypeVar("T")


class TileRows:
    """The measured rows of one modality in a minibatch: sparse, and dense on demand.

    Attributes
    ----------
    rows
        ``(m,)`` positions in the minibatch of the cells that have the modality; ``None`` = every cell has it.
    indptr, columns, values
        The ``m`` rows in CSR form (int64, int32, float32) on the device.
    n_columns
        Size of the union of features.
    mask
        ``(n_columns,)``, or ``(m, n_columns)`` where cells of several batches meet: 1.0 = measured, 0.0 = not;
        ``None`` = every feature was measured.
    """

    def __init__(
        self, rows: Tensor | None, indptr: Tensor, columns: Tensor, values: Tensor, n_columns: int, mask: Tensor | None
    ) -> None:
        self.rows = rows
        self.indptr = indptr
        self.columns = columns
        self.values = values
        self.n_columns = n_columns
        self.mask = mask

    @property
    def n_rows(self) -> int:
        """Number of cells of the minibatch that have the modality."""
        return len(self.indptr) - 1

    @cached_property
    def row_ids(self) -> Tensor:
        """``(nnz,)`` int64: the row of each value."""
        lengths = self.indptr[1:] - self.indptr[:-1]
        numbers = torch.arange(self.n_rows, device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=len(self.values))

    @cached_property
    def flat(self) -> Tensor:
        """``(nnz,)`` int64: the place of each value in the flattened dense matrix."""
        return self.row_ids * self.n_columns + self.columns

    @cached_property
    def totals(self) -> Tensor:
        """``(m,)`` float32: the sum of each row (its library size)."""
        out = torch.zeros(self.n_rows, device=self.values.device)
        return out.index_add_(0, self.row_ids, self.values)

    @cached_property
    def dense(self) -> Tensor:
        """``(m, n_columns)`` float32."""
        return self.scatter(self.values)

    def scatter(self, values: Tensor) -> Tensor:
        """Values that replace the stored ones (a transformed copy, say) as a dense matrix."""
        out = torch.zeros(self.n_rows * self.n_columns, dtype=values.dtype, device=values.device)
        return out.index_put_((self.flat,), values).view(self.n_rows, self.n_columns)

    def with_values(self, values: Tensor) -> TileRows:
        """The same pattern of non-zeros with other values."""
        return TileRows(self.rows, self.indptr, self.columns, values, self.n_columns, self.mask)


@dataclass
class Minibatch:
    """Cells, their batch codes, and what was measured in them.

    Attributes
    ----------
    cells, batch
        ``(n,)`` int64: cell numbers in the mosaic, batch codes.
    x
        Modality -> rows; modalities that no cell of the minibatch has are absent.
    one_batch
        The batch code that all cells share, ``None`` if they do not.
    covariates
        ``(n, C)`` float32 in the order of ``Layout.covariates``: level codes, or standardised values; ``None`` if the
        method asked for none.
    cache
        What a module in evaluation mode computed of this minibatch and may need again (experts of each modality).
    """

    cells: Tensor
    batch: Tensor
    x: dict[str, TileRows] = field(default_factory=dict)
    one_batch: int | None = None
    covariates: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """Number of cells."""
        return len(self.cells)


class _DeviceRows:
    """All tiles of a modality as one CSR matrix on the device, gathered there."""

    def __init__(self, blocks: list[Rows], device: torch.device) -> None:
        starts = np.cumsum([0, *(block.indptr[-1] for block in blocks)])
        parts = [block.indptr[:-1] + start for block, start in zip(blocks, starts, strict=False)]
        self.indptr = torch.from_numpy(np.concatenate([*parts, starts[-1:]])).to(device)
        self.columns = torch.from_numpy(np.concatenate([block.indices for block in blocks])).to(device)
        self.values = torch.from_numpy(np.concatenate([block.data for block in blocks])).to(device)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        starts = self.indptr[rows]
        lengths = self.indptr[rows + 1] - starts
        indptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(lengths, 0, out=indptr[1:])
        shift = torch.repeat_interleave(starts - indptr[:-1], lengths)
        pick = torch.arange(len(shift), device=rows.device) + shift
        return indptr, self.columns[pick], self.values[pick]


class _Gatherer:
    """Where the rows of one modality are, by cell number."""

    def __init__(self, mosaic: Mosaic, modality: str, device: torch.device, on_device: bool) -> None:
        self.tiles: list[Tile] = [tile for (_, m), tile in mosaic.tiles.items() if m == modality]
        self.n_columns = len(mosaic.features[modality])
        self.device = device
        self.tile_of = np.full(mosaic.n_cells, -1, dtype=np.int32)
        self.row_of = np.zeros(mosaic.n_cells, dtype=np.int64)
        offset = 0
        self.resident: _DeviceRows | None = None
        for number, tile in enumerate(self.tiles):
            self.tile_of[tile.cells] = number
            self.row_of[tile.cells] = np.arange(len(tile.cells)) + (offset if on_device else 0)
            offset += len(tile.cells)
        if on_device:
            self.resident = _DeviceRows([tile.source.all_rows() for tile in self.tiles], device)
        masks = [tile.mask for tile in self.tiles]
        self.masked = any(mask is not None and not mask.all() for mask in masks)
        none = torch.ones(0, self.n_columns, device=self.device)
        self.masks = torch.stack([self._mask(mask) for mask in masks]) if masks else none

    def _mask(self, mask: NDArray[np.bool_] | None) -> Tensor:
        if mask is None:
            return torch.ones(self.n_columns, device=self.device)
        return torch.from_numpy(mask.astype(np.float32)).to(self.device)

    def gather(self, cells: NDArray[np.int64]) -> TileRows | None:
        tiles = self.tile_of[cells]
        present = tiles >= 0
        if not present.any():
            return None
        rows = None
        if not present.all():
            positions = np.flatnonzero(present)
            cells, tiles = cells[positions], tiles[positions]
            rows = torch.from_numpy(positions).to(self.device)
        used = np.unique(tiles)
        if self.resident is not None:
            which = torch.from_numpy(self.row_of[cells]).to(self.device, non_blocking=True)
            indptr, columns, values = self.resident.gather(which)
        else:
            block = self._gather_on_host(cells, tiles, used)
            indptr = torch.from_numpy(block.indptr).to(self.device, non_blocking=True)
            columns = torch.from_numpy(block.indices).to(self.device, non_blocking=True)
            values = torch.from_numpy(block.data).to(self.device, non_blocking=True)
        mask = None
        if self.masked:
            mask = self.masks[int(used[0])]
            if len(used) > 1:
                mask = self.masks[torch.from_numpy(tiles.astype(np.int64)).to(self.device)]
        return TileRows(rows, indptr, columns, values, self.n_columns, mask)

    def _gather_on_host(self, cells: NDArray[np.int64], tiles: NDArray[np.int32], used: NDArray[np.int32]) -> Rows:
        if len(used) == 1:
            rows: Rows = self.tiles[used[0]].source.rows(self.row_of[cells])
            return rows
        import scipy.sparse as sp

        parts, order = [], []
        for number in used:
            here = np.flatnonzero(tiles == number)
            parts.append(self.tiles[number].source.rows(self.row_of[cells[here]]).to_scipy())
            order.append(here)
        back = np.argsort(np.concatenate(order))
        return MemoryRows(sp.vstack(parts, format="csr")[back]).all_rows()


class MinibatchMaker:
    """Turns cell numbers into minibatches.

    Parameters
    ----------
    mosaic
        Where the rows are.
    device
        Where minibatches are made. On a GPU the sparse data are held there when they take less than
        ``resident_share`` of its free memory.
    covariates
        Columns of the table of cells that the method asked for (``Layout.covariates``).
    """

    resident_share = 0.5

    def __init__(
        self, mosaic: Mosaic, device: str | torch.device = "cpu", covariates: Sequence[Covariate] = ()
    ) -> None:
        self.device = torch.device(device)
        self.mosaic = mosaic
        self.batch_codes = mosaic.batch_codes
        self.covariates = torch.from_numpy(covariate_values(mosaic.cells, covariates)) if covariates else None
        resident = self.device.type == "cuda" and self._fits()
        self._gatherers = {m: _Gatherer(mosaic, m, self.device, resident) for m in mosaic.modalities}

    @property
    def on_disk(self) -> bool:
        """Is a tile read from disk, so that reading ahead pays?"""
        return any(not isinstance(tile.source, MemoryRows) for tile in self.mosaic.tiles.values())

    def _fits(self) -> bool:
        if self.on_disk:
            return False
        needed = sum(
            8 * tile.source.matrix.nnz for tile in self.mosaic.tiles.values() if isinstance(tile.source, MemoryRows)
        )
        free, _ = torch.cuda.mem_get_info(self.device)
        return bool(needed < self.resident_share * free)

    def make(self, cells: NDArray[np.int64]) -> Minibatch:
        """The minibatch of these cells, in this order."""
        cells = np.asarray(cells, dtype=np.int64)
        codes = self.batch_codes[cells]
        gathered = {m: rows for m, g in self._gatherers.items() if (rows := g.gather(cells)) is not None}
        return Minibatch(
            torch.from_numpy(cells).to(self.device, non_blocking=True),
            torch.from_numpy(codes).to(self.device, non_blocking=True),
            gathered,
            int(codes[0]) if len(codes) and (codes == codes[0]).all() else None,
            None if self.covariates is None else self.covariates[cells].to(self.device, non_blocking=True),
        )

    def stream(self, plan: Iterable[NDArray[np.int64]]) -> Iterator[Minibatch]:
        """Minibatches of a plan; read ahead in a thread where a tile is on disk."""
        made = (self.make(cells) for cells in plan)
        return prefetch(made) if self.on_disk else made

    def in_order(self, size: int, cells: NDArray[np.int64] | None = None) -> Iterator[Minibatch]:
        """Every cell (or the given ones) once, in order, ``size`` at a time; for inference."""
        wanted = np.arange(self.mosaic.n_cells) if cells is None else np.asarray(cells)
        return self.stream(wanted[start : start + size] for start in range(0, len(wanted), size))


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The items, made ``depth`` ahead in a thread; an error in the thread is raised here."""
    line: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)
    leave = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not leave.is_set():
            try:
                line.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to the reader, which raises it
            put("error", error)

    thread = threading.Thread(target=work, name="minibatch-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = line.get()
            if kind == "item":
                yield value  # type: ignore[misc]
            elif kind == "error":
                raise value  # type: ignore[misc]
            else:
                return
    finally:
        leave.set()
        thread.join()
