"""Learning rates over time, averaged weights, and the end of training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headless.models.config import ModelConfig


def total_steps(config: ModelConfig, steps_per_epoch: int) -> int:
    """Steps of the whole run: what epochs and steps at most allow."""
    total = config.max_epochs * steps_per_epoch
    return total if config.max_steps is None else min(total, config.max_steps)


def rate_factor(config: ModelConfig, step: int, total: int) -> float:
    """What the learning rate is multiplied with at a step (0, 1, ...)."""
    if config.lr_schedule == "constant":
        return 1.0
    warm = min(config.warmup_steps, total // 2)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class AveragedWeights:
    """Exponential moving average of the weights (Polyak averaging), with the usual correction of the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after a step (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current: Iterable[Tensor] = [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(list(self.values.values()), list(current), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the averages into the network."""
        for name, p in module.named_parameters():
            p.copy_(self.values[name])
