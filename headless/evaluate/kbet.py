"""kBET per label (Büttner et al. 2019; per label as in scIB, Luecken et al. 2022).

Of each label with at least ten cells in at least two batches: the share of cells whose k0 neighbours have the batch
composition of the label (chi-squared test). Neighbours are those in a diffusion map (Coifman et al. 2005) of the
label's part of the neighbour graph, so that every cell has k0 of them, where k0 = a quarter of the mean number of the
label's cells per batch, at least 10 and at most 70.

The numbers are those of scib-metrics' ``kbet_per_label`` (a test holds them together), without its minutes of
compilation in every process; neighbours are exact here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]

_FEWEST_CELLS: Final = 10
_COMPONENTS: Final = 100  # of the diffusion map
_LARGE_PART: Final = 3  # parts of a label's graph with fewer than this many k0 cells are set aside ...
_USABLE: Final = 0.75  # ... as long as this share of its cells remains


def kbet_per_label(graph: Any, batches: Codes, labels: Codes, alpha: float = 0.05) -> dict[int, float]:
    """Acceptance rate of each label that can be tested; 1 is perfect mixing.

    Parameters
    ----------
    graph
        Symmetric sparse connectivities ``(n, n)``.
    batches, labels
        ``(n,)`` codes.
    """
    graph = graph.tocsr()
    rates = {}
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        if len(cells) >= _FEWEST_CELLS and len(np.unique(batches[cells])) > 1:
            rates[int(label)] = _of_label(graph[cells][:, cells], batches[cells], alpha)
    return rates


def kbet(graph: Any, batches: Codes, labels: Codes) -> float:
    """Mean acceptance rate of the labels; NaN if none can be tested."""
    rates = list(kbet_per_label(graph, batches, labels).values())
    return float(np.mean(rates)) if rates else float("nan")


def _of_label(graph: Any, batches: Codes, alpha: float) -> float:
    from scipy.sparse.csgraph import connected_components

    sizes = np.unique(batches, return_counts=True)[1]
    k0 = int(min(70, max(10, sizes.mean() // 4)))
    n_parts, part = connected_components(graph, directed=False)
    if n_parts > 1:
        large = np.flatnonzero((np.bincount(part) >= _LARGE_PART * k0)[part])
        if len(large) < _USABLE * len(batches):
            return 0.0  # falls to pieces: as badly mixed as can be
        graph, batches = graph[large][:, large], batches[large]
    return _accepted(_diffusion_neighbours(graph, k0), batches, alpha)


def _diffusion_neighbours(graph: Any, k: int) -> NDArray[np.int64]:
    """``(n, k + 1)``: each cell and its nearest in the multiscale diffusion map."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import eigsh
    from sklearn.neighbors import NearestNeighbors

    n = graph.shape[0]
    graph = graph.astype(np.float64)
    # Divide by the sampling density (the degree) on both sides, then make the rows sum to one, symmetrically.
    density = sp.diags(1 / np.asarray(graph.sum(axis=0)).ravel())
    kernel = density @ graph @ density
    norm = sp.diags(1 / np.sqrt(np.asarray(kernel.sum(axis=0)).ravel()))
    start = np.random.default_rng(0).uniform(-1, 1, n)
    values, vectors = eigsh(norm @ kernel @ norm, k=min(_COMPONENTS, n - 1), which="LM", v0=start)
    # All numbers of steps summed up: e + e^2 + ... = e / (1 - e). The stationary vector (e = 1) is kept once.
    stationary = values > 1 - 1e-6
    weights = np.where(stationary, 1.0, values / np.where(stationary, 1.0, 1 - values))
    near = NearestNeighbors(n_neighbors=min(k + 1, n)).fit(vectors * weights)
    return np.asarray(near.kneighbors(vectors * weights, return_distance=False), dtype=np.int64)


def _accepted(neighbours: NDArray[np.int64], batches: Codes, alpha: float) -> float:
    """Share of cells whose neighbours' batches do not differ from all cells' (Pearson's chi-squared test)."""
    from scipy.stats import chi2

    codes = np.unique(batches, return_inverse=True)[1]
    n_batches = int(codes.max()) + 1
    if n_batches < 2:
        return 1.0  # what is left of the label has one batch: nothing to mix
    expected = np.bincount(codes) / len(codes) * neighbours.shape[1]
    observed = np.stack([(codes[neighbours] == b).sum(axis=1) for b in range(n_batches)], axis=1)
    statistic = ((observed - expected) ** 2 / expected).sum(axis=1)
    return float((chi2.sf(statistic, n_batches - 1) >= alpha).mean())
