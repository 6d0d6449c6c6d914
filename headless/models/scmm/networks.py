"""The networks of scMM, layer by layer as in section 3 of its sheet, and the rows of cells that they see.

Numbers of parameters and functions are those of the original: Linear, BatchNorm, ReLU, ``layers`` times, then heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from headless.data.minibatch import TileRows
from headless.models.blocks import SparseLinear

#: Bound of every raw output that is exponentiated or softmaxed.
RAW = 12.0
#: Logit of 1e-8: probabilities are kept between it and its mirror.
LOGIT = 18.420681
#: Counts are normalised to this library size.
SCALE = 10_000.0


def bounded(values: Tensor, bound: float) -> Tensor:
    """``clamp(values, -bound, bound)``; on the CPU the pass is spared (forward and backward) where nothing is cut."""
    if not values.is_cuda and values.numel():
        low, high = torch.aminmax(values.detach())
        if float(low) >= -bound and float(high) <= bound:
            return values
    return values.clamp(-bound, bound)


def take_rows(x: TileRows, rows: Tensor) -> TileRows:
    """Some rows of a tile, in the given order; ``rows`` of the answer are those of ``x`` (``None`` = all) picked."""
    starts = x.indptr[rows]
    lengths = x.indptr[rows + 1] - starts
    indptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(lengths, 0, out=indptr[1:])
    pick = torch.arange(int(indptr[-1]), device=rows.device)
    pick = pick + torch.repeat_interleave(starts - indptr[:-1], lengths)
    mask = x.mask[rows] if x.mask is not None and x.mask.dim() == 2 else x.mask
    own = rows if x.rows is None else x.rows[rows]
    return TileRows(own, indptr, x.columns[pick], x.values[pick], x.n_columns, mask)


class SplitBatchNorm(nn.BatchNorm1d):
    """BatchNorm over parts of the rows, one after the other, as if each part were a pass of its own.

    A part of a single row, of which no variance can be had, is normalised by the running statistics.
    """

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        if not self.training:
            return self._norm(x, False)
        parts = torch.split(x, list(sizes)) if sizes is not None and len(sizes) > 1 else (x,)
        done = [self._norm(part, len(part) > 1) for part in parts]
        return torch.cat(done) if len(done) > 1 else done[0]

    def _norm(self, x: Tensor, training: bool) -> Tensor:
        momentum = 0.1 if self.momentum is None else self.momentum
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps
        )


class BatchCode(nn.Module):
    """The rows of a first layer that see the one-hot batch: ``(n,)`` codes to ``(n, width)``.

    A batch that never had the modality has rows that were never trained; it gets the mean of those that had it.
    """

    def __init__(self, measured: Sequence[bool], n_in: int, width: int) -> None:
        super().__init__()
        n = len(measured)
        bound = (n_in + n) ** -0.5
        self.weight = nn.Parameter(torch.empty(n, width).uniform_(-bound, bound))
        seen = torch.tensor(list(measured), dtype=torch.float32)
        shares = torch.where(seen[:, None] > 0, torch.eye(n), seen[None] / seen.sum())
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        return (self.get_buffer("shares") @ self.weight)[batch]


class Trunk(nn.Module):
    """What follows the first linear layer: BatchNorm and ReLU, then ``layers - 1`` times Linear, BatchNorm, ReLU."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SplitBatchNorm(width) for _ in range(layers))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))

    def forward(self, h: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        h = relu(self.norms[0](h, sizes))
        for linear, norm in zip(self.linears, self.norms[1:], strict=True):
            h = relu(norm(linear(h), sizes))
        return h


class Encoder(nn.Module):
    """One modality to the raw parameters of its posterior."""

    def __init__(self, n_features: int, width: int, layers: int, dim: int, code: BatchCode | None) -> None:
        super().__init__()
        self.first = SparseLinear(n_features, width)
        self.code = code
        self.trunk = Trunk(width, layers)
        self.location = nn.Linear(width, dim)
        self.raw = nn.Linear(width, dim)

    def forward(self, x: TileRows, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Location and raw scale (bounded), each ``(m, dim)``, of normalised rows and their batch codes ``(m,)``."""
        h = self.first(x)
        if self.code is not None:
            h = h + self.code(batch)
        h = self.trunk(h)
        return self.location(h), bounded(self.raw(h), RAW)


class Decoder(nn.Module):
    """Latent states to the parameters of one modality's counts: log r, logit p and, if inflated, the gate's logit."""

    def __init__(
        self, n_features: int, width: int, layers: int, dim: int, code: BatchCode | None, inflated: bool
    ) -> None:
        super().__init__()
        self.first = nn.Linear(dim, width)
        self.code = code
        self.trunk = Trunk(width, layers)
        self.log_r = nn.Linear(width, n_features)
        self.logit = nn.Linear(width, n_features)
        self.gate = nn.Linear(width, n_features) if inflated else None

    def forward(self, z: Tensor, batch: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Parameters ``(m, n_features)``; ``sizes`` are the parts of the rows that BatchNorm sees apart."""
        h = self.first(z)
        if self.code is not None:
            h = h + self.code(batch)
        h = self.trunk(h, sizes)
        found = (bounded(self.log_r(h), RAW), bounded(self.logit(h), LOGIT))
        return found if self.gate is None else (*found, self.gate(h))
