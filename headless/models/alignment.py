"""Maximum mean discrepancy between groups of cells, all pairs of groups in one product.

MMD^2 as a V-statistic (Gretton et al., JMLR 2012) with the average of 19 Gaussian kernels that Multigrate and scVAEIT
share. For group sizes n_i the sum over pairs of groups is one weighted sum over pairs of cells,
``sum_ab W_ab K(|z_a - z_b|^2)``, so distances and kernels are computed once, whatever the number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SCALES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 1e2, 1e3, 1e4, 1e5, 1e6)

#: exp(-gamma d^2), gamma as in Multigrate.
GAMMAS: tuple[float, ...] = _SCALES
#: exp(-d^2 / (2 s)), s in the same list (scVAEIT).
INVERSE_GAMMAS: tuple[float, ...] = tuple(sorted(1 / (2 * scale) for scale in _SCALES))

#: exp of less than minus this is zero in float32.
UNDERFLOW = 87.0
#: Kernels with a gamma from here on are narrow: they vanish beyond a distance of UNDERFLOW / WIDE.
WIDE = 100.0


class _KernelSum(torch.autograd.Function):
    """``sum_ab W_ab mean_gamma exp(-gamma |z_a - z_b|^2)`` with its gradient ``4 (diag(A 1) - A) z``, A = W K'."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, gammas: Sequence[float]) -> Tensor:
        squares = z.square().sum(1)
        distance = torch.addmm(squares[:, None] + squares[None], z, z.t(), alpha=-2.0).clamp_(min=0)
        kernel, slope = torch.zeros_like(distance), torch.zeros_like(distance)
        for gamma in gammas:
            if gamma < WIDE:
                value = torch.exp(distance * -gamma)
                kernel += value
                slope.sub_(value, alpha=gamma)
        narrow = torch.tensor([gamma for gamma in gammas if gamma >= WIDE], device=z.device)
        # Narrow kernels see near pairs only (each cell itself, and few more), but they see rounding too: there the
        # difference is taken before the square.
        rows, columns = (distance < UNDERFLOW / WIDE).nonzero(as_tuple=True)
        step = z[rows] - z[columns]
        values = torch.exp(-step.square().sum(1, keepdim=True) * narrow)
        kernel[rows, columns] += values.sum(1)
        near_slope = -(values @ narrow) * weights[rows, columns] / len(gammas)
        ctx.save_for_backward(z, slope.mul_(weights / len(gammas)), rows, near_slope[:, None] * step)
        return (kernel * weights).sum() / len(gammas)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        z, slope, rows, near = ctx.saved_tensors
        gradient = slope.sum(1, keepdim=True) * z - slope @ z
        return 4 * gradient.index_add_(0, rows, near) * upstream[0], None, None


def mmd(z: Tensor, groups: Tensor, gammas: Sequence[float] = GAMMAS, average: bool = False) -> Tensor:
    """Sum (or average) over pairs of groups of the squared MMD between their cells.

    Parameters
    ----------
    z
        ``(n, d)`` latent states.
    groups
        ``(n,)`` group codes; groups of a single cell take no part.
    gammas
        Kernels ``exp(-gamma |z_a - z_b|^2)``, averaged.

    Returns
    -------
    A scalar, 0 if fewer than two groups have two cells.
    """
    _, codes, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    usable = counts > 1
    n_groups = int(usable.sum())
    if n_groups < 2:
        return z.new_zeros(())
    share = torch.where(usable, 1.0 / counts, torch.zeros_like(counts, dtype=torch.float32))[codes].float()
    same = codes[:, None] == codes[None]
    # Each group meets n_groups - 1 others: its own mean counts once for each, every cross mean twice with a minus.
    weights = torch.where(same, float(n_groups - 1), -1.0) * share[:, None] * share[None]
    value: Tensor = _KernelSum.apply(z.float(), weights, tuple(gammas))  # type: ignore[no-untyped-call]
    return value / (n_groups * (n_groups - 1) / 2) if average else value
