"""The likelihoods of scVAEIT, a sum for each row so that rows of different terms are computed together.

Counts are negative binomial by mean and dispersion, variance ``mean + phi mean^2``; a zero costs
``log(1 + phi mean) / phi``, so lgamma is needed at the non-zeros alone. The head ``s = sigmoid(output)`` is read as
the log-normalised value ``s * top``, ``top = ln 10 001`` for all of a cell's counts in one feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headless.data.minibatch import TileRows
from headless.models.likelihoods import Likelihood, log_factorial

#: Bounds of the dispersion; the lower one keeps 1 / phi within what float32 differences of lgamma can bear.
LEAST_PHI, MOST_PHI = 1e-3, 6.0
#: Probabilities of open peaks stay within [1e-5, 1 - 1e-5].
MOST_LOGIT = 11.512915
_TINY = 1e-30
_ONE = torch.ones(())
#: Numbers of a block of rows that is worked on at a time.
_BLOCK = 131_072


@dataclass(frozen=True)
class Mask:
    """Scored entries of stacked rows: those before ``start`` share the kind ``head``, the rest has a mask each.

    Attributes
    ----------
    start
        Number of rows of the head.
    head
        ``None`` (all entries), ``(D,)`` or ``(start, D)``.
    tail
        ``(n - start, D)``; ``None`` if there are no such rows.
    """

    start: int
    head: Tensor | None = None
    tail: Tensor | None = None

    @classmethod
    def like(cls, x: TileRows) -> Mask:
        """That of measured rows."""
        return cls(x.n_rows, x.mask)

    def of(self, rows: slice) -> Tensor | None:
        """The mask of some rows, all before or all after ``start``."""
        if rows.start >= self.start and self.tail is not None:
            return self.tail[rows.start - self.start : rows.stop - self.start]
        return self.head if self.head is None or self.head.dim() == 1 else self.head[rows]


def _blocks(n: int, d: int, cut: int, whole: bool) -> Iterator[slice]:
    """Rows in pieces of about 500 kB, cut where the kind of mask changes; on a GPU only there."""
    size = max(n, 1) if whole else max(1, _BLOCK // max(d, 1))
    for start, stop in ((0, min(cut, n)), (min(cut, n), n)):
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


class _CountsLoss(torch.autograd.Function):
    """Negative log-likelihood of each row without constants, and its gradients, in one pass.

    ``depth`` ``(n, 1)``: mean = depth expm1(top s), counts; ``None``: mean = top s, log-normalised values. Rows are
    taken a few at a time, so that what is computed of them stays in the processor's cache; with q = 1 + phi mean the
    slopes of a zero's cost ``log(q) / phi`` are ``1 / q`` (mean) and ``(1 - 1 / q - log q) / phi^2`` (phi).
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, phi: Tensor, group: Tensor | None, depth: Tensor | None, top: float, x: TileRows,
        mask: Mask,
    ) -> Tensor:  # fmt: skip
        output, phi = output.float(), phi.float()
        n, d = output.shape
        wanted = ctx.needs_input_grad[1]
        gradient, total = torch.empty_like(output), output.new_empty(n)
        to_phi = torch.empty_like(output) if wanted else None
        for rows in _blocks(n, d, mask.start, output.is_cuda):
            own = phi if group is None else phi[group[rows]]
            s = torch.sigmoid(output[rows])
            slope = torch.addcmul(s, s, s, value=-1, out=gradient[rows])
            if depth is None:
                q = torch.addcmul(_ONE.to(s.device), s.mul_(top), own)
            else:
                # exp - 1 loses digits where the mean is near 0 and so is the cost; non-zeros are computed below.
                grow = s.mul_(top).exp_()
                slope.mul_(grow)
                q = torch.addcmul(_ONE.to(s.device), grow.sub_(1).mul_(depth[rows]), own)
            inverse = q.reciprocal()
            slope.mul_(inverse)
            cost = q.log_()
            here = mask.of(rows)
            if here is not None:
                cost.mul_(here)
                slope.mul_(here)
            torch.sum(cost / own, 1, out=total[rows])
            if to_phi is not None:
                change = torch.sub(1, inverse, out=to_phi[rows])
                if here is not None:
                    change.mul_(here)
                change.sub_(cost)
        flat, values = x.flat, x.values
        s_nz = torch.sigmoid(output.view(-1).index_select(0, flat))
        where = x.columns.long() if group is None else group[x.row_ids] * d + x.columns
        phi_nz = phi.reshape(-1).index_select(0, where)
        theta_nz = 1 / phi_nz
        mu_nz = s_nz * top if depth is None else torch.expm1(s_nz * top) * depth.view(-1).index_select(0, x.row_ids)
        mu_nz.clamp_(min=_TINY)
        q_nz = 1 + phi_nz * mu_nz
        at = torch.lgamma(values + theta_nz) - torch.lgamma(theta_nz) + values * torch.log(mu_nz * phi_nz / q_nz)
        # Zero part plus non-zeros: (mean - x) / (mean (1 + phi mean)) of the mean.
        slopes = gradient.view(-1)
        slopes.index_add_(0, flat, slopes.index_select(0, flat) * values / mu_nz, alpha=-1)
        ctx.change = None
        if to_phi is not None:
            change = (torch.digamma(values + theta_nz) - torch.digamma(theta_nz)) * theta_nz
            ctx.change = (change - values + values * mu_nz * phi_nz / q_nz) * theta_nz, where, x.row_ids
        ctx.top = top
        ctx.save_for_backward(gradient, to_phi, phi, group, depth)
        return total.index_add_(0, x.row_ids, at, alpha=-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradient, to_phi, phi, group, depth = ctx.saved_tensors
        up = upstream[0]
        scale = up * ctx.top if depth is None else up * ctx.top * depth[:, 0]
        to_output, found = gradient * scale[:, None], None
        if to_phi is not None:
            if group is None:
                found = (up[None] @ to_phi) / phi.square()
            else:
                # One row a group: a product with the groups' indicators.
                belongs = torch.zeros(len(phi), len(up), device=up.device)
                belongs[group, torch.arange(len(up), device=up.device)] = up
                found = (belongs @ to_phi) / phi.square()
            change, where, row_ids = ctx.change
            found.view(-1).index_add_(0, where, change * up.index_select(0, row_ids))
        return to_output, found, None, None, None, None, None


class _PeaksLoss(torch.autograd.Function):
    """``sum mask softplus(l) - sum_nz l`` for each row, ``l`` kept within the bounds of probabilities."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, flat: Tensor, row_ids: Tensor, mask: Mask) -> Tensor:
        n, d = logit.shape
        slope, total = torch.empty_like(logit, dtype=torch.float32), torch.empty(n, device=logit.device)
        for rows in _blocks(n, d, mask.start, logit.is_cuda):
            # softplus(l) = l - log sigmoid(l), one transcendental less than softplus and sigmoid.
            own = logit[rows].float().clamp(-MOST_LOGIT, MOST_LOGIT)
            p = torch.sigmoid(own, out=slope[rows])
            cost = own.sub_(p.log())
            here = mask.of(rows)
            if here is not None:
                cost.mul_(here)
                p.mul_(here)
            torch.sum(cost, 1, out=total[rows])
        picked = logit.reshape(-1).index_select(0, flat).float()
        slope.view(-1).index_add_(0, flat, torch.ones_like(picked), alpha=-1)
        total.index_add_(0, row_ids, picked.clamp(-MOST_LOGIT, MOST_LOGIT), alpha=-1)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream[0][:, None], None, None, None


class Counts(Likelihood):
    """Negative binomial counts of a head.

    Parameters
    ----------
    output
        ``(n, D)`` before the sigmoid.
    phi
        Dispersion, ``(1, D)``, or ``(G, D)`` with ``group``, within [1e-3, 6].
    library
        ``(n,)``: counts of each cell over all features.
    top
        What s = 1 stands for on the log-normalised scale.
    lognorm
        Is the negative binomial one of log-normalised values (continued to reals, as in the published code)?
    group
        ``(n,)``: row of ``phi`` that holds for each cell; ``None`` = the only one.
    """

    def __init__(
        self, output: Tensor, phi: Tensor, library: Tensor, top: float, lognorm: bool = False,
        group: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.output, self.phi, self.library, self.top, self.lognorm = output, phi, library, top, lognorm
        self.group = group

    @property
    def depth(self) -> Tensor:
        """``(n, 1)``: counts that 1 of 10 000 stands for."""
        return (self.library / 1e4)[:, None]

    @property
    def mean(self) -> Tensor:
        """Expected counts ``(n, D)``: ``library / 1e4 expm1(s top)``."""
        return torch.expm1(torch.sigmoid(self.output.float()) * self.top) * self.depth

    def target(self, x: TileRows) -> TileRows:
        """What is scored: counts, or their log-normalised values."""
        if not self.lognorm:
            return x
        rate = 1 / self.depth.clamp(min=1e-8)
        return x.with_values(torch.log1p(x.values * rate[x.row_ids, 0]))

    def rows(self, x: TileRows, mask: Mask) -> Tensor:
        """``(n,)`` loss of each cell over the features of ``mask``; ``x`` stores nothing outside it."""
        depth, target = None if self.lognorm else self.depth, self.target(x)
        found: Tensor = _CountsLoss.apply(self.output, self.phi, self.group, depth, self.top, target, mask)  # type: ignore[no-untyped-call]
        return found

    def constants(self, x: TileRows) -> Tensor:
        """``(n,)``: what :meth:`rows` leaves out of the negative log-likelihood."""
        zeros = torch.zeros(x.n_rows, device=x.values.device)
        return zeros.index_add_(0, x.row_ids, log_factorial(self.target(x).values))

    def loss(self, x: TileRows) -> Tensor:
        return self.rows(x, Mask.like(x)).sum()

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x) + self.constants(x).sum()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        phi = self.phi.float() if self.group is None else self.phi.float()[self.group]
        shape = (1 / phi).expand_as(self.output).contiguous()
        if not self.lognorm:
            rate: Tensor = torch._standard_gamma(shape, generator=generator) * phi * self.mean
            return torch.poisson(rate, generator)
        level = torch._standard_gamma(shape, generator=generator) * phi * torch.sigmoid(self.output.float()) * self.top
        return torch.expm1(torch.poisson(level, generator)) * self.depth


class Peaks(Likelihood):
    """Open or closed peaks; values are binarised at 0.5, probabilities kept within [1e-5, 1 - 1e-5]."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit.float().clamp(-MOST_LOGIT, MOST_LOGIT))

    def rows(self, x: TileRows, mask: Mask) -> Tensor:
        """``(n,)`` loss of each cell over the features of ``mask``; ``x`` stores nothing outside it."""
        is_open = x.values > 0.5
        found: Tensor = _PeaksLoss.apply(self.logit, x.flat[is_open], x.row_ids[is_open], mask)  # type: ignore[no-untyped-call]
        return found

    def constants(self, x: TileRows) -> Tensor:
        """``(n,)`` zeros: nothing is left out."""
        return torch.zeros(x.n_rows, device=x.values.device)

    def loss(self, x: TileRows) -> Tensor:
        return self.rows(x, Mask.like(x)).sum()

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean, generator=generator)
