"""Cells with gaps: a trained method asked of panels that lack features, without any training on them.

Two protocols of scVAEIT (Du, Cai and Roeder, PNAS 2022), for any method that can answer: transfer to another data set
whose panel shares only part of the features, and features hidden on purpose in rising proportions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from headless.data.mosaic import Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.evaluate.imputation import compare
from headless.evaluate.metric import Metrics, MetricValue
from headless.evaluate.predict import SCALE, on_log, only, predict, truth_on_log
from headless.evaluate.views import Flags, Numbers, gather, measured_features

if TYPE_CHECKING:
    from headless.models.base import Module

PROPORTIONS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
REPEATS = 10


@dataclass(frozen=True)
class Panel:
    """One modality's constants of the training cells for a set of features.

    Attributes
    ----------
    features
        ``(D,)`` bool.
    median
        Median total over these features of cells that are normalised to 10 000 counts.
    library
        Median counts of a cell over all features.
    """

    features: Flags
    median: float
    library: float


def harmonised(name: str) -> str:
    """A feature's name as it is compared across sources: upper case, ``_`` and ``.`` as ``-``."""
    return re.sub(r"[_.]", "-", str(name)).upper()


def panel(training: Mosaic, modality: str, features: Flags) -> Panel:
    """The constants of a set of features, from the training cells that were measured for all of them.

    Raises
    ------
    MosaicError
        ``data.no_reference`` if there is no such cell.
    """
    measured = measured_features(training, modality)
    parts, totals = [], []
    for code, batch in enumerate(training.batches):
        tile = training.tiles.get((batch, modality))
        if tile is None or not measured[code][features].all():
            continue
        x = tile.source.all_rows().to_scipy()
        total = np.asarray(x.sum(axis=1)).ravel()
        some = total > 0
        parts.append(1e4 * np.asarray(x[:, np.flatnonzero(features)].sum(axis=1)).ravel()[some] / total[some])
        totals.append(total[some])
    if not parts or not sum(map(len, parts)):
        raise MosaicError(
            "data.no_reference",
            f"No training batch measured all of the {int(features.sum())} features of {modality} that are compared.",
            "Choose features that a batch of the training data has.",
        )
    return Panel(features, float(np.median(np.concatenate(parts))), float(np.median(np.concatenate(totals))))


def _placed(x: Any, columns: Numbers, d: int, constants: Panel) -> Any:
    """Rows over ``columns`` of a panel of ``d`` features, each scaled to the training cells' median total.

    The total is that of cells normalised to 10 000, times the median depth: a method that normalises sees the former
    whatever the latter, and one that reads counts sees a depth that it knows.
    """
    import scipy.sparse as sp

    total = np.asarray(x.sum(axis=1)).ravel()
    wanted = constants.median * constants.library / 1e4
    factor = np.divide(wanted, total, out=np.zeros(len(total)), where=total > 0)
    x = sp.coo_matrix(sp.diags(factor) @ x)
    return sp.csr_matrix((x.data.astype(np.float32), (x.row, columns[x.col])), shape=(x.shape[0], d))


def on_panel(training: Mosaic, external: Mosaic) -> Mosaic:
    """Other cells on the features of the training mosaic: shared ones in their places, all others missing.

    Counts are scaled (sheet of scVAEIT, section 6; constants by modality); peaks are not. All cells get the batch of
    the training mosaic that has most cells; covariates that are not given count as typical.

    Raises
    ------
    MosaicError
        ``data.no_shared_features`` if no modality shares two features.
    """
    sizes = np.bincount(training.batch_codes, minlength=len(training.batches))
    home = training.batches[int(sizes.argmax())]
    tiles: dict[tuple[str, str], Tile] = {}
    for m in [m for m in training.modalities if m in external.modalities]:
        place: dict[str, int] = {}
        for number, name in enumerate(training.features[m].index):
            place.setdefault(harmonised(name), number)
        theirs = [place.get(harmonised(name), -1) for name in external.features[m].index]
        to = np.asarray(theirs, dtype=np.int64)
        # Two names that become one after harmonising: the first counts.
        _, first = np.unique(to, return_index=True)
        twice = np.ones(len(to), dtype=bool)
        twice[first] = False
        to[twice] = -1
        able = measured_features(external, m)
        batches = [code for code, b in enumerate(external.batches) if (b, m) in external.tiles]
        shared = np.flatnonzero((to >= 0) & able[batches].all(axis=0)) if batches else np.empty(0, np.int64)
        if len(shared) < 2:
            continue
        mask = np.zeros(len(training.features[m]), dtype=bool)
        mask[to[shared]] = True
        cells = np.flatnonzero(external.measured(m))
        x = gather(external, m, cells).x[:, shared]
        if m == "atac":
            import scipy.sparse as sp

            coo = sp.coo_matrix(x)
            x = sp.csr_matrix((coo.data, (coo.row, to[shared][coo.col])), shape=(len(cells), len(mask)))
        else:
            x = _placed(x, to[shared], len(mask), panel(training, m, mask))
        tiles[home, m] = Tile(home, m, MemoryRows(x), cells, None if mask.all() else mask)
    if not tiles:
        raise MosaicError(
            "data.no_shared_features",
            "The two data sets share no features (at least two of a modality are needed).",
            "Check that both use the same kind of names.",
        )
    cells_table = external.cells.assign(batch=home)
    for column in [c for c in training.cells.columns if c not in cells_table]:
        cells_table[column] = None
    return Mosaic(cells_table, training.batches, training.features, tiles)


