"""FOSCTTM: fraction of samples closer than the true match (Liu et al. 2019; as used by GLUE and SCMMIB).

For a cell i of modality A with its true match i' in B: the share of the *other* cells of B that lie strictly closer
to i than i' does; divisor N - 1; mean over the cells and both directions. 0 is perfect, about 0.5 is random.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PAIRS = 1_000_000  # near ties recomputed at a time


def foscttm(a: ArrayLike, b: ArrayLike, block: int = 2048) -> float:
    """FOSCTTM of two embeddings ``(N, d)`` whose rows match in order; mean of both directions.

    Exact, with ``block`` x N distances in memory at a time.

    Raises
    ------
    ValueError
        Different shapes, fewer than two cells, or values that are not finite.
    """
    forward, backward = per_cell(a, b, block)
    return float((forward.mean() + backward.mean()) / 2)


def per_cell(a: ArrayLike, b: ArrayLike, block: int = 2048) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The shares ``(N,)`` of each cell, from A to B and from B to A.

    Squared distances come from a matrix product; those within rounding error of the match's are computed again as
    sums of squared differences, so that ties are ties whatever the block size.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"matched embeddings have one shape, not {x.shape} and {y.shape}")
    n = len(x)
    if n < 2:
        raise ValueError("FOSCTTM needs at least two cells")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("embeddings must be finite")
    centre = (x.mean(axis=0) + y.mean(axis=0)) / 2  # small norms keep the product exact
    x, y = x - centre, y - centre
    matched = ((x - y) ** 2).sum(axis=1)
    norm_x, norm_y = (x**2).sum(axis=1), (y**2).sum(axis=1)
    doubt = 1e-12 * (norm_x.max() + norm_y.max())
    forward, backward = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        distance = x[rows] @ y.T
        distance *= -2
        distance += norm_x[rows, None]
        distance += norm_y
        for counts, own, axis in ((forward[rows], matched[rows, None], 1), (backward, matched[None, :], 0)):
            gap = distance - own
            counts += (gap < -doubt).sum(axis=axis)
            i, j = np.nonzero(np.abs(gap) <= doubt)
            for part in range(0, len(i), _PAIRS):
                p, q = i[part : part + _PAIRS], j[part : part + _PAIRS]
                exact = ((x[rows][p] - y[q]) ** 2).sum(axis=1)
                closer = exact < np.broadcast_to(own, gap.shape)[p, q]
                np.add.at(counts, (p if axis == 1 else q)[closer], 1)
    return forward / (n - 1), backward / (n - 1)
