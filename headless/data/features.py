"""Which genes a model sees: frequency filter, variable genes chosen batch by batch, genes of measured proteins.

Follows the offline preprocessing of MIDAS (He et al. 2024): a frequency filter per batch, variable genes per batch by
the variance-stabilising transformation of Seurat v3 (Stuart et al. 2019), then the genes that are variable in most
batches (as SelectIntegrationFeatures of Seurat ranks them), and the genes that encode measured proteins.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.columns import column_stats
from headless.data.preparation import Preparation
from headless.data.sources import RowSource

#: Cells of a batch that variance is estimated from; more change the ranking little and cost memory on disk-backed data.
MAX_CELLS = 50_000
#: Genes whose counts are at most this share of the number of cells are too rare to rank (MIDAS, RNA filter).
MIN_MEAN = 0.02
#: Distinct means of varying genes that a loess curve needs.
MIN_DISTINCT = 30


@dataclass(frozen=True)
class GeneTile:
    """RNA of one batch over the union of genes, and which of them were measured there."""

    batch: str
    source: RowSource
    mask: NDArray[np.bool_]


def choose(
    tiles: Sequence[GeneTile], names: pd.Index, preparation: Preparation, protein_genes: Collection[str] = ()
) -> tuple[NDArray[np.bool_], list[str]]:
    """``(n_genes,)`` which genes of the union to keep, and why.

    A panel of at most ``n_top_genes`` genes stays whole, but for genes that are never seen or named in ``drop_genes``.
    """
    stats = [column_stats(tile.source) for tile in tiles]
    notes: list[str] = []
    upper = pd.Index(names.astype(str).str.upper())
    dropped = np.asarray(upper.isin([name.upper() for name in preparation.drop_genes]))
    wanted = [name.upper() for name in preparation.keep_genes]
    if preparation.keep_protein_genes:
        wanted += [name.upper() for name in protein_genes]
    seen = np.sum([own.cells for own in stats], axis=0) >= preparation.min_cells
    forced = np.asarray(upper.isin(wanted)) & seen & ~dropped
    allowed = seen & ~dropped
    if not seen.all():
        least = preparation.min_cells
        rare = "no cell" if least <= 1 else f"fewer than {least} cells"
        notes.append(f"{int((~seen).sum()):,} genes detected in {rare} left out.")
    wish = preparation.n_top_genes
    if wish is None or int(allowed.sum()) <= wish:
        notes.append(f"All {int(allowed.sum()):,} genes kept.")
        return allowed, notes
    frequent = np.zeros(len(names), dtype=bool)
    for tile, own in zip(tiles, stats, strict=True):
        n = tile.source.n_rows
        frequent |= (own.cells > preparation.genes_min_share * n) & (own.total > MIN_MEAN * n)
    candidates = np.flatnonzero(allowed & frequent)
    best, remarks = variable_genes(tiles, candidates, wish, preparation.hvg_flavor)
    notes += remarks
    keep = np.zeros(len(names), dtype=bool)
    keep[best] = True
    added = int((forced & ~keep).sum())
    keep |= forced
    notes.append(
        f"{len(best):,} variable genes of {len(names):,} chosen over {len(tiles)} batches"
        + (f", and {added} more that encode measured proteins or were asked for." if added else ".")
    )
    return keep, notes


def variable_genes(
    tiles: Sequence[GeneTile], candidates: NDArray[np.int64], n_top: int, flavor: str = "seurat_v3"
) -> tuple[NDArray[np.int64], list[str]]:
    """The ``n_top`` of the ``candidates`` that are among the most variable in most batches (ties: median rank).

    A batch ranks only the genes that it measured. With the same genes everywhere the result is that of scanpy's
    ``highly_variable_genes(flavor="seurat_v3_paper", batch_key=...)``.
    """
    ranks = np.full((len(tiles), len(candidates)), np.nan)
    notes: list[str] = []
    for i, tile in enumerate(tiles):
        own = np.flatnonzero(tile.mask[candidates])
        if not len(own) or not tile.source.n_rows:
            continue
        scores, remark = _scores(tile, candidates[own], flavor)
        if remark:
            notes.append(remark)
        place = np.argsort(np.argsort(-scores, kind="stable"), kind="stable").astype(np.float64)
        place[place >= n_top] = np.nan
        ranks[i, own] = place
    times = (~np.isnan(ranks)).sum(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # genes that no batch ranks have no median
        middle = np.nanmedian(ranks, axis=0)
    order = np.lexsort((np.where(np.isnan(middle), np.inf, middle), -times))
    return np.sort(candidates[order[:n_top]]), notes


def _scores(tile: GeneTile, genes: NDArray[np.int64], flavor: str) -> tuple[NDArray[np.float64], str]:
    n = tile.source.n_rows
    which = np.arange(n)
    if n > MAX_CELLS:
        which = np.sort(np.random.default_rng(0).choice(n, MAX_CELLS, replace=False))
    counts = tile.source.rows(which).to_scipy().tocsc()[:, genes]
    if flavor == "seurat_v3":
        try:
            return _loess(counts), ""
        except (ValueError, np.linalg.LinAlgError):  # loess finds no neighbourhood in small or degenerate batches
            remark = f"Batch {tile.batch} is too small for a loess curve: its variable genes are ranked by a parabola."
            return standardised_variance(counts), remark
    return standardised_variance(counts), ""


def _loess(counts: Any) -> NDArray[np.float64]:
    import anndata as ad
    import scanpy as sc

    # With two or three distinct means the Fortran of skmisc ends the process, so it is never asked about so few.
    mean, variance = _moments(counts)
    if len(np.unique(mean[variance > 0])) < MIN_DISTINCT:
        raise ValueError("too few cells or genes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = sc.pp.highly_variable_genes(
            ad.AnnData(counts.tocsr()), flavor="seurat_v3", n_top_genes=counts.shape[1], inplace=False,
            check_values=False,
        )
    scores = table["variances_norm"].to_numpy(dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("loess gave no finite variance")
    return np.asarray(scores, dtype=np.float64)


def standardised_variance(counts: Any) -> NDArray[np.float64]:
    """Variance of each gene (column) after standardising with the trend of log variance on log mean, a parabola here.

    Values are clipped at sqrt(n) standard deviations, so that a few extreme cells do not make a gene variable
    (Stuart et al. 2019, section "Feature selection").
    """
    counts = counts.tocsc().astype(np.float64)
    n = counts.shape[0]
    mean, variance = _moments(counts)
    varies = variance > 0
    scores = np.zeros(counts.shape[1])
    if varies.sum() == 0:
        return scores
    x, y = np.log10(mean[varies]), np.log10(variance[varies])
    degree = min(2, len(np.unique(x)) - 1)
    expected = 10 ** np.polyval(np.polyfit(x, y, degree), x)
    spread = np.sqrt(expected)
    limit = mean[varies] + spread * np.sqrt(n)
    some = counts[:, np.flatnonzero(varies)]
    column = np.repeat(np.arange(some.shape[1]), np.diff(some.indptr))
    clipped = np.minimum(some.data, limit[column])
    total = np.bincount(column, weights=clipped, minlength=some.shape[1])
    square = np.bincount(column, weights=clipped**2, minlength=some.shape[1])
    centred = square - 2 * mean[varies] * total + n * mean[varies] ** 2
    scores[varies] = centred / (max(n - 1, 1) * expected)
    return scores


def _moments(counts: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and unbiased variance of every column."""
    n = counts.shape[0]
    counts = counts.astype(np.float64)
    mean = np.asarray(counts.mean(axis=0)).ravel()
    squares = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    return mean, np.maximum(squares - n * mean**2, 0.0) / max(n - 1, 1)
