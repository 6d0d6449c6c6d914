"""The likelihoods of scVAEIT, a sum for each row so that rows of different terms are computed together.

Counts are negative binomial by mean and dispersion, variance ``mean + phi mean^2``; a zero costs
``log(1 + phi mean) / phi``, so lgamma is needed at the non-zeros alone. The head ``s = sigmoid(output)`` is read as
the log-normalised value ``s * top``, ``top = ln 10 001`` for all of a cell's counts in one feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from headless.data.minibatch import TileRows
from headless.models.likelihoods import Likelihood, log_factorial

#: Bounds of the dispersion; the lower one keeps 1 / phi within what float32 differences of lgamma can bear.
LEAST_PHI, MOST_PHI = 1e-3, 6.0
#: Probabilities of open peaks stay within [1e-5, 1 - 1e-5].
MOST_LOGIT = 11.512915
_TINY = 1e-30


class _CountsLoss(torch.autograd.Function):
    """Negative log-likelihood of each row without constants, and its gradients, in one pass.

    ``depth`` ``(n, 1)``: mean = depth expm1(top s), counts; ``None``: mean = top s, log-normalised values.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, phi: Tensor, depth: Tensor | None, top: float, x: TileRows, mask: Tensor | None
    ) -> Tensor:
        s, phi = torch.sigmoid(output.float()), phi.float()
        slope = (1 - s).mul_(s)
        if depth is None:
            mu = s * top
            slope.mul_(top)
        else:
            mu = torch.expm1(s * top)
            slope.mul_(mu + 1).mul_(depth * top)
            mu.mul_(depth)
        q = (mu * phi).add_(1)
        # log1p is twice as slow as log on the CPU; where q is 1 in float32 the cost is below 1e-7 mean.
        cost = q.log().div_(phi)
        gradient = slope.div_(q)
        flat, values = x.flat, x.values
        mu_nz, q_nz = mu.view(-1)[flat].clamp_(min=_TINY), q.view(-1)[flat]
        theta = 1 / phi
        whole = phi.shape[0] > 1
        where = flat if whole else x.columns.long()
        phi_nz, theta_nz = phi.reshape(-1)[where], theta.reshape(-1)[where]
        at_theta = torch.lgamma(theta_nz) if whole else torch.lgamma(theta).view(-1)[where]
        at = torch.lgamma(values + theta_nz) - at_theta + values * torch.log(mu_nz * phi_nz / q_nz)
        to_phi = None
        if ctx.needs_input_grad[1]:
            to_phi = (mu / q).sub_(cost).div_(phi)
        # Zero part plus non-zeros: (mean - x) / (mean (1 + phi mean)) of the mean.
        gradient.view(-1)[flat] -= gradient.view(-1)[flat] * values / mu_nz
        if to_phi is not None:
            digamma = torch.digamma(theta_nz) if whole else torch.digamma(theta).view(-1)[where]
            change = (torch.digamma(values + theta_nz) - digamma) * theta_nz - values + values * mu_nz * phi_nz / q_nz
            to_phi.view(-1)[flat] += change * theta_nz
        if mask is not None:
            for part in (cost, gradient, to_phi):
                if part is not None:
                    part.mul_(mask)
        ctx.shape = phi.shape
        ctx.save_for_backward(gradient, to_phi)
        return cost.sum(1).index_add_(0, x.row_ids, at, alpha=-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradient, to_phi = ctx.saved_tensors
        up = upstream[0][:, None]
        if to_phi is not None:
            to_phi = (up.t() @ to_phi) if ctx.shape[0] == 1 else to_phi * up
        return gradient * up, to_phi, None, None, None, None


class _PeaksLoss(torch.autograd.Function):
    """``sum mask softplus(l) - sum_nz l`` for each row."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, flat: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        logit = logit.float()
        cost, slope = softplus(logit), torch.sigmoid(logit)
        if mask is not None:
            cost, slope = cost.mul_(mask), slope.mul_(mask)
        total = cost.sum(1).index_add_(0, rows, logit.reshape(-1)[flat], alpha=-1)
        slope.view(-1)[flat] -= 1
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
        Dispersion, ``(1, D)`` or ``(n, D)``, within [1e-3, 6].
    library
        ``(n,)``: counts of each cell over all features.
    top
        What s = 1 stands for on the log-normalised scale.
    lognorm
        Is the negative binomial one of log-normalised values (continued to reals, as in the published code)?
    """

    def __init__(self, output: Tensor, phi: Tensor, library: Tensor, top: float, lognorm: bool = False) -> None:
        self.output, self.phi, self.library, self.top, self.lognorm = output, phi, library, top, lognorm

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

    def rows(self, x: TileRows, mask: Tensor | None) -> Tensor:
        """``(n,)`` loss of each cell over the features of ``mask``; ``x`` stores nothing outside it."""
        depth = None if self.lognorm else self.depth
        found: Tensor = _CountsLoss.apply(self.output, self.phi, depth, self.top, self.target(x), mask)  # type: ignore[no-untyped-call]
        return found

    def constants(self, x: TileRows) -> Tensor:
        """``(n,)``: what :meth:`rows` leaves out of the negative log-likelihood."""
        zeros = torch.zeros(x.n_rows, device=x.values.device)
        return zeros.index_add_(0, x.row_ids, log_factorial(self.target(x).values))

    def loss(self, x: TileRows) -> Tensor:
        return self.rows(x, x.mask).sum()

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x) + self.constants(x).sum()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        phi = self.phi.float()
        shape = (1 / phi).expand_as(self.output).contiguous()
        if not self.lognorm:
            rate: Tensor = torch._standard_gamma(shape, generator=generator) * phi * self.mean
            return torch.poisson(rate, generator)
        level = torch._standard_gamma(shape, generator=generator) * phi * torch.sigmoid(self.output.float()) * self.top
        return torch.expm1(torch.poisson(level, generator)) * self.depth


class Peaks(Likelihood):
    """Open or closed peaks; values are binarised at 0.5, probabilities kept within [1e-5, 1 - 1e-5]."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit.clamp(-MOST_LOGIT, MOST_LOGIT)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit.float())

    def rows(self, x: TileRows, mask: Tensor | None) -> Tensor:
        """``(n,)`` loss of each cell over the features of ``mask``; ``x`` stores nothing outside it."""
        is_open = x.values > 0.5
        found: Tensor = _PeaksLoss.apply(self.logit, x.flat[is_open], x.row_ids[is_open], mask)  # type: ignore[no-untyped-call]
        return found

    def constants(self, x: TileRows) -> Tensor:
        """``(n,)`` zeros: nothing is left out."""
        return torch.zeros(x.n_rows, device=x.values.device)

    def loss(self, x: TileRows) -> Tensor:
        return self.rows(x, x.mask).sum()

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean, generator=generator)
