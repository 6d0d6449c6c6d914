"""Modality contribution: whose neighbourhoods does the joint embedding keep?

For a cell and each of its modalities m, ``r_m = |N_m ∩ N_joint| / k`` with the k nearest neighbours of the cell in
the unimodal and in the joint embedding; the contribution is ``r_m / Σ r_m'``. It follows the description in He et
al. 2024 of a normalised neighbour-consistency ratio; k is not given there, and 50 is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: Above this many cells neighbours are searched approximately (pynndescent): exact search grows with the square, and
#: below it takes less time than pynndescent takes to compile.
EXACT_CELLS = 50_000


def contribution(
    joint: NDArray[np.float32], unimodal: Mapping[str, NDArray[np.float32]], k: int = 50, seed: int = 0
) -> NDArray[np.float32]:
    """Contribution of each modality to the joint embedding of each cell.

    Neighbours of a cell are looked for among the cells that have all of *its* modalities, in every embedding alike:
    ratios of one cell then compare like with like in a mosaic. With fewer candidates than ``k``, all of them count.

    Parameters
    ----------
    joint
        ``(n_cells, d)`` biological part of the joint embedding.
    unimodal
        Modality -> ``(n_cells, d)``; NaN rows where a cell lacks the modality.

    Returns
    -------
    ``(n_cells, n_modalities)`` float32 in the order of ``unimodal``: rows sum to one; NaN where a cell lacks the
    modality, and in rows without any common neighbour or any candidate.
    """
    has = np.stack([np.isfinite(latent).all(axis=1) for latent in unimodal.values()], axis=1)
    has &= np.asarray(np.isfinite(joint).all(axis=1))[:, None]
    found = np.full(has.shape, np.nan, dtype=np.float32)
    for combination in np.unique(has, axis=0):
        cells = np.flatnonzero((has == combination).all(axis=1))
        if combination.sum() == 1:
            found[np.ix_(cells, combination)] = 1.0
        if combination.sum() < 2:
            continue
        candidates = np.flatnonzero(has[:, combination].all(axis=1))
        if len(candidates) < 2:
            continue
        where = np.searchsorted(candidates, cells)
        near = neighbours(joint[candidates], k, seed)[where]
        ratios = np.stack(
            [
                _overlap(neighbours(latent[candidates], k, seed)[where], near, len(candidates))
                for latent, chosen in zip(unimodal.values(), combination, strict=True)
                if chosen
            ],
            axis=1,
        )
        total = ratios.sum(axis=1, keepdims=True)
        shares = np.divide(ratios, total, out=np.full_like(ratios, np.nan), where=total > 0)
        found[np.ix_(cells, combination)] = shares
    return found


def neighbours(points: NDArray[np.float32], k: int, seed: int = 0) -> NDArray[np.int64]:
    """The ``min(k, n - 1)`` nearest other points of each point, ``(n, k)``, Euclidean."""
    k = min(k, len(points) - 1)
    if len(points) <= EXACT_CELLS:
        from sklearn.neighbors import NearestNeighbors

        exact = NearestNeighbors(n_neighbors=k).fit(points)
        return np.asarray(exact.kneighbors(return_distance=False), dtype=np.int64)
    from pynndescent import NNDescent

    index = NNDescent(np.ascontiguousarray(points), n_neighbors=k + 1, random_state=seed)
    found = np.asarray(index.neighbor_graph[0], dtype=np.int64)
    # A point is usually its own first neighbour, but not among exact duplicates: drop it where it is, else the last.
    own = found == np.arange(len(found))[:, None]
    own[~own.any(axis=1), -1] = True
    return np.asarray(found[~own].reshape(len(found), k))


def _overlap(one: NDArray[np.int64], other: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    """``(rows,)``: share of the ``k`` neighbours in ``one`` that are in ``other`` as well."""
    import scipy.sparse as sp

    def graph(found: NDArray[np.int64]) -> sp.csr_matrix:
        rows, k = found.shape
        return sp.csr_matrix(
            (np.ones(found.size, dtype=np.float32), found.ravel(), np.arange(0, found.size + 1, k)), shape=(rows, n)
        )

    common = np.asarray(graph(one).multiply(graph(other)).sum(axis=1)).ravel()
    return np.asarray(common / one.shape[1], dtype=np.float32)


def means(values: NDArray[np.float32], modalities: tuple[str, ...], cells: pd.DataFrame) -> pd.DataFrame:
    """Mean contribution by batch and, where there are labels, by label, over the cells with several modalities.

    The one modality of a cell contributes all, which says nothing and would hide the balance of the others.
    Columns: ``by`` (``batch`` or ``label``), ``group``, ``n_cells`` (those that count), then the modalities (NaN if
    none of these cells has it). Groups without such cells are left out.
    """
    several = np.isfinite(values).sum(axis=1) > 1
    cells = cells[several]
    table = pd.DataFrame(values[several], columns=list(modalities), index=cells.index)
    rows = []
    for by in ("batch", "label"):
        if by not in cells:
            continue
        groups = table.groupby(cells[by], observed=True, sort=True)
        mean = groups.mean()
        mean.insert(0, "n_cells", groups.size())
        mean.insert(0, "group", mean.index.astype(str))
        mean.insert(0, "by", by)
        rows.append(mean)
    return pd.concat(rows, ignore_index=True)
