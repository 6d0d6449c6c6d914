"""Rows of a mosaic as scores and baselines see them: gathered by cell, on a named scale, reduced to components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from headless.data.mosaic import Mosaic

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

#: The scale on which a modality is compared; part of the name of every metric.
SCALES: Final = {
    "rna": "log1p(10 000 x / sum over measured genes)",
    "adt": "CLR: log1p(x / exp(mean over measured proteins of log1p x))",
    "atac": "open or not",
}


@dataclass(frozen=True)
class View:
    """One modality of some cells.

    Attributes
    ----------
    x
        CSR float32 ``(n, D)``; zero where a feature was not measured.
    group
        ``(n,)``: row of ``measured`` that holds for each cell (its batch).
    measured
        ``(G, D)``: which features were measured.
    """

    modality: str
    x: Any
    group: Numbers
    measured: Flags

    @property
    def everywhere(self) -> Flags:
        """``(D,)``: features measured in all groups that the cells belong to."""
        return np.asarray(self.measured[np.unique(self.group)].all(axis=0))

    def on_scale(self) -> View:
        """The same cells on the modality's scale (still sparse: zero stays zero)."""
        return View(self.modality, _scaled(self.modality, self.x, self.measured.sum(axis=1)[self.group]), self.group,
                    self.measured)  # fmt: skip


def gather(mosaic: Mosaic, modality: str, cells: Numbers) -> View:
    """Rows of ``cells`` (any order), which must all have the modality.

    Raises
    ------
    ValueError
        If one of them does not.
    """
    import scipy.sparse as sp

    parts, places = [], []
    group = np.zeros(len(cells), np.int64)
    measured = measured_features(mosaic, modality)
    for code, batch in enumerate(mosaic.batches):
        tile = mosaic.tiles.get((batch, modality))
        if tile is None:
            continue
        here = np.flatnonzero(np.isin(cells, tile.cells))
        if len(here):
            rows = tile.source.rows(np.searchsorted(tile.cells, cells[here])).to_scipy()
            parts.append(rows)
            places.append(here)
            group[here] = code
    order = np.concatenate(places) if places else np.zeros(0, np.int64)
    if len(order) != len(cells):
        raise ValueError(f"{len(cells) - len(order)} of the cells do not have {modality}")
    if not parts:
        return View(modality, sp.csr_matrix(np.zeros((0, measured.shape[1]), np.float32)), group, measured)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return View(modality, sp.csr_matrix(sp.vstack(parts, format="csr")[back]), group, measured)


def measured_features(mosaic: Mosaic, modality: str) -> Flags:
    """``(n_batches, D)``: features measured in each batch; all of them where the batch does not have the modality."""
    measured = np.ones((len(mosaic.batches), len(mosaic.features[modality])), dtype=bool)
    for code, batch in enumerate(mosaic.batches):
        tile = mosaic.tiles.get((batch, modality))
        if tile is not None and tile.mask is not None:
            measured[code] = tile.mask
    return measured


def _scaled(modality: str, x: Any, n_measured: Numbers) -> Any:
    x = x.copy()
    lengths = np.diff(x.indptr)
    if modality == "rna":
        total = np.asarray(x.sum(axis=1)).ravel()
        factor = np.divide(1e4, total, out=np.zeros(len(total)), where=total > 0)
        x.data = np.log1p(x.data * np.repeat(factor, lengths)).astype(np.float32)
    elif modality == "adt":
        logs = x.copy()
        logs.data = np.log1p(logs.data)
        centre = np.exp(np.asarray(logs.sum(axis=1)).ravel() / np.maximum(n_measured, 1))
        x.data = np.log1p(x.data / np.repeat(centre, lengths)).astype(np.float32)
    elif modality == "atac":
        x.data = np.ones_like(x.data)
    return x


