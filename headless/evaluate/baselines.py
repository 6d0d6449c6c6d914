"""What any method must beat at imputation: means, nearest neighbours and ridge regression on the modalities a cell has.

They see the training mosaic only and predict on the scale of the metric, which is what makes them strongest. A model
gives expected *counts* that are put on that scale afterwards, and a logarithm of a mean is not a mean of logarithms:
per cell, flattened and in RMSE that alone costs it a lot where counts are sparse. So the neighbours answer in both
ways, and the row of expected counts is the like for like. The mean of the cell's type uses the true label of the cell
that it predicts: an oracle, marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

import numpy as np

from headless.data.mosaic import Mosaic
from headless.evaluate.imputation import blocks_by_feature
from headless.evaluate.views import (
    Floats,
    Numbers,
    View,
    components,
    gather,
    measured_features,
    predicted_on_scale,
)

NEIGHBOURS: Final = 25
COMPONENTS: Final = 50
_RIDGE: Final = 1.0  # added to the components' sums of squares; these are n times shares of a variance of 1
_MOST_TRAINING_CELLS: Final = 20_000

MEAN: Final = "feature mean"
KNN: Final = "kNN regression"
KNN_COUNTS: Final = "kNN regression, expected counts"
RIDGE: Final = "ridge regression"
ORACLE: Final = "cell-type mean (oracle)"


@dataclass
class Baseline:
    """Predictions ``(n, D)`` on the modality's scale, and how they were made."""

    values: Floats
    parameters: dict[str, Any] = field(default_factory=dict)


def predict(
    training: Mosaic, modality: str, cells: Numbers, labels: Any | None = None, seed: int = 0
) -> dict[str, Baseline]:
    """Predict ``modality`` in ``cells``, which do not have it in the ``training`` mosaic.

    Cells are taken in groups that have the same other modalities; each group learns from the training cells that
    have all of these and the wanted one (where there are none, from the largest usable part of these). Cells that
    share nothing with any training cell get the mean, and are counted.

    Parameters
    ----------
    labels
        ``(n_cells,)`` true cell types of all cells, missing = ``None`` or NaN; without them there is no oracle.

    Returns
    -------
    dict
        Baseline by name: :data:`MEAN`, :data:`KNN`, :data:`KNN_COUNTS` (not for ATAC, where both are the same),
        :data:`RIDGE`, :data:`ORACLE`.

    Raises
    ------
    ValueError
        If no training cell has the modality.
    """
    rng = np.random.default_rng(seed)
    known = np.flatnonzero(training.measured(modality))
    if not len(known):
        raise ValueError(f"no training cell has {modality}")
    target = gather(training, modality, _some(known, rng)).on_scale()
    mean = _mean(target)
    values = np.broadcast_to(mean, (len(cells), len(mean)))
    found = {MEAN: Baseline(values.astype(np.float32), {"training_cells": target.x.shape[0]})}
    regressions: dict[str, dict[str, Any]] = {KNN: {"k": NEIGHBOURS}}
    if modality != "atac":
        regressions[KNN_COUNTS] = {"k": NEIGHBOURS}
    regressions[RIDGE] = {"penalty": _RIDGE}
    for name, settings in regressions.items():
        found[name] = Baseline(values.astype(np.float32), {**settings, "components": COMPONENTS, "sources": {}})
    served = np.zeros(len(cells), dtype=bool)
    for sources, places in _groups(training, modality, cells):
        for chosen, train in _candidates(training, modality, sources):
            train = _some(train, rng)
            try:
                x, y = _represent(training, chosen, train, cells[places], seed)
            except ValueError:
                continue  # nothing measured in common: try fewer modalities
            counts = gather(training, modality, train)
            wanted = counts.on_scale()
            found[KNN].values[places] = _nearest(x, y, wanted, mean)
            if KNN_COUNTS in found:
                expected = _nearest(x, y, counts, _mean(counts))
                group = training.batch_codes[cells[places]]
                measured = measured_features(training, modality)
                found[KNN_COUNTS].values[places] = predicted_on_scale(modality, expected, group, measured)
            found[RIDGE].values[places] = _ridge(x, y, wanted, mean)
            served[places] = True
            facts = {"cells": len(places), "training_cells": len(train)}
            for name in regressions:
                found[name].parameters["sources"][" + ".join(chosen)] = facts
            break
    for name in regressions:
        found[name].parameters["cells_given_the_mean"] = int((~served).sum())
    if labels is not None:
        found[ORACLE] = _by_type(target, known, labels, cells, mean, training, modality)
    return found


