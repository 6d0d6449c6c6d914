"""What scVAEIT learns of the training cells before training: shares of features, depths, ranges, patterns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headless.data.minibatch import Minibatch, TileRows
from headless.data.mosaic import Layout

_ROUNDS = 30


@dataclass
class Facts:
    """One modality of the training cells.

    Attributes
    ----------
    share
        ``(D,)``: the part of a typical cell's counts that falls on each feature; sums to 1.
    open
        ``(D,)``: share of the cells that have the feature, among those in which it was measured.
    library
        Median counts of a cell, as if all features had been measured.
    largest
        Largest log-normalised value.
    measured
        ``(n_batches, D)`` bool: features measured in a cell of each batch.
    cells
        ``(n_batches,)`` cells that have the modality.
    """

    share: Tensor
    open: Tensor
    library: float
    largest: float
    measured: Tensor
    cells: Tensor


class _Sums:
    def __init__(self, n_batches: int, n_features: int, device: torch.device) -> None:
        self.parts = torch.zeros(n_batches, n_features, device=device, dtype=torch.float64)
        self.open = torch.zeros_like(self.parts)
        self.cells = torch.zeros(n_batches, device=device)
        self.measured = torch.ones(n_batches, n_features, dtype=torch.bool, device=device)
        self.totals: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.largest: list[Tensor] = []

    def add(self, x: TileRows, codes: Tensor) -> None:
        totals = x.totals.clamp(min=1)
        n = x.n_columns
        place = codes[x.row_ids] * n + x.columns
        self.parts.view(-1).index_add_(0, place, (x.values / totals[x.row_ids]).double())
        self.open.view(-1).index_add_(0, place, (x.values > 0.5).double())
        if x.mask is not None:
            present, which = torch.unique(codes, return_inverse=True)
            for number, code in enumerate(present.tolist()):
                if not self.cells[code]:
                    row = int((which == number).nonzero()[0])
                    self.measured[code] = (x.mask if x.mask.dim() == 1 else x.mask[row]) > 0
        self.cells += torch.bincount(codes, minlength=len(self.cells))
        self.totals.append(totals)
        self.codes.append(codes)
        if len(x.values):
            self.largest.append((x.values / totals[x.row_ids]).max())

    def facts(self) -> Facts:
        able = self.measured & (self.cells > 0)[:, None]
        cells = self.cells.double()
        # Parts are of what was measured: a batch that lacks features shows too large ones of the others. Shares and
        # the part of a cell that each batch can see are found in turn.
        share = torch.full_like(self.parts[0], 1 / self.parts.shape[1])
        for _ in range(_ROUNDS):
            seen = (share * self.measured).sum(1)
            share = (self.parts * seen[:, None] * able).sum(0) / (cells[:, None] * able).sum(0).clamp(min=1)
            share = share / share.sum().clamp(min=1e-12)
        seen = (share * self.measured).sum(1).clamp(min=1e-6)
        libraries = torch.cat(self.totals) / seen[torch.cat(self.codes)]
        largest = float(torch.stack(self.largest).max()) if self.largest else 1.0
        opened = self.open.sum(0) / (cells[:, None] * able).sum(0).clamp(min=1)
        return Facts(
            share.float(),
            opened.float(),
            float(libraries.median()),
            float(torch.log1p(torch.tensor(1e4 * largest))),
            self.measured,
            self.cells,
        )


def learn(batches: Iterable[Minibatch], layout: Layout) -> tuple[dict[str, Facts], Tensor]:
    """Facts of each modality that a training cell has, and the number of cells with each set of modalities.

    Sets are numbered in binary, the first modality being 1: ``(2^K,)``.
    """
    sums: dict[str, _Sums] = {}
    numbers = {m: 2**k for k, m in enumerate(layout.modalities)}
    present = torch.zeros(2 ** len(numbers), dtype=torch.int64)
    for batch in batches:
        found = torch.zeros(batch.n, dtype=torch.int64, device=batch.batch.device)
        for m, x in batch.x.items():
            if m not in sums:
                sums[m] = _Sums(len(layout.batches), x.n_columns, x.values.device)
            sums[m].add(x, batch.batch if x.rows is None else batch.batch[x.rows])
            found[slice(None) if x.rows is None else x.rows] += numbers[m]
        present += torch.bincount(found, minlength=len(present)).cpu()
    return {m: each.facts() for m, each in sums.items()}, present


def commonest_visible(present: Tensor, visible_sets: str) -> Tensor:
    """``(K,)`` bool: the set of modalities that training leaves visible most often.

    ``present`` is that of :func:`learn`; a cell with several modalities loses one of them (or shows any set of them).
    """
    k = len(present).bit_length() - 1
    shown = torch.zeros(len(present))
    for number in range(1, len(present)):
        own = [j for j in range(k) if number >> j & 1]
        sets = [number]
        if visible_sets == "any":
            sets = [s for s in range(1, len(present)) if s & number == s]
        elif visible_sets == "one hidden" and len(own) > 1:
            sets = [number - 2**j for j in own]
        for each in sets:
            shown[each] += float(present[number]) / len(sets)
    best = int(shown.argmax())
    return torch.tensor([bool(best >> j & 1) for j in range(k)])
