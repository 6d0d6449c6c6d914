"""Likelihoods of counts and of open peaks, evaluated where the numbers are.

Log-likelihoods are split into a part over all features, which is closed and cheap at zeros, and a part over the
non-zeros alone (``x`` is sparse): Poisson ``sum exp(eta) - sum_nz x eta + sum_nz log x!``; Bernoulli
``sum softplus(l) - sum_nz l``. Losses are computed in float32 whatever the precision of the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from headless.data.minibatch import TileRows


class Likelihood(ABC):
    """A distribution for each cell and feature, parameters ``(n, D)``."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Expected values, ``(n, D)``."""

    @abstractmethod
    def nll(self, x: TileRows) -> Tensor:
        """Exact negative log-likelihood summed over measured features and cells (a scalar)."""

    @abstractmethod
    def loss(self, x: TileRows) -> Tensor:
        """:meth:`nll` without what does not depend on parameters; same gradients, less work."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, ``(n, D)``."""


#: log x! of small counts, which are nearly all counts. Not by torch.lgamma: called at import, before the readers'
#: libraries are loaded, it left every later operation of the process ten times slower (torch 2.13, CPU).
_FACTORIALS = torch.tensor([math.lgamma(number) for number in range(1, 1026)])


def log_factorial(x: Tensor) -> Tensor:
    """``log x!`` of counts (of any non-negative number): the part of a likelihood that no parameter moves."""
    if x.is_cuda or x.numel() == 0 or float(x.max()) >= len(_FACTORIALS) or bool((x != x.floor()).any()):
        return torch.lgamma(x + 1)
    return _FACTORIALS[x.long()]


class _SparseLoss(torch.autograd.Function):
    """``sum mask f(eta) - sum_nz x eta`` with gradient ``mask f'(eta) - x``, for f = exp or softplus.

    One dense pass forward, none backward: ``f'`` is kept instead of ``eta``.
    """

    @staticmethod
    def forward(ctx: Any, eta: Tensor, flat: Tensor, values: Tensor, mask: Tensor | None, kind: str) -> Tensor:
        eta = eta.float()
        if kind == "exp":
            slope = eta.exp()
            dense = slope
        else:
            dense = softplus(eta)
            slope = torch.sigmoid(eta)
        if mask is not None:
            dense = dense * mask
            slope = slope * mask
        picked = eta.reshape(-1)[flat]
        total = dense.sum() - (values * picked).sum()
        gradient = slope.contiguous()
        # A cell-feature pair is stored once, so subtraction at the non-zeros needs no accumulation.
        gradient.view(-1)[flat] -= values
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None


class Poisson(Likelihood):
    """Counts with rate ``exp(log_rate)`` (MIDAS; its sheet, section 2.1)."""

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate

    @property
    def mean(self) -> Tensor:
        return self.log_rate.float().exp()

    def loss(self, x: TileRows) -> Tensor:
        return _SparseLoss.apply(self.log_rate, x.flat, x.values, x.mask, "exp")  # type: ignore[no-any-return, no-untyped-call]

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x) + log_factorial(x.values).sum()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(self.mean, generator)


class Bernoulli(Likelihood):
    """Open or closed peaks with probability ``sigmoid(logit)``; values are binarised at 0.5."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit.float())

    def loss(self, x: TileRows) -> Tensor:
        return _SparseLoss.apply(self.logit, x.flat, (x.values > 0.5).float(), x.mask, "softplus")  # type: ignore[no-any-return, no-untyped-call]

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean, generator=generator)


class SquaredError(Likelihood):
    """Continuous values with unit variance: ``sum (t - mean)^2`` over measured features (Multigrate's ``mse``).

    Parameters
    ----------
    fitted
        ``(n, D)``: expected values on the scale of training.
    forward
        Takes measured rows to that scale, zeros to zeros.
    back
        Takes fitted values to the scale on which they are reported.
    """

    def __init__(
        self,
        fitted: Tensor,
        forward: Callable[[TileRows], TileRows] = lambda x: x,
        back: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.fitted = fitted
        self.forward = forward
        self.back = back

    @property
    def mean(self) -> Tensor:
        return self.back(self.fitted.float())

    def loss(self, x: TileRows) -> Tensor:
        error = (self.fitted.float() - self.forward(x).dense).square()
        return (error if x.mask is None else error * x.mask).sum()

    def nll(self, x: TileRows) -> Tensor:
        return self.loss(x)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.fitted.shape, generator=generator, device=self.fitted.device)
        return self.back(self.fitted.float() + noise * 0.5**0.5)
