"""The networks of scVAEIT, layer by layer as in section 3 of its sheet.

First and last layers are stored ``(in, out)`` by modality, and those of chromosomes side by side, so that one product
serves all of them; the numbers of parameters and the functions are those of the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, leaky_relu

from headless.data.minibatch import TileRows
from headless.models.blocks import SparseLinear, sparse_product

SLOPE = 0.3


@dataclass(frozen=True)
class Widths:
    """One modality's part: sizes of its blocks (chromosomes), width ``e`` and mask-embedding width ``E`` of each."""

    sizes: tuple[int, ...]
    width: int
    mask: int

    @property
    def groups(self) -> int:
        """Number of blocks."""
        return len(self.sizes)

    @property
    def features(self) -> int:
        """Features of all blocks."""
        return sum(self.sizes)


def glorot(shape: tuple[int, ...], n_in: int, n_out: int) -> nn.Parameter:
    """Uniform within ``sqrt(6 / (n_in + n_out))`` (Glorot and Bengio, AISTATS 2010)."""
    bound = math.sqrt(6 / (n_in + n_out))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def dense(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer started as Keras does: Glorot-uniform, biases zero."""
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SplitNorm(nn.Module):
    """Batch normalisation of several groups of rows at once, each by its own statistics (Keras: momentum .99).

    The groups are views of the same cells, stacked; the running statistics take in one after the other.
    """

    def __init__(self, width: int, shift: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shift else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, groups: int) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        # One row has no variance: it is normalised by what is known.
        training = self.training and len(x) > groups
        parts = x.chunk(groups) if training else (x,)
        out = [batch_norm(part, mean, var, self.weight, self.bias, training, 0.01, 1e-3) for part in parts]
        return torch.cat(out) if len(out) > 1 else out[0]


class Trunk(nn.Module):
    """Linear, LeakyReLU, batch normalisation, for each width."""

    def __init__(self, widths: list[int], shift: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(dense(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(SplitNorm(width, shift) for width in widths[1:])

    def forward(self, x: Tensor, groups: int) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(leaky_relu(linear(x), SLOPE), groups)
        return x


class MaskEmbedding(nn.Module):
    """tanh(Dense(mask)), the mask being 1 where a feature is missing or hidden.

    The product is a sum over modalities: of the column sums where a modality is missing as a whole, and of the rows of
    the missing features where single ones are.
    """

    def __init__(self, parts: dict[str, Widths]) -> None:
        super().__init__()
        self.total = sum(part.mask * part.groups for part in parts.values())
        n = sum(part.features for part in parts.values())
        self.weights = nn.ParameterDict({m: glorot((p.features, self.total), n, self.total) for m, p in parts.items()})
        self.bias = nn.Parameter(torch.zeros(self.total))

    def rows(self, m: str, n_rows: int, base: Tensor | None, codes: Tensor, parts: Tensor) -> Tensor:
        """``(n_rows + k + 1, total)`` before the bias: measured rows, partly visible rows, and one with nothing.

        Parameters
        ----------
        base
            Mask of the measured rows (1 = measured), ``(D,)``, ``(n_rows, D)`` or ``None``.
        codes
            ``(n_rows,)`` batch codes: rows of a batch mostly share a mask, which is then multiplied once.
        parts
            ``(k, D)``: masks of partly visible rows.
        """
        weight = self.weights[m]
        whole = weight.sum(0, keepdim=True)
        if base is None:
            found = torch.zeros(n_rows, self.total, dtype=whole.dtype, device=whole.device)
        elif base.dim() == 1:
            found = ((1 - base) @ weight)[None].expand(n_rows, -1)
        else:
            found = self._by_pattern(base, codes, weight)
        pieces = [found, whole]
        if len(parts):
            pieces.insert(1, (1 - parts) @ weight)
        return torch.cat(pieces)

    @staticmethod
    def _by_pattern(base: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
        _, which = torch.unique(codes, return_inverse=True)
        first = torch.full((int(which.max()) + 1,), len(which), device=which.device)
        first.scatter_reduce_(0, which, torch.arange(len(which), device=which.device), "amin")
        patterns = base[first]
        if torch.equal(patterns[which], base):
            return ((1 - patterns) @ weight)[which]
        return (1 - base) @ weight

    def finish(self, total: Tensor) -> Tensor:
        """The embedding from the sum over modalities."""
        return torch.tanh(total + self.bias)


class EncoderBlocks(nn.Module):
    """One modality: [x, mask embedding, covariates] to LeakyReLU(Dense without bias), a block a chromosome."""

    def __init__(self, part: Widths, n_covariates: int) -> None:
        super().__init__()
        self.part = part
        groups, e, w = part.groups, part.width, part.mask
        fans = [size + w + n_covariates for size in part.sizes]
        self.x = nn.Parameter(torch.cat([glorot((n, e), fan, e).data for n, fan in zip(part.sizes, fans, strict=True)]))
        self.mask = nn.Parameter(torch.stack([glorot((w, e), fan, e).data for fan in fans]))
        covariates = [glorot((n_covariates, e), fan, e).data for fan in fans] if n_covariates else []
        self.covariates = nn.Parameter(torch.cat(covariates, 1)) if n_covariates else None
        ends = torch.cumsum(torch.tensor(part.sizes), 0)
        self.register_buffer("_starts", torch.cat([ends.new_zeros(1), ends[:-1]]), persistent=False)
        self.groups = groups

    def product(self, x: TileRows) -> Tensor:
        """``x W``, ``(n, groups * e)``; sparse where that pays."""
        density = len(x.values) / max(1, x.n_rows * x.n_columns)
        if x.values.is_cuda or density > SparseLinear.sparse_below:
            parts = torch.split(x.dense, list(self.part.sizes), dim=1)
            weights = torch.split(self.x, list(self.part.sizes))
            return torch.cat([a @ w for a, w in zip(parts, weights, strict=True)], dim=1)
        indptr = x.indptr
        if self.groups > 1:
            # Columns are sorted by chromosome, so the CSR matrix of n rows is one of n x groups rows, too.
            grid = (torch.arange(x.n_rows)[:, None] * x.n_columns + self.get_buffer("_starts")[None]).reshape(-1)
            indptr = torch.cat([torch.searchsorted(x.flat, grid), torch.tensor([len(x.values)])])
        return sparse_product(self.x, indptr, x.columns, x.values).view(x.n_rows, -1)

    def forward(self, product: Tensor, embedding: Tensor, covariates: Tensor | None) -> Tensor:
        """Activations ``(n, groups * e)`` from ``x W``, this modality's part of the mask embedding, covariates."""
        if self.groups == 1:
            total = torch.addmm(product, embedding, self.mask[0])
        else:
            shaped = embedding.view(len(embedding), self.groups, -1).transpose(0, 1)
            total = product + torch.bmm(shaped, self.mask).transpose(0, 1).reshape(product.shape)
        if self.covariates is not None and covariates is not None:
            total = torch.addmm(total, covariates, self.covariates)
        return leaky_relu(total, SLOPE)


class _BlockProduct(torch.autograd.Function):
    """``h_k W_k + b`` for every block k, written side by side into one matrix."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
        weight = weight.to(h.dtype)
        ctx.sizes = sizes
        ctx.save_for_backward(h, weight)
        out = h.new_empty(len(h), sum(sizes))
        width, start = h.shape[1] // len(sizes), 0
        for k, size in enumerate(sizes):
            cut = slice(start, start + size)
            torch.mm(h[:, k * width : (k + 1) * width], weight[:, cut], out=out[:, cut])
            start += size
        return out.add_(bias.to(h.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        h, weight = ctx.saved_tensors
        up = upstream[0].to(h.dtype)
        to_h, to_weight = torch.empty_like(h), torch.empty_like(weight)
        width, start = h.shape[1] // len(ctx.sizes), 0
        for k, size in enumerate(ctx.sizes):
            cut, part = slice(start, start + size), slice(k * width, (k + 1) * width)
            torch.mm(up[:, cut], weight[:, cut].t(), out=to_h[:, part])
            torch.mm(h[:, part].t(), up[:, cut], out=to_weight[:, cut])
            start += size
        return to_h, to_weight.float(), up.sum(0).float(), None


class OutputBlocks(nn.Module):
    """One modality: trunk to LeakyReLU(Dense(d)), plus the encoder's activations, to a number a feature."""

    def __init__(self, part: Widths, n_trunk: int) -> None:
        super().__init__()
        self.part = part
        d = part.width
        # A Dense layer a block, side by side: each has its own fan.
        self.first = nn.Parameter(torch.cat([glorot((n_trunk, d), n_trunk, d).data for _ in part.sizes], 1))
        self.first_bias = nn.Parameter(torch.zeros(d * part.groups))
        self.last = nn.Parameter(torch.cat([glorot((d, n), d, n).data for n in part.sizes], 1))
        self.last_bias = nn.Parameter(torch.zeros(part.features))

    def forward(self, trunk: Tensor, skip: Tensor | None) -> Tensor:
        h = leaky_relu(torch.addmm(self.first_bias, trunk, self.first), SLOPE)
        if skip is not None:
            h = h + skip
        if self.part.groups == 1:
            return torch.addmm(self.last_bias, h, self.last)
        out: Tensor = _BlockProduct.apply(h, self.last, self.last_bias, self.part.sizes)  # type: ignore[no-untyped-call]
        return out