def _some(cells: Numbers, rng: np.random.Generator) -> Numbers:
    if len(cells) <= _MOST_TRAINING_CELLS:
        return cells
    return np.sort(rng.choice(cells, _MOST_TRAINING_CELLS, replace=False))


def _groups(training: Mosaic, modality: str, cells: Numbers) -> list[tuple[tuple[str, ...], Numbers]]:
    """Cells by the other modalities that they have: (modalities, positions in ``cells``)."""
    others = [name for name in training.modalities if name != modality]
    if not others:
        return []
    has = np.stack([training.measured(name)[cells] for name in others], axis=1)
    groups = []
    for row in np.unique(has, axis=0):
        names = tuple(name for name, there in zip(others, row, strict=True) if there)
        groups.append((names, np.flatnonzero((has == row).all(axis=1))))
    return groups


def _candidates(training: Mosaic, modality: str, sources: tuple[str, ...]) -> list[tuple[tuple[str, ...], Numbers]]:
    """Parts of ``sources`` with the training cells that have them and the target: larger parts, then more cells."""
    target = training.measured(modality)
    found = []
    for size in range(len(sources), 0, -1):
        parts = []
        for part in combinations(sources, size):
            both = target & np.all([training.measured(name) for name in part], axis=0)
            if both.sum() >= 3:
                parts.append((part, np.flatnonzero(both)))
        found += sorted(parts, key=lambda item: -len(item[1]))
    return found


def _represent(
    training: Mosaic, sources: tuple[str, ...], train: Numbers, test: Numbers, seed: int
) -> tuple[Floats, Floats]:
    pairs = [
        components(gather(training, name, train), gather(training, name, test), COMPONENTS, seed) for name in sources
    ]
    return np.hstack([a for a, _ in pairs]), np.hstack([b for _, b in pairs])


def _mean(view: View) -> Floats:
    """Mean of each feature over the cells that it was measured in; 0 for one that was measured in none."""
    n = np.bincount(view.group, minlength=len(view.measured)) @ view.measured
    return np.asarray(np.asarray(view.x.sum(axis=0)).ravel() / np.maximum(n, 1), dtype=np.float32)


def _nearest(x: Floats, y: Floats, target: View, mean: Floats) -> Floats:
    """Mean of the target over the nearest training cells (those of them that measured the feature)."""
    from sklearn.neighbors import NearestNeighbors

    k = min(NEIGHBOURS, len(x))
    graph = NearestNeighbors(n_neighbors=k).fit(x).kneighbors_graph(y)
    sums = np.asarray((graph @ target.x).todense(), dtype=np.float32)
    in_group = np.zeros((len(x), len(target.measured)), np.float32)
    in_group[np.arange(len(x)), target.group] = 1
    n = (graph @ in_group) @ target.measured.astype(np.float32)
    return np.asarray(np.where(n > 0, sums / np.maximum(n, 1), mean), dtype=np.float32)


def _ridge(x: Floats, y: Floats, target: View, mean: Floats) -> Floats:
    """Ridge regression of every feature, each on the cells that measured it."""
    result = np.broadcast_to(mean, (len(y), len(mean))).astype(np.float32)
    for rows, columns in blocks_by_feature(target.group, target.measured):
        a = x[rows].astype(np.float64)
        centre = a.mean(axis=0)
        a -= centre
        wanted = target.x[rows][:, columns]
        level = np.asarray(wanted.mean(axis=0)).ravel()
        gram = a.T @ a + _RIDGE * np.eye(a.shape[1])
        weights = np.linalg.solve(gram, np.asarray((wanted.T @ a).T, dtype=np.float64))
        result[:, columns] = (y - centre) @ weights + level
    return result


def _by_type(
    target: View, known: Numbers, labels: Any, cells: Numbers, mean: Floats, training: Mosaic, modality: str
) -> Baseline:
    import pandas as pd

    codes = pd.Categorical(labels).codes
    train = known if target.x.shape[0] == len(known) else known[:0]
    if not len(train):  # thinned: take the same number of cells again, spread over all
        train = known[:: -(-len(known) // _MOST_TRAINING_CELLS)]
        target = gather(training, modality, train).on_scale()
    result = np.broadcast_to(mean, (len(cells), len(mean))).astype(np.float32)
    for code in np.unique(codes[cells]):
        rows = np.flatnonzero(codes[train] == code)
        if code >= 0 and len(rows):
            of_type = View(target.modality, target.x[rows], target.group[rows], target.measured)
            result[codes[cells] == code] = _mean(of_type)
    return Baseline(result, {"oracle": "uses the true labels of the predicted cells"})
