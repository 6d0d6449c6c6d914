"""The model contract: what every method answers, and what every task relies on.

A method is a folder with a torch-free ``config.py`` (a :class:`headless.models.config.ModelConfig`) and a ``module.py``
with a :class:`Module`. Tasks, metrics and the loop are written once against this page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headless.data.minibatch import Minibatch
from headless.data.mosaic import Layout
from headless.models.config import ModelConfig
from headless.models.likelihoods import Likelihood


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over the latent variables of ``n`` cells.

    Attributes
    ----------
    mean, log_variance
        ``(n, d)``.
    parts
        Named slices of the ``d`` dimensions; ``biological`` names the one that is the embedding to show.
    context
        ``(n, k)``: what :meth:`Module.decode` should know of each cell besides its latent state (library sizes,
        covariates, visible data); ``None`` if nothing. It holds nothing of modalities that were not encoded.
    """

    mean: Tensor
    log_variance: Tensor
    parts: Mapping[str, slice] = field(default_factory=dict)
    biological: str = ""
    context: Tensor | None = None

    def part(self, name: str) -> Tensor:
        """The mean of one named part, ``(n, d_part)``."""
        return self.mean[:, self.parts[name]]


@dataclass
class Update:
    """One optimiser step that a training step asks the loop for.

    ``terms`` are named, already weighted losses (scalars); the loop sums, back-propagates, steps the optimiser
    ``optimizer`` and records the terms.
    """

    optimizer: str
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class OptimizerSpec:
    """Which parameters an optimiser owns, and how it steps."""

    parameters: Sequence[nn.Parameter]
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


class Module(nn.Module, ABC):
    """A method's network. Built from a configuration and a layout; knows nothing of files, devices or loops."""

    config: ModelConfig
    layout: Layout
    #: Named slices of the latent dimensions, and the one that is the embedding.
    parts: Mapping[str, slice]
    biological: str
    #: Can :meth:`decode` not do without the context of the posterior?
    needs_context: bool = False
    #: Context in which networks (never losses) are computed; the loop sets it to the precision of the run.
    autocast: Callable[[], AbstractContextManager[Any]] = staticmethod(nullcontext)

    @abstractmethod
    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        """Named, weighted terms of the objective (scalars); their sum is what training lowers."""

    @abstractmethod
    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        """The posterior given the ``modalities`` that a cell has (all of them if ``None``).

        Cells of the minibatch that have none of ``modalities`` get the prior; callers leave them out.
        """

    @abstractmethod
    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        """The likelihood of a modality given latent means ``(n, d)`` and batch codes ``(n,)``.

        ``context`` is that of the posterior; without it a method takes what is typical of the training data (the
        median library size, the commonest covariates), unless it ``needs_context``.
        """

    def prepare(self, batches: Iterable[Minibatch]) -> None:
        """Called once before training with all training cells: learn what is fixed (library sizes, feature means).

        What is learnt must be kept in buffers, so that it is saved with the weights.
        """

    def optimizers(self) -> dict[str, OptimizerSpec]:
        """Optimisers by name, in no particular order; one over everything by default."""
        rate, decay = float(self.config.lr), float(self.config.weight_decay)
        return {"model": OptimizerSpec(list(self.parameters()), rate, decay)}

    def training_step(self, batch: Minibatch) -> Iterator[Update]:
        """The updates of one step, in order; the loop carries each out before it asks for the next."""
        yield Update("model", self.loss(batch))

    def monitor(self, terms: Mapping[str, float]) -> float:
        """The number that early stopping watches (lower is better), from the validation terms."""
        return sum(terms.values())

    def corrected(self, latent: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``(N, d)`` and batch codes ``(N,)`` of *all* cells with technical effects made equal.

        Decoding what this returns is batch-corrected expression. By default every cell is given the code of the
        largest batch.
        """
        counts = torch.bincount(batch, minlength=len(self.layout.batches))
        return latent, torch.full_like(batch, int(counts.argmax()))

    def standard_mean(self, latent: Tensor, modality: str, batch: Tensor) -> Tensor:
        """Expected values ``(n, D)`` at a library of 10,000 where the method has libraries; as decoded otherwise."""
        return self.decode(latent, modality, batch).mean

    def prior_sd(self, kind: Literal["faithful", "corrected"] = "corrected") -> Tensor:
        """``(d,)``: standard deviations of the prior; a method whose paper's code takes others says so.

        ``faithful`` are those of the published code, where they differ from the true ones.
        """
        return torch.ones(max(int(part.stop) for part in self.parts.values()))

    def start_epoch(self, epoch: int, step: int, total_steps: int) -> None:
        """Called before each epoch: schedules of weights and rates that depend on progress."""

    def extra_state(self) -> dict[str, Any]:
        """JSON-ready state besides the weights that an exact resume needs."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""
