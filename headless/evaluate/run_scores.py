"""The scores of one run, the baselines beside them: what ``results/metrics.json`` holds.

Layout; every metric is a :class:`headless.evaluate.metric.MetricValue` (``value``, ``reason``, ``parameters``)::

    schema_version, cells, labels, seconds
    scib          {"model": {metric: value}}                 the joint embedding
    alignment     {"rna ~ adt": {metric: value}}             unimodal embeddings of the same cells
    imputation    {"adt": {"model": {metric: value}}}        values hidden from training, against the truth
    baselines     {"scib": {"PCA, not integrated": {...}}, "imputation": {"adt": {"kNN regression": {...}}}}
    absent        {what: reason}                             whole parts that could not be computed
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from headless.errors import MosaicError
from headless.evaluate import baselines
from headless.evaluate.foscttm import foscttm
from headless.evaluate.imputation import compare
from headless.evaluate.metric import Metrics, MetricValue, as_plain, measure
from headless.evaluate.scib import Settings, has_label, scib
from headless.evaluate.views import Floats, Numbers, View, gather, predicted_on_scale, unintegrated

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic
    from headless.results import Results

SCHEMA_VERSION: Final = 1
MODEL: Final = "model"
PCA: Final = "PCA, not integrated"

_MOST_ALIGNED_CELLS = 20_000
_MOST_VALUES = 40_000_000  # cells x features that are made dense for imputation scores
_ROWS = 1024  # rows of a stored layer read at a time


def score_run(
    results_folder: str | Path,
    truth: Mosaic,
    hidden: Mapping[str, NDArray[np.int64]],
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Score a run and write ``metrics.json`` (whole or not at all) into its results.

    Parameters
    ----------
    results_folder
        The run's ``results``, complete but for ``metrics.json``.
    truth
        The whole mosaic of the run, hidden values included.
    hidden
        Modality -> cells in which it was hidden from training (:func:`headless.data.holdout.choose`).

    Returns
    -------
    dict
        What was written (layout above), JSON-ready.

    Raises
    ------
    MosaicError
        ``run.no_result``, ``run.damaged`` (results that do not belong to these cells, too), ``disk.*``. A metric that
        fails is absent with its reason instead.
    """
    from headless.files import as_json, write_atomic
    from headless.results import Results

    begin = time.monotonic()
    results = Results(results_folder)
    if list(results.cells.index) != list(map(str, truth.cells.index)):
        raise MosaicError(
            "run.damaged",
            f"The results hold {results.n_cells} cells that are not the {truth.n_cells} cells of the data.",
            "The data or the preparation changed after the run; run it again.",
            file=results.folder,
        )
    settings = settings or Settings()
    training = truth.without(hidden)
    labels = _labels(truth)
    batches = truth.cells["batch"].to_numpy()
    scores: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "cells": truth.n_cells,
        "labels": None if labels is None else len(set(labels[has_label(labels)])),
        "scib": {},
        "alignment": {},
        "imputation": {},
        "baselines": {"scib": {}, "imputation": {}},
        "absent": {},
    }
    if labels is None:
        scores["absent"]["labels"] = "no label column was named, so only scores that need no labels are computed"
    with _or_absent(scores["absent"], "scib"):
        embedding = results.latents(f"joint.{results.biological}")
        scores["scib"][MODEL] = as_plain(scib(embedding, batches, labels, settings))
    with _or_absent(scores["absent"], f"scib of {PCA}"):
        scores["baselines"]["scib"][PCA] = as_plain(scib(unintegrated(training), batches, labels, settings))
    scores["alignment"] = {
        name: as_plain(metrics) for name, metrics in _alignment(results, labels, settings.seed).items()
    }
    if not any(len(cells) for cells in hidden.values()):
        scores["absent"]["imputation"] = "nothing was hidden from training (holdout fraction 0)"
    for modality, cells in hidden.items():
        if len(cells):
            with _or_absent(scores["absent"], f"imputation of {modality}"):
                rows = _imputation(results, truth, training, modality, cells, labels, settings.seed)
                model = rows.pop(MODEL)
                scores["baselines"]["imputation"][modality] = {name: as_plain(row) for name, row in rows.items()}
                scores["imputation"][modality] = {MODEL: as_plain(model)}
    scores["seconds"] = round(time.monotonic() - begin, 1)
    write_atomic(results.folder / "metrics.json", as_json(scores, indent=1) + "\n", "write the scores")
    return scores


@contextmanager
def _or_absent(absent: dict[str, str], name: str) -> Iterator[None]:
    """Note why a part could not be computed and go on; a damaged or unwritable folder is an error all the same."""
    try:
        yield
    except MosaicError as error:
        if error.code not in ("run.no_result", "model.cannot"):
            raise
        absent[name] = str(error)
    except ValueError as error:
        absent[name] = str(error)


def _labels(mosaic: Mosaic) -> NDArray[Any] | None:
    if "label" not in mosaic.cells:
        return None
    labels = mosaic.cells["label"].astype(object).to_numpy()
    return labels if has_label(labels).any() else None


