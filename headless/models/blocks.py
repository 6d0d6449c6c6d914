"""Building blocks of networks, shared by the methods: sparse first layers, grouped layers, dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, mish

from headless.data.minibatch import TileRows


class _SparseProduct(torch.autograd.Function):
    """``A W`` for a sparse ``A`` without gradient, on the CPU through scipy's compiled kernels.

    torch's own CSR product needs four times as long backward on the CPU (2026, torch 2.13: 11.5 against 3.4 ms for
    256 x 2 000 at 6 % by 1 024).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        import scipy.sparse as sp

        shape = (len(indptr) - 1, len(weight))
        matrix = sp.csr_matrix((values.numpy(), columns.numpy(), indptr.numpy()), shape=shape, copy=False)
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return torch.from_numpy(ctx.matrix.T.tocsr() @ upstream[0].contiguous().numpy()), None, None, None


def sparse_product(weight: Tensor, indptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``A W`` for a CSR matrix ``A`` ``(n, in)`` without gradient and a dense ``W`` ``(in, out)``, on the CPU."""
    product: Tensor = _SparseProduct.apply(weight, indptr, columns, values)  # type: ignore[no-untyped-call]
    return product


class SparseLinear(nn.Module):
    """A linear layer whose input is sparse: ``y = x W + b`` with ``W`` stored ``(in, out)``, so that rows are gathered.

    Initialised like :class:`torch.nn.Linear`. Used sparse on the CPU while less than ``sparse_below`` of the input is
    non-zero; dense otherwise and on a GPU.
    """

    sparse_below = 0.2

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))

    def forward(self, x: TileRows) -> Tensor:
        density = len(x.values) / max(1, x.n_rows * x.n_columns)
        if x.values.is_cuda or density > self.sparse_below:
            return x.dense @ self.weight + self.bias
        product: Tensor = _SparseProduct.apply(self.weight, x.indptr, x.columns, x.values)  # type: ignore[no-untyped-call]
        return product + self.bias


class ChunkedSparseLinear(nn.Module):
    """One linear layer a chunk of neighbouring features (chromosome): ``(n, sum P_k)`` to ``(n, K, out)``.

    On the CPU it is one sparse product: as columns are sorted by chunk, the CSR matrix of ``n`` rows is at the same
    time one of ``n K`` rows, each the part of a cell in a chunk.
    """

    def __init__(self, sizes: tuple[int, ...], n_out: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.n_out = n_out
        bounds = torch.tensor([1 / math.sqrt(size) for size in sizes])
        per_feature = torch.repeat_interleave(bounds, torch.tensor(sizes))
        self.weight = nn.Parameter((torch.rand(sum(sizes), n_out) * 2 - 1) * per_feature[:, None])
        self.bias = nn.Parameter((torch.rand(len(sizes), n_out) * 2 - 1) * bounds[:, None])
        ends = torch.cumsum(torch.tensor(sizes), 0)
        self.register_buffer("_starts", torch.cat([ends.new_zeros(1), ends[:-1]]), persistent=False)

    def forward(self, x: TileRows) -> Tensor:
        if x.values.is_cuda:
            parts = torch.split(x.dense, list(self.sizes), dim=1)
            weights = torch.split(self.weight, list(self.sizes), dim=0)
            out = torch.stack([part @ weight for part, weight in zip(parts, weights, strict=True)], dim=1)
            return out + self.bias
        # The place where chunk k of row i starts in the sorted columns.
        starts: Tensor = self._starts  # type: ignore[assignment]
        grid = (torch.arange(x.n_rows)[:, None] * x.n_columns + starts[None]).reshape(-1)
        indptr = torch.cat([torch.searchsorted(x.flat, grid), torch.tensor([len(x.values)])])
        product: Tensor = _SparseProduct.apply(self.weight, indptr, x.columns, x.values)  # type: ignore[no-untyped-call]
        return product.view(x.n_rows, len(self.sizes), self.n_out) + self.bias


class GroupedLinear(nn.Module):
    """``G`` linear layers of one shape as one batched product: ``(G, n, in)`` to ``(G, n, out)``."""

    def __init__(self, groups: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(groups, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor, groups: list[int] | None = None) -> Tensor:
        weight, bias = (self.weight, self.bias) if groups is None else (self.weight[groups], self.bias[groups])
        return torch.baddbmm(bias, x, weight)


def _keep(x: Tensor, p: float) -> Tensor:
    """A dropout mask, 1 / (1 - p) where kept; on the CPU four entries are cut from each 64-bit random number.

    The share is exact to 1/65 536. torch's own draws a number for each element, which cost a tenth of a MIDAS step.
    """
    n = x.numel()
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[:n].view(x.shape) >= round((p - 0.5) * 65536)
    return keep.to(x.dtype).mul_(1 / (1 - p))


class _MishDropout(torch.autograd.Function):
    """``dropout(mish(x))`` on the CPU with one exponential forward and one product backward.

    With s = 1 + e^x and r = 1 / (1 + s^2): mish(x) = x (1 - 2 r) and mish'(x) = 1 - 2 r + 4 x r^2 (s^2 - s).
    torch's mish takes a logarithm, an exponential and a hyperbolic tangent each way, three times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        s = x.clamp(max=20.0).exp_().add_(1.0)  # beyond 20, mish(x) = x in float32
        q = s.square()
        r = (q + 1.0).reciprocal_()
        xr = x * r
        slope = torch.addcmul(r.mul(-2.0).add_(1.0), xr * r, q.sub_(s), value=4.0)
        y = torch.sub(x, xr, alpha=2.0)
        if p > 0:
            keep = _keep(x, p)
            y.mul_(keep)
            slope.mul_(keep)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return upstream[0] * slope, None


def mish_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Mish (Misra, BMVC 2020), then inverted dropout."""
    if training and not x.is_cuda and x.dtype == torch.float32:
        return _MishDropout.apply(x, p)  # type: ignore[no-any-return, no-untyped-call]
    return dropout(mish(x), p, training)


class Block(nn.Module):
    """LayerNorm, Mish, dropout (MIDAS, section 3); ``groups`` keeps one affine LayerNorm a group."""

    def __init__(self, width: int, p: float, groups: int | None = None) -> None:
        super().__init__()
        shape = (width,) if groups is None else (groups, 1, width)
        self.width = width
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.p = p

    def forward(self, x: Tensor, groups: list[int] | None = None) -> Tensor:
        if self.weight.dim() == 1:
            normed = layer_norm(x, (self.width,), self.weight, self.bias)
        else:
            weight, bias = (self.weight, self.bias) if groups is None else (self.weight[groups], self.bias[groups])
            normed = layer_norm(x, (self.width,)) * weight + bias
        return mish_dropout(normed, self.p, self.training)
