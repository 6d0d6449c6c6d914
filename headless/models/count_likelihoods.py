"""Negative binomial counts, with and without extra zeros, evaluated where the numbers are.

With total count ``R > 0`` and logit ``l`` of the probability ``p`` (torch's convention) a zero costs ``R softplus(l)``,
closed and cheap; ``lgamma`` is needed at the non-zeros alone. Mean and inverse dispersion ``theta`` are the same law
with ``R = theta`` and ``l = log mean - log theta``. Gradients are written out, so nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from headless.data.minibatch import TileRows
from headless.models.likelihoods import Likelihood, log_factorial


def _pick(values: Tensor, x: TileRows) -> Tensor:
    """The entries of a tensor that broadcasts to ``(m, D)`` at the non-zeros."""
    if values.dim() == 2 and values.shape[0] > 1:
        return values.reshape(-1)[x.flat] if values.shape[1] > 1 else values.reshape(-1)[x.row_ids]
    return values.reshape(-1)[x.columns.long()] if values.numel() > 1 else values.reshape(-1).expand(len(x.values))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


class _NBLoss(torch.autograd.Function):
    """``sum mask R softplus(l) - sum_nz [lgamma(x + R) - lgamma(R) + x l]``, the last minus ``log x!`` being constant.

    ``x log p + R log(1 - p) = x l - (x + R) softplus(l)``, so the dense part takes ``R softplus(l)`` everywhere and the
    non-zeros add ``x softplus(l)``.
    """

    @staticmethod
    def forward(ctx: Any, total_count: Tensor, logits: Tensor, x: TileRows) -> Tensor:
        r, logit = total_count.float(), logits.float()
        cost = softplus(logit)
        r_nz, l_nz, cost_nz = _pick(r, x), _pick(logit, x), _pick(cost, x)
        dense = _masked(cost * r, x.mask).sum()
        at = torch.lgamma(x.values + r_nz) - torch.lgamma(r_nz) + x.values * (l_nz - cost_nz)
        ctx.x = x
        ctx.save_for_backward(r, logit, cost, r_nz)
        return dense - at.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        r, logit, cost, r_nz = ctx.saved_tensors
        x: TileRows = ctx.x
        p = torch.sigmoid(logit)
        to_r = to_l = None
        if ctx.needs_input_grad[1]:
            to_l = _masked(p * r, x.mask).expand(x.n_rows, x.n_columns).contiguous()
            # A cell-feature pair is stored once, so subtraction at the non-zeros needs no accumulation.
            to_l.view(-1)[x.flat] -= x.values * (1 - _pick(p, x))
            to_l = to_l.sum_to_size(logit.shape) * upstream[0]
        if ctx.needs_input_grad[0]:
            to_r = _masked(cost, x.mask).expand(x.n_rows, x.n_columns).clone()
            to_r.view(-1)[x.flat] -= torch.digamma(x.values + r_nz) - torch.digamma(r_nz)
            to_r = to_r.sum_to_size(r.shape) * upstream[0]
        return to_r, to_l, None


class _ZINBLoss(torch.autograd.Function):
    """Zero-inflated: a zero is ``logaddexp(h, -R softplus(l)) - softplus(h)``, ``h`` the logit of the gate."""

    @staticmethod
    def forward(ctx: Any, total_count: Tensor, logits: Tensor, gate: Tensor, x: TileRows) -> Tensor:
        r, logit, h = total_count.float(), logits.float(), gate.float()
        cost = softplus(logit)
        zero = cost * r
        either = torch.logaddexp(h.expand_as(zero), -zero)
        r_nz, l_nz, cost_nz = _pick(r, x), _pick(logit, x), _pick(cost, x)
        at = torch.lgamma(x.values + r_nz) - torch.lgamma(r_nz) + x.values * (l_nz - cost_nz) - r_nz * cost_nz
        dense = _masked(softplus(h) - either, x.mask).sum()
        ctx.x = x
        ctx.save_for_backward(r, logit, h, cost, zero, r_nz)
        return dense + _pick(either, x).sum() - at.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        r, logit, h, cost, zero, r_nz = ctx.saved_tensors
        x: TileRows = ctx.x
        # Share of the gate in the probability of a zero; nothing at the non-zeros.
        share = torch.sigmoid(h + zero)
        share.view(-1)[x.flat] = 0
        counted = (1 - share).view(-1)
        to_h = _masked(torch.sigmoid(h) - share, x.mask).sum_to_size(h.shape) * upstream[0]
        weight = _masked(counted.view_as(share), x.mask)
        p = torch.sigmoid(logit)
        to_l = (weight * p * r).contiguous()
        to_l.view(-1)[x.flat] -= x.values * (1 - _pick(p, x))
        to_r = (weight * cost).contiguous()
        to_r.view(-1)[x.flat] -= torch.digamma(x.values + r_nz) - torch.digamma(r_nz)
        return to_r.sum_to_size(r.shape) * upstream[0], to_l.sum_to_size(logit.shape) * upstream[0], to_h, None


class NegativeBinomial(Likelihood):
    """Counts with ``P(x) = Gamma(x + R) / (Gamma(R) x!) (1 - p)^R p^x``.

    Parameters
    ----------
    total_count
        ``R``, broadcasts to ``(n, D)``.
    logits
        Logit of ``p``, ``(n, D)``.
    """

    def __init__(self, total_count: Tensor, logits: Tensor) -> None:
        self.total_count = total_count
        self.logits = logits

    @classmethod
    def of_mean(cls, log_mean: Tensor, log_theta: Tensor) -> NegativeBinomial:
        """By mean ``(n, D)`` and inverse dispersion ``theta`` (variance ``mean + mean^2 / theta``), in logarithms."""
        log_theta = log_theta.float()
        return cls(log_theta.exp(), log_mean.float() - log_theta)

    @property
    def mean(self) -> Tensor:
        return self.total_count.float() * self.logits.float().exp()

    def loss(self, x: TileRows) -> Tensor:
        return _NBLoss.apply(self.total_count, self.logits, x)  # type: ignore[no-any-return, no-untyped-call]

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x) + log_factorial(x.values).sum()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        count = self.total_count.float().expand_as(self.logits)
        return torch.poisson(_gamma(count, generator) * self.logits.float().exp(), generator)


class ZeroInflatedNB(NegativeBinomial):
    """A negative binomial whose counts are lost with probability ``sigmoid(gate)``."""

    def __init__(self, total_count: Tensor, logits: Tensor, gate: Tensor) -> None:
        super().__init__(total_count, logits)
        self.gate = gate

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.gate.float()) * super().mean

    def loss(self, x: TileRows) -> Tensor:
        return _ZINBLoss.apply(self.total_count, self.logits, self.gate, x)  # type: ignore[no-any-return, no-untyped-call]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        kept = torch.bernoulli(torch.sigmoid(-self.gate.float()).expand_as(self.logits), generator=generator)
        return kept * super().sample(generator)


def _gamma(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard gamma draws; torch's own take a generator only in a private function."""
    drawn: Tensor = torch._standard_gamma(shape.contiguous(), generator=generator)
    return drawn