def _alignment(results: Results, labels: NDArray[Any] | None, seed: int) -> dict[str, Metrics]:
    """Do the unimodal embeddings of a cell meet? On cells that training saw with both modalities."""
    found: dict[str, Metrics] = {}
    for a, b in combinations(results.modalities, 2):
        try:
            x, y = (results.latents(f"{name}.{results.biological}") for name in (a, b))
        except MosaicError as error:
            if error.code != "run.no_result":
                raise
            found[f"{a} ~ {b}"] = {"foscttm": MetricValue.absent(error.message)}
            continue
        both = np.flatnonzero(np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1))
        facts: dict[str, Any] = {"cells": len(both), "note": "cells that training saw with both modalities"}
        if len(both) < 2:
            found[f"{a} ~ {b}"] = {"foscttm": MetricValue.absent("no cell has both modalities", **facts)}
            continue
        if len(both) > _MOST_ALIGNED_CELLS:
            facts |= {"subsampled_from": len(both), "cells": _MOST_ALIGNED_CELLS}
            both = np.sort(np.random.default_rng(seed).choice(both, _MOST_ALIGNED_CELLS, replace=False))
        x, y = np.asarray(x[both]), np.asarray(y[both])
        found[f"{a} ~ {b}"] = _pair(x, y, None if labels is None else labels[both], facts)
    return found


def _pair(x: Floats, y: Floats, labels: NDArray[Any] | None, facts: dict[str, Any]) -> Metrics:
    if not (np.ptp(x, axis=0).any() and np.ptp(y, axis=0).any()):
        # All cells in one point would count as perfectly aligned.
        return {"foscttm": MetricValue.absent("an embedding is the same for all cells", **facts)}
    metrics = {"foscttm": measure(lambda: foscttm(x, y), {**facts, "lower_is_better": True, "random": 0.5})}
    if labels is not None:
        metrics["label_transfer"] = measure(
            lambda: _label_transfer(x, y, labels), {**facts, "k": 5, "weights": "distance", "directions": "both"}
        )
    return metrics


def _label_transfer(x: Floats, y: Floats, labels: NDArray[Any]) -> float:
    """Micro-F1 of a 5-NN classifier trained on one modality and asked of the other; mean of both directions."""
    from sklearn.neighbors import KNeighborsClassifier

    good = has_label(labels)
    x, y, names = x[good], y[good], labels[good].astype(str)
    scores = []
    for train, test in ((x, y), (y, x)):
        model = KNeighborsClassifier(min(5, len(train)), weights="distance").fit(train, names)
        scores.append(np.mean(model.predict(test) == names))
    return float(np.mean(scores))


def _imputation(
    results: Results,
    truth: Mosaic,
    training: Mosaic,
    modality: str,
    cells: Numbers,
    labels: NDArray[Any] | None,
    seed: int,
) -> dict[str, Metrics]:
    """Rows (model and baselines) of one hidden modality, all on the same cells."""
    facts: dict[str, Any] = {"hidden_cells": len(cells)}
    most = max(2, _MOST_VALUES // len(truth.features[modality]))
    if len(cells) > most:
        facts["subsampled_to"] = most
        cells = np.sort(np.random.default_rng(seed).choice(cells, most, replace=False))
    wanted = gather(truth, modality, cells)
    values = np.asarray(wanted.on_scale().x.todense(), dtype=np.float32)
    rows = {MODEL: _model_row(results, wanted, values, cells, facts)}
    types = None
    if labels is not None:
        types = [label if good else None for label, good in zip(labels, has_label(labels), strict=True)]
    for name, baseline in baselines.predict(training, modality, cells, types, seed).items():
        row = compare(modality, values, baseline.values, wanted.group, wanted.measured)
        rows[name] = _with(row, facts | baseline.parameters)
    return rows


def _model_row(results: Results, wanted: View, values: Floats, cells: Numbers, facts: dict[str, Any]) -> Metrics:
    modality = wanted.modality
    name = f"imputed/{modality}"
    if name not in results.layers:
        reason = results.cannot.get(name, "the output 'imputed' was not asked for")
        return {"imputation": MetricValue.absent(reason, **facts)}
    predicted = _layer_rows(results, modality, cells)
    good = np.flatnonzero(np.isfinite(predicted).all(axis=1))
    if len(good) < len(cells):
        facts = facts | {"cells_without_prediction": len(cells) - len(good)}
    if not len(good):
        return {"imputation": MetricValue.absent("no hidden cell has a prediction", **facts)}
    group = wanted.group[good]
    scaled = predicted_on_scale(modality, predicted[good], group, wanted.measured)
    return _with(compare(modality, values[good], scaled, group, wanted.measured), facts)


def _layer_rows(results: Results, modality: str, cells: Numbers) -> Floats:
    """Rows of the imputed layer, read in the pieces that it is stored in."""
    blocks = []
    for block in np.unique(cells // _ROWS):
        inside = cells[cells // _ROWS == block]
        rows = results.rows("imputed", modality, slice(int(block) * _ROWS, (int(block) + 1) * _ROWS))
        blocks.append(rows[inside - block * _ROWS])
    return np.concatenate(blocks)


def _with(metrics: Metrics, facts: dict[str, Any]) -> Metrics:
    return {
        name: MetricValue(value=metric.value, reason=metric.reason, parameters=metric.parameters | facts)
        for name, metric in metrics.items()
    }
