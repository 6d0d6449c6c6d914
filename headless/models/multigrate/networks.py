"""The networks of Multigrate, as in section 3 of its sheet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, leaky_relu

from headless.data.covariates import Covariate
from headless.data.minibatch import TileRows
from headless.models.blocks import SparseLinear
from headless.models.multigrate.config import MultigrateConfig


class After(nn.Module):
    """What follows a linear layer: normalisation, LeakyReLU(0.01), dropout."""

    def __init__(self, width: int, config: MultigrateConfig) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.01) if config.normalization == "batch" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Layer normalisation has no parameters of its own, as in the package.
        normed = layer_norm(x, (self.width,)) if self.norm is None else self.norm(x)
        dropped: Tensor = self.dropout(leaky_relu(normed, 0.01))
        return dropped


class Curve(nn.Module):
    """A number times a vector, after a monotone curve or a small network."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.vector = nn.Parameter(torch.randn(dim))
        if kind == "network":
            self.network = nn.Sequential(nn.Linear(1, dim), nn.LeakyReLU(), nn.Linear(dim, 1))
        else:
            self.slope = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if self.kind == "network":
            scale = self.network(values[:, None])
        else:
            x = torch.log1p(values.clamp(min=0)) if self.kind == "log sigmoid" else values
            scale = torch.sigmoid(self.slope * x + self.shift)[:, None]
        out: Tensor = scale * self.vector
        return out


class Conditions(nn.Module):
    """Batch and covariates of each cell as one vector: 16 numbers each, concatenated.

    Parameters
    ----------
    n_batches
        0 if the networks are not told the batch.
    """

    def __init__(self, n_batches: int, covariates: tuple[Covariate, ...], config: MultigrateConfig) -> None:
        super().__init__()
        dim = config.dim_condition
        self.covariates = covariates
        self.batch = nn.Embedding(n_batches, dim) if n_batches else None
        self.tables = nn.ModuleList(
            Curve(dim, config.curve) if c.levels is None else nn.Embedding(len(c.levels), dim) for c in covariates
        )
        self.width = dim * (bool(n_batches) + len(covariates))

    def forward(self, batch: Tensor, covariates: Tensor | None, standing_in: Tensor | None = None) -> Tensor:
        """``(n, width)`` from batch codes ``(n,)`` and covariates ``(n, C)`` (``None`` = typical ones).

        ``standing_in`` ``(B, B)`` mixes the vectors of batches before they are looked up.
        """
        parts = []
        if self.batch is not None:
            parts = [self.batch(batch) if standing_in is None else (standing_in @ self.batch.weight)[batch]]
        for number, (covariate, table) in enumerate(zip(self.covariates, self.tables, strict=True)):
            if covariates is None:
                values = torch.full(batch.shape, float(covariate.typical), device=batch.device)
            else:
                values = covariates[:, number]
            parts.append(table(values if covariate.levels is None else values.long()))
        if not parts:
            return torch.empty(len(batch), 0, device=batch.device)
        return torch.cat(parts, dim=1)


class Encoder(nn.Module):
    """One modality and the conditions to mean and log-variance, ``(n, 2 z)``."""

    def __init__(self, n_features: int, dim_condition: int, config: MultigrateConfig) -> None:
        super().__init__()
        self.first = SparseLinear(n_features, config.hidden)
        self.condition = nn.Linear(dim_condition, config.hidden, bias=False) if dim_condition else None
        self.rest = nn.Sequential(
            After(config.hidden, config),
            nn.Linear(config.hidden, config.dim_z),
            After(config.dim_z, config),
            nn.Linear(config.dim_z, 2 * config.dim_z),
        )

    def forward(self, x: TileRows, condition: Tensor) -> Tensor:
        h = self.first(x)
        if self.condition is not None:
            h = h + self.condition(condition)
        out: Tensor = self.rest(h)
        return out


class Decoder(nn.Module):
    """The latent state (or the shared layer) and the conditions to one modality's parameters, ``(n, heads D)``."""

    def __init__(
        self, n_in: int, dim_condition: int, depth: int, n_features: int, heads: int, config: MultigrateConfig
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = n_in + dim_condition
        for _ in range(depth):
            layers += [nn.Linear(width, config.hidden), After(config.hidden, config)]
            width = config.hidden
        self.hidden = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, n_features) for _ in range(heads))

    def forward(self, h: Tensor, condition: Tensor) -> list[Tensor]:
        h = self.hidden(torch.cat([h, condition], dim=1))
        return [head(h) for head in self.heads]


def log_proportions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Log-softmax over the measured features alone: what was not measured takes no share of the library."""
    if mask is None:
        return torch.log_softmax(logits.float(), dim=1)
    return torch.log_softmax(logits.float().masked_fill(mask == 0, -1e4), dim=1)