def predicted_on_scale(modality: str, x: Floats, group: Numbers, measured: Flags) -> Floats:
    """Predicted means ``(n, D)`` on the scale of the truth; ``atac`` (probabilities) as they are.

    Sizes and centres are those of the prediction itself, over the features measured in the cell's batch: the
    observed depth of a hidden cell is not known to any method.
    """
    if modality not in ("rna", "adt"):
        return x
    result = np.empty_like(x)
    for code in np.unique(group):
        rows, columns = np.flatnonzero(group == code), measured[code]
        values = np.maximum(x[rows], 0)
        seen = values[:, columns]
        if modality == "rna":
            total = seen.sum(axis=1, dtype=np.float64, keepdims=True)
            factor = np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)
        else:
            factor = 1 / np.exp(np.log1p(seen).mean(axis=1, dtype=np.float64, keepdims=True))
        result[rows] = np.log1p(values * factor)
    return result


def components(train: View, test: View, n: int = 50, seed: int = 0) -> tuple[Floats, Floats]:
    """Principal components (ATAC: LSI) fitted on ``train``; scores of both, total variance 1.

    Only features measured in all cells of both are used.

    Raises
    ------
    ValueError
        If there is no such feature, or they do not vary.
    """
    from sklearn.decomposition import PCA, TruncatedSVD

    columns = np.flatnonzero(train.everywhere & test.everywhere)
    x, y = train.on_scale().x[:, columns], test.on_scale().x[:, columns]
    if not len(columns) or x.shape[0] < 2:
        raise ValueError("no feature was measured in all of the cells")
    if train.modality == "atac":
        x, y = _tf_idf(x, y)
    n = min(n, len(columns) - 1, x.shape[0] - 1)
    if n < 1 or len(columns) <= n + 1 or x.shape[0] <= 2 * n or train.modality == "adt":
        model = PCA(max(1, min(n, len(columns), x.shape[0])), svd_solver="full")
        x, y = x.toarray(), y.toarray()
    elif train.modality == "atac":
        model = TruncatedSVD(n, random_state=seed)
    else:
        model = PCA(n, svd_solver="arpack", random_state=seed)
    a, b = model.fit_transform(x), model.transform(y)
    centre, scale = a.mean(axis=0), np.sqrt(a.var(axis=0).sum())
    if not scale > 0:
        raise ValueError("the features do not vary")
    return ((a - centre) / scale).astype(np.float32), ((b - centre) / scale).astype(np.float32)


def _tf_idf(x: Any, y: Any) -> tuple[Any, Any]:
    """log1p(1e4 x term frequency x log(1 + N / document frequency)), frequencies of peaks from ``x``."""
    import scipy.sparse as sp

    weight = np.log1p(x.shape[0] / np.maximum(np.asarray(x.sum(axis=0)).ravel(), 1)).astype(np.float32)

    def weighted(m: Any) -> Any:
        total = np.maximum(np.asarray(m.sum(axis=1)).ravel(), 1)
        result = sp.csr_matrix(sp.diags((1e4 / total).astype(np.float32)) @ m @ sp.diags(weight))
        result.data = np.log1p(result.data)
        return result

    return weighted(x), weighted(y)


def unintegrated(mosaic: Mosaic, n: int = 50, seed: int = 0) -> Floats:
    """``(n_cells, d)``: PCs of each modality side by side, nothing aligned or corrected.

    A cell without a modality has that modality's mean (0) there. The baseline of every integration score.
    """
    blocks = []
    for modality in mosaic.modalities:
        cells = np.flatnonzero(mosaic.measured(modality))
        if len(cells) < 3:
            continue
        view = gather(mosaic, modality, cells)
        try:
            scores, _ = components(view, view, n, seed)
        except ValueError:
            continue  # nothing in common between the batches: this modality cannot say anything
        block = np.zeros((mosaic.n_cells, scores.shape[1]), np.float32)
        block[cells] = scores
        blocks.append(block)
    if not blocks:
        raise ValueError("no modality has features that all of its batches measured")
    return np.hstack(blocks)
