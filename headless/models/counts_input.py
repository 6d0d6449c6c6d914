"""How counts enter a network, and library sizes: transforms that keep the pattern of zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headless.data.minibatch import Minibatch, TileRows


def log_counts(x: TileRows) -> TileRows:
    """``log(1 + x)``."""
    return x.with_values(torch.log1p(x.values))


def log_normalised(x: TileRows, target: float = 1e4) -> TileRows:
    """``log(1 + target x / library)``."""
    return x.with_values(torch.log1p(x.values * (target / x.totals.clamp(min=1))[x.row_ids]))


def geometric_size(x: TileRows) -> Tensor:
    """``(m,)``: ``exp(mean over measured features of log(1 + x))``, the size that centred log ratios divide by."""
    logs = torch.zeros(x.n_rows, device=x.values.device).index_add_(0, x.row_ids, torch.log1p(x.values))
    measured = x.n_columns if x.mask is None else x.mask.sum(-1).clamp(min=1)
    return torch.exp(logs / measured)


def centred_log_ratio(x: TileRows) -> TileRows:
    """``log(1 + x / g)`` with g of :func:`geometric_size` (Stoeckius et al. 2017, the non-negative form)."""
    return x.with_values(torch.log1p(x.values / geometric_size(x)[x.row_ids]))


def median_sizes(batches: Iterable[Minibatch], sizes: dict[str, object]) -> dict[str, float]:
    """Median over all cells of each modality's size; 1 for a modality that no cell has.

    Parameters
    ----------
    sizes
        Modality -> function from rows to ``(m,)``.
    """
    found: dict[str, list[Tensor]] = {m: [] for m in sizes}
    for batch in batches:
        for m, x in batch.x.items():
            found[m].append(sizes[m](x))  # type: ignore[operator]
    return {m: float(torch.cat(values).median()) if values else 1.0 for m, values in found.items()}
