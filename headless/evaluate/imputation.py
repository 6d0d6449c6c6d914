"""How well hidden values were predicted: correlations for RNA and protein, ranking scores for ATAC.

Per feature over cells, per cell over features, and flattened. A correlation with a constant truth or prediction is
undefined: it is counted and left out, never 0. Features that a cell's batch did not measure do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headless.evaluate.metric import Metrics, MetricValue
from headless.evaluate.views import SCALES, Flags, Floats, Numbers

Doubles = NDArray[np.float64]
Reals = NDArray[np.floating[Any]]
Score = Callable[[Reals, Reals], Doubles]

#: Genes and peaks seen in a smaller share of the scored cells are left out of per-feature scores; peaks open in a
#: larger one than ``1 - LEAST`` too.
LEAST = 0.01


def compare(modality: str, truth: Floats, prediction: Floats, group: Numbers, measured: Flags) -> Metrics:
    """All imputation metrics of a modality.

    Parameters
    ----------
    truth, prediction
        ``(n, D)`` on the modality's scale (:data:`headless.evaluate.views.SCALES`); ATAC: 0/1 and any score that
        grows with the probability of being open.
    group, measured
        Row of ``measured`` ``(G, D)`` that holds for each cell: which features it was measured for.

    Returns
    -------
    Metrics
        ``<score>_feature`` and ``<score>_cell`` (medians; quartiles, mean and the numbers used and undefined among
        the parameters), ``<score>_flat``, ``rmse_flat``.
    """
    ranking = modality == "atac"
    scores: dict[str, Score] = (
        {"auroc": auroc, "auprc": average_precision} if ranking else {"pearson": pearson, "spearman": spearman}
    )
    scale = {"scale": SCALES.get(modality, "as given"), "cells": len(truth)}
    detected = _share_detected(truth, group, measured)
    wanted = detected > 0 if modality == "adt" else detected >= LEAST
    if ranking:
        wanted &= detected <= 1 - LEAST
    metrics: Metrics = {}
    for name, score in scores.items():
        by_feature = np.full(truth.shape[1], np.nan)
        for rows, columns in blocks_by_feature(group, measured & wanted):
            by_feature[columns] = score(truth[np.ix_(rows, columns)], prediction[np.ix_(rows, columns)])
        by_cell = np.full(len(truth), np.nan)
        for code in np.unique(group):
            rows, columns = np.flatnonzero(group == code), np.flatnonzero(measured[code])
            by_cell[rows] = score(truth[np.ix_(rows, columns)].T, prediction[np.ix_(rows, columns)].T)
        left_out = {"rarely_detected": int((~wanted & measured[np.unique(group)].any(axis=0)).sum())}
        metrics[f"{name}_feature"] = _summary(by_feature[wanted], "features", scale | left_out)
        metrics[f"{name}_cell"] = _summary(by_cell, "cells", scale)
    if ranking:
        metrics["auprc_feature"].parameters["chance"] = _median(detected[wanted])
        metrics["auprc_cell"].parameters["chance"] = _median(
            np.array([truth[i, measured[g]].mean() for i, g in enumerate(group)])
        )
    return metrics | _flat(scores, truth, prediction, measured[group], scale)


def blocks_by_feature(group: Numbers, measured: Flags) -> Iterator[tuple[Numbers, Numbers]]:
    """Complete blocks (rows, columns): features that were measured in the same groups, with the cells of those."""
    present = np.unique(group)
    patterns, which = np.unique(measured[present].T, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        if pattern.any():
            yield np.flatnonzero(np.isin(group, present[pattern])), np.flatnonzero(which.ravel() == number)


def pearson(a: Reals, b: Reals) -> Doubles:
    """Pearson correlation of each column; NaN where either is constant."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    flat = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0) if len(x) else np.ones(x.shape[1], dtype=bool)
    x -= x.mean(axis=0)
    y -= y.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    r: Doubles = np.divide((x * y).sum(axis=0), norm, out=np.full(x.shape[1], np.nan), where=norm > 0)
    r[flat] = np.nan
    return r


