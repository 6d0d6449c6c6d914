"""Combining experts: what the modalities of a cell say together about its latent state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def precision(log_variance: Tensor) -> Tensor:
    """``exp(-log_variance)`` in float32."""
    return torch.exp(-log_variance.float())


def product_of_experts(weighted_means: Sequence[Tensor], precisions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Product of diagonal Gaussian experts and the prior N(0, I) (Wu and Goodman, NeurIPS 2018; MIDAS, section 4).

    Parameters
    ----------
    weighted_means
        ``T_e mu_e`` of every expert, each ``(n, d)``.
    precisions
        ``T_e = exp(-logvar_e)``, each ``(n, d)``; an expert that a cell lacks has zeros in both.

    Returns
    -------
    mean, log_variance
        ``(n, d)``: ``mu = sum T_e mu_e / (1 + sum T_e)``, ``logvar = -log(1 + sum T_e)``.
    """
    total = 1.0 + sum(precisions[1:], precisions[0])
    mean = sum(weighted_means[1:], weighted_means[0]) / total
    return mean, -torch.log(total)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, I), summed over dimensions and cells: ``0.5 sum(mu^2 + var - 1 - logvar)``."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()


def reparametrise(mean: Tensor, log_variance: Tensor) -> Tensor:
    """One draw ``mu + exp(logvar / 2) eps`` (Kingma and Welling, ICLR 2014)."""
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)


def keep_some(present: Tensor, p: float) -> Tensor:
    """Which experts a cell keeps when, with probability ``p``, it keeps one of its own at random and no other.

    Training on what one modality alone says teaches decoders to answer from it (ours; compare the random subsets of
    Sutter, Daunhawer and Vogt, ICLR 2021).

    Parameters
    ----------
    present
        ``(n, M)`` bool: the modalities that each cell has.

    Returns
    -------
    ``(n, M)`` float32: 1 = kept.
    """
    draws = torch.rand(present.shape, device=present.device).masked_fill(~present, -1.0)
    only = torch.nn.functional.one_hot(draws.argmax(1), present.shape[1]).float()
    alone = torch.rand(len(present), 1, device=present.device) < p
    return torch.where(alone, only, torch.ones_like(only)) * present
