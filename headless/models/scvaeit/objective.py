"""What the objectives of scVAEIT are made of: views of a cell, and what is decoded from which (sheet, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headless.models.scvaeit.config import ScVaeitConfig


def kl_between(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """``(n,)``: KL(N(mean, .) || N(other_mean, .)); differences of log-variances are cut at 6 (sheet, 4.2)."""
    difference = (log_variance - other_log_variance).clamp(-6, 6)
    apart = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (difference.exp() + apart - 1 - difference).sum(1)


@dataclass
class Views:
    """What the encoder made of several views of the same ``n`` cells, stacked.

    Attributes
    ----------
    names
        The views, in the order in which they are stacked.
    mean, log_variance
        ``(len(names) n, K)``.
    embedding
        ``(len(names) n, sum E)`` mask embeddings.
    activations
        Modality -> ``(len(names) n, d)``, what the skip hands on.
    """

    names: tuple[str, ...]
    n: int
    mean: Tensor
    log_variance: Tensor
    embedding: Tensor
    activations: dict[str, Tensor]

    def of(self, name: str) -> slice:
        """The rows of a view."""
        start = self.names.index(name) * self.n
        return slice(start, start + self.n)


@dataclass(frozen=True)
class Goal:
    """One expectation of the objective: z from a view, decoded given a view, scored on the entries of a view."""

    term: str
    sample: str
    given: str
    scored: str
    weight: float


def goals_of(config: ScVaeitConfig, anything_hidden: bool) -> tuple[tuple[str, ...], list[Goal]]:
    """Views to encode, and what is decoded from them (sheet, sections 4.2 and 4.3)."""
    beta = config.beta
    if config.objective == "description":
        goals = [Goal("visible", "visible", "visible", "visible", 1 - beta)]
        if not anything_hidden:
            return ("visible",), goals
        both = config.hidden_sample == "both"
        samples = ("full", "visible") if both else (config.hidden_sample,)
        weight = beta / len(samples)
        goals += [Goal("hidden", sample, "visible", "hidden", weight) for sample in samples]
        return ("full", "visible"), goals
    goals = [Goal("visible", "full", "full", "full", 1 - beta)]
    if not anything_hidden:
        return ("full",), goals
    reverse = config.beta_reverse
    goals.append(Goal("hidden", "visible", "visible", "hidden", beta * (1 - reverse)))
    if reverse > 0:
        goals.append(Goal("hidden", "hidden", "hidden", "visible", beta * reverse))
        return ("full", "visible", "hidden"), goals
    return ("full", "visible"), goals
