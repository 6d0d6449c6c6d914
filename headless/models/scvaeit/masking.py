"""What is hidden on purpose in a training step, and the rows of data that this makes (sheet, section 4.1).

Of every modality a *bank* of rows is kept: the cells as measured, then for the cells in which single features are
hidden their visible and their hidden part. A view of the cells (all that was measured, what is visible, what is
hidden) is then a row of the bank for each cell, or none (-1). Every row is computed once however many views show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headless.data.minibatch import Minibatch, TileRows
from headless.models.scvaeit.scoring import Mask


@dataclass
class Hidden:
    """What is hidden of one modality in a minibatch.

    Attributes
    ----------
    whole
        ``(m,)`` bool by row of the modality: all of it is hidden.
    partial
        ``(k,)`` rows in which single features are hidden, ascending; never rows that are hidden as a whole.
    bits
        ``(k, D)`` bool: the hidden features of these rows; measured ones only.
    """

    whole: Tensor
    partial: Tensor
    bits: Tensor


def rows_mask(x: TileRows, rows: Tensor) -> Tensor | None:
    """Measured features of some rows, ``(D,)`` or ``(len(rows), D)``; ``None`` = all."""
    return x.mask if x.mask is None or x.mask.dim() == 1 else x.mask[rows]


def random_bits(shape: tuple[int, int], p: float, device: torch.device) -> Tensor:
    """``True`` with probability ``p`` (exact to 1/65 536); four entries are cut from each 64-bit random number."""
    n = shape[0] * shape[1]
    drawn = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    # All 16-bit patterns are equally likely; p = 1 must reach beyond the largest of them.
    return (drawn.view(torch.int16)[:n].to(torch.int32) < round(p * 65536) - 32768).view(shape)


def draw(
    batch: Minibatch,
    modalities: tuple[str, ...],
    p_feat: float,
    visible_sets: str,
    tables: Mapping[str, Tensor] | None = None,
) -> dict[str, Hidden]:
    """Draw what is hidden in each cell, with torch's random numbers.

    Parameters
    ----------
    modalities
        All modalities of the mosaic; one of them is drawn for each cell, uniformly.
    p_feat
        Probability of hiding a feature; undone in every second cell.
    visible_sets
        ``one hidden``, ``any`` (uniform over the sets of its modalities that leave one) or ``all``.
    tables
        Mosaics of one modality: ``(T, D)`` bool, the patterns of measured features of its batches.
    """
    n, device = batch.n, batch.batch.device
    present = torch.zeros(n, len(modalities), dtype=torch.bool, device=device)
    for k, m in enumerate(modalities):
        if m in batch.x:
            rows = batch.x[m].rows
            present[slice(None) if rows is None else rows, k] = True
    whole = _whole(present, visible_sets)
    chosen = torch.rand(n, device=device) < 0.5 if p_feat > 0 else None
    found = {}
    for k, m in enumerate(modalities):
        if m not in batch.x:
            continue
        x = batch.x[m]
        cells = torch.arange(n, device=device) if x.rows is None else x.rows
        gone = whole[cells, k]
        table = None if tables is None else tables.get(m)
        if table is not None:
            some = torch.arange(x.n_rows, device=device)
        elif chosen is not None:
            some = torch.nonzero(chosen[cells] & ~gone).flatten()
        else:
            some = cells[:0]
        bits = torch.zeros(len(some), x.n_columns, dtype=torch.bool, device=device)
        if chosen is not None and len(some):
            bits = random_bits((len(some), x.n_columns), p_feat, device)
            if table is not None:
                bits &= chosen[cells][:, None]
        if table is not None:
            bits |= ~table[torch.randint(len(table), (len(some),), device=device)]
        measured = rows_mask(x, some)
        if measured is not None:
            bits &= measured > 0
        if table is not None:
            keep = torch.nonzero(bits.any(1)).flatten()
            some, bits = some[keep], bits[keep]
        found[m] = Hidden(gone, some, bits)
    return found


def _whole(present: Tensor, visible_sets: str) -> Tensor:
    """``(n, K)`` bool: modalities hidden as a whole; a cell keeps at least one."""
    n, k = present.shape
    nothing = torch.zeros_like(present)
    if visible_sets == "all" or k < 2 or n == 0:
        return nothing
    if visible_sets == "one hidden":
        drawn = torch.randint(k, (n,), device=present.device)
        gone = torch.nn.functional.one_hot(drawn, k).bool() & present
        return gone & (present & ~gone).any(1, keepdim=True)
    numbers = torch.arange(1, 2**k, device=present.device)
    sets = (numbers[:, None] >> torch.arange(k, device=present.device)) % 2 == 1
    possible = (~(sets[None] & ~present[:, None])).all(2).float()
    possible[~present.any(1)] = 1.0  # a cell with nothing: any draw hides nothing
    return present & ~sets[torch.multinomial(possible, 1).flatten()]


@dataclass
class Bank:
    """The rows of one modality: ``m`` cells as measured, ``k`` visible parts, ``k`` hidden parts.

    Attributes
    ----------
    x
        ``(m + 2 k, D)`` counts, without a mask.
    m, k
        Numbers of rows.
    mask
        Of the first ``m`` rows, as in :class:`TileRows`.
    visible, hidden
        ``(k, D)`` float32 masks of the parts (1 = belongs to it).
    views
        View -> ``(n,)`` row of the bank for each cell of the minibatch, -1 where the view has nothing of this
        modality: ``full``, ``visible``, ``hidden``.
    share
        ``(m + 2 k,)``: the part of a typical cell's counts that falls on the row's features.
    """

    x: TileRows
    m: int
    k: int
    mask: Tensor | None
    visible: Tensor
    hidden: Tensor
    views: dict[str, Tensor]
    share: Tensor

    def order(self, rows: Tensor) -> Tensor:
        """Places of complete rows first, then of parts, each in their order."""
        return torch.argsort((rows >= self.m).to(torch.uint8), stable=True)

    def masks(self, rows: Tensor) -> Mask:
        """Masks of rows that stand in :meth:`order`."""
        start = int((rows < self.m).sum())
        head = self.mask if self.mask is None or self.mask.dim() == 1 else self.mask[rows[:start]]
        tail = None
        if start < len(rows):
            tail = torch.cat([self.visible, self.hidden])[rows[start:] - self.m]
        return Mask(start, head, tail)


def _rows(
    indptr: Tensor, columns: Tensor, values: Tensor, n_columns: int, row_ids: Tensor | None = None
) -> TileRows:
    """Sparse rows without a mask; the row of each value is kept where it is known."""
    made = TileRows(None, indptr, columns, values, n_columns, None)
    if row_ids is not None:
        made.__dict__["row_ids"] = row_ids
    return made


def take(x: TileRows, rows: Tensor) -> TileRows:
    """Some rows of a sparse matrix in a given order, without a mask."""
    starts = x.indptr[rows]
    lengths = x.indptr[rows + 1] - starts
    indptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(lengths, 0, out=indptr[1:])
    row_ids = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
    pick = (starts - indptr[:-1]).index_select(0, row_ids)
    pick += torch.arange(len(row_ids), device=rows.device)
    return _rows(indptr, x.columns.index_select(0, pick), x.values.index_select(0, pick), x.n_columns, row_ids)


def _keep(x: TileRows, keep: Tensor) -> TileRows:
    """The stored values for which ``keep`` holds."""
    row_ids = x.row_ids[keep]
    counts = torch.bincount(row_ids, minlength=x.n_rows)
    return _rows(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]), x.columns[keep], x.values[keep], x.n_columns, row_ids
    )


def bank_of(x: TileRows, n: int, shares: Tensor, hidden: Hidden | None = None) -> Bank:
    """The bank of one modality.

    Parameters
    ----------
    x
        The measured rows.
    n
        Cells of the minibatch.
    shares
        ``(D,)``: the part of a typical cell's counts that falls on each feature; sums to 1.
    hidden
        What is hidden; nothing if ``None``.
    """
    m, device = x.n_rows, x.values.device
    at = slice(None) if x.rows is None else x.rows
    numbers = torch.arange(m, device=device)
    full = torch.full((n,), -1, dtype=torch.int64, device=device)
    full[at] = numbers
    share = torch.ones(m, device=device) if x.mask is None else (x.mask @ shares).expand(m)
    empty = torch.zeros(0, x.n_columns, device=device)
    if hidden is None:
        plain = _rows(x.indptr, x.columns, x.values, x.n_columns, x.row_ids)
        views = {"full": full, "visible": full, "hidden": torch.full_like(full, -1)}
        return Bank(plain, m, 0, x.mask, empty, empty, views, share)
    k = len(hidden.partial)
    seen, unseen = numbers.clone(), torch.full_like(numbers, -1)
    seen[hidden.whole] = -1
    unseen[hidden.whole] = numbers[hidden.whole]
    seen[hidden.partial] = m + torch.arange(k, device=device)
    unseen[hidden.partial] = m + k + torch.arange(k, device=device)
    visible, concealed = torch.full_like(full, -1), torch.full_like(full, -1)
    visible[at], concealed[at] = seen, unseen
    views = {"full": full, "visible": visible, "hidden": concealed}
    if k == 0:
        plain = _rows(x.indptr, x.columns, x.values, x.n_columns, x.row_ids)
        return Bank(plain, m, 0, x.mask, empty, empty, views, share)
    some = take(x, hidden.partial)
    gone = hidden.bits.view(-1)[some.flat]
    left, right = _keep(some, ~gone), _keep(some, gone)
    nnz, half = len(x.values), len(left.values)
    rows = _rows(
        torch.cat([x.indptr, left.indptr[1:] + nnz, right.indptr[1:] + nnz + half]),
        torch.cat([x.columns, left.columns, right.columns]),
        torch.cat([x.values, left.values, right.values]),
        x.n_columns,
        torch.cat([x.row_ids, left.row_ids + m, right.row_ids + m + k]),
    )
    hidden_mask = hidden.bits.float()
    measured = rows_mask(x, hidden.partial)
    visible_mask = (1 - hidden_mask) if measured is None else (1 - hidden_mask) * measured
    share = torch.cat([share, visible_mask @ shares, hidden_mask @ shares])
    return Bank(rows, m, k, x.mask, visible_mask, hidden_mask, views, share)