def score_transfer(
    module: Module, training: Mosaic, external: Mosaic, source: str, target: str, device: str = "cpu"
) -> Metrics:
    """Predict ``target`` of other cells from their ``source``, on the shared features, without fine-tuning.

    Both sides are brought to 10 000 counts over the shared features and log1p (peaks: open or not).

    Returns
    -------
    Metrics
        As :func:`headless.evaluate.imputation.compare`, with the numbers of shared features; absent with the reason
        if the method cannot answer.
    """
    placed = on_panel(training, external)
    home = next(b for (b, _) in placed.tiles)
    for m in (source, target):
        if (home, m) not in placed.tiles:
            raise MosaicError(
                "data.no_shared_features", f"The two data sets share no features of {m}.",
                "Check that both use the same kind of names.", field=m,
            )  # fmt: skip
    cells = np.flatnonzero(placed.measured(source) & placed.measured(target))
    facts = {f"shared_{m}": placed.tiles[home, m].n_features for m in (source, target)} | {"cells": len(cells)}
    try:
        predicted = predict(module, placed, cells, [source], target, device)
    except MosaicError as error:
        if error.code != "model.cannot":
            raise
        return {"imputation": MetricValue.absent(error.message, **facts)}
    view = gather(placed, target, cells)
    truth, measured = truth_on_log(view, np.ones(view.measured.shape[1], dtype=bool))
    metrics = compare(target, truth, on_log(target, predicted, view.group, measured), view.group, measured)
    extra = facts if target == "atac" else facts | {"scale": SCALE}
    return {
        key: MetricValue(value=metric.value, reason=metric.reason, parameters=metric.parameters | extra)
        for key, metric in metrics.items()
    }


def without_features(training: Mosaic, mosaic: Mosaic, modality: str, hidden: Flags) -> Mosaic:
    """The mosaic with features of a modality missing in all cells, the others scaled as in :func:`on_panel`."""
    keep = ~hidden
    constants = None if modality == "atac" else panel(training, modality, keep)
    columns = np.flatnonzero(keep)
    tiles = dict(mosaic.tiles)
    for (batch, m), tile in mosaic.tiles.items():
        if m != modality:
            continue
        mask = keep if tile.mask is None else keep & tile.mask
        x = tile.source.all_rows().to_scipy()[:, columns]
        if constants is None:
            import scipy.sparse as sp

            coo = sp.coo_matrix(x)
            x = sp.csr_matrix((coo.data, (coo.row, columns[coo.col])), shape=(x.shape[0], len(keep)))
        else:
            x = _placed(x, columns, len(keep), constants)
        tiles[batch, m] = replace(tile, source=MemoryRows(x), mask=mask)
    return replace(mosaic, tiles=tiles)


def score_gaps(
    module: Module,
    training: Mosaic,
    mosaic: Mosaic,
    cells: Numbers,
    modality: str,
    *,
    sources: Sequence[str] | None = None,
    proportions: Sequence[float] = PROPORTIONS,
    repeats: int = REPEATS,
    seed: int = 0,
    device: str = "cpu",
) -> pd.DataFrame:
    """Hide part of the features of a modality at test time and predict them.

    Parameters
    ----------
    module, training
        A trained method, and the mosaic that it was trained on (for the constants of scaling).
    mosaic, cells
        Where the cells are; all must have the modality.
    sources
        Modalities to encode from; the modality itself alone by default.
    proportions, repeats
        For each proportion so many random sets of hidden features, the same for every method with this ``seed``.

    Returns
    -------
    One row a proportion and repeat: ``proportion``, ``repeat``, ``hidden`` (features), then every metric of
    :func:`headless.evaluate.imputation.compare` over the hidden features (NaN if undefined).

    Raises
    ------
    MosaicError
        ``model.cannot`` if the method cannot encode or decode the modality.
    """
    some = only(mosaic, np.sort(np.asarray(cells)))
    numbers = np.arange(some.n_cells)
    view = gather(some, modality, numbers)
    d = view.measured.shape[1]
    rows = []
    for proportion in proportions:
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, round(1000 * proportion), repeat])
            hidden = np.zeros(d, dtype=bool)
            hidden[rng.permutation(d)[: min(d - 1, max(1, round(proportion * d)))]] = True
            asked = without_features(training, some, modality, hidden)
            predicted = predict(module, asked, numbers, [modality] if sources is None else sources, modality, device)
            everything = np.ones(d, dtype=bool)
            truth, measured = truth_on_log(view, everything)
            found = on_log(modality, predicted, view.group, measured)
            metrics = compare(modality, truth, found, view.group, view.measured & hidden)
            values = {name: np.nan if metric.value is None else metric.value for name, metric in metrics.items()}
            rows.append({"proportion": proportion, "repeat": repeat, "hidden": int(hidden.sum()), **values})
    return pd.DataFrame(rows)