def spearman(a: Reals, b: Reals) -> Doubles:
    """Spearman correlation of each column (average ranks); NaN where either is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def auroc(truth: Reals, score: Reals) -> Doubles:
    """Area under the ROC curve of each column, ties counted half; NaN where only one class occurs."""
    from scipy.stats import rankdata

    positive = truth > 0
    n1 = positive.sum(axis=0).astype(np.float64)
    n0 = len(truth) - n1
    sums = (rankdata(score, axis=0) * positive).sum(axis=0)
    pairs = n1 * n0
    area: Doubles = np.divide(sums - n1 * (n1 + 1) / 2, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return area


def average_precision(truth: Reals, score: Reals) -> Doubles:
    """Average precision (area under the precision-recall steps) of each column; NaN where only one class occurs.

    Cells with equal scores enter together, as in scikit-learn.
    """
    n = len(truth)
    order = np.argsort(-score, axis=0, kind="stable")
    hits = np.take_along_axis(truth > 0, order, axis=0)
    ranked = np.take_along_axis(score, order, axis=0)
    n1 = hits.sum(axis=0).astype(np.float64)
    if n == 0:
        return np.full(truth.shape[1], np.nan)
    last = np.vstack([ranked[1:] != ranked[:-1], np.ones((1, ranked.shape[1]), dtype=bool)])
    place = np.where(last, np.arange(n)[:, None], n)
    end = np.minimum.accumulate(place[::-1], axis=0)[::-1]  # where each cell's group of equal scores ends
    precision = np.cumsum(hits, axis=0) / np.arange(1, n + 1)[:, None]
    sums = (np.take_along_axis(precision, end, axis=0) * hits).sum(axis=0)
    defined = (n1 > 0) & (n1 < n)
    area: Doubles = np.divide(sums, n1, out=np.full(len(n1), np.nan), where=defined)
    return area


def _share_detected(truth: Floats, group: Numbers, measured: Flags) -> Doubles:
    """Share of non-zero values of each feature among the cells that it was measured in."""
    able = measured[group]
    return np.asarray(((truth > 0) & able).sum(axis=0) / np.maximum(able.sum(axis=0), 1))


def _summary(values: Doubles, of: str, parameters: dict[str, Any]) -> MetricValue:
    good = values[np.isfinite(values)]
    counted = {**parameters, f"{of}_used": len(good), f"{of}_undefined": len(values) - len(good)}
    if not len(good):
        return MetricValue.absent(f"constant truth or prediction in all {of}", **counted)
    low, middle, high = np.quantile(good, [0.25, 0.5, 0.75])
    spread = {"quartiles": [float(low), float(high)], "mean": float(good.mean())}
    return MetricValue(value=float(middle), parameters=counted | spread)


def _flat(
    scores: dict[str, Score], truth: Floats, prediction: Floats, able: Flags, parameters: dict[str, Any]
) -> Metrics:
    a, b = truth[able][:, None], prediction[able][:, None]
    metrics = {}
    for name in [name for name in scores if name != "spearman"]:
        value = float(scores[name](a, b)[0]) if len(a) else float("nan")
        known = np.isfinite(value)
        metrics[f"{name}_flat"] = (
            MetricValue(value=value, parameters=dict(parameters))
            if known
            else MetricValue.absent("constant truth or prediction", **parameters)
        )
    if "auprc_flat" in metrics:
        metrics["auprc_flat"].parameters["chance"] = float((a > 0).mean()) if len(a) else None
    if len(a):
        rmse = float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
        metrics["rmse_flat"] = MetricValue(value=rmse, parameters=dict(parameters))
    return metrics


def _median(values: Doubles) -> float | None:
    return float(np.median(values)) if len(values) else None
