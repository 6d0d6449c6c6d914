"""Leave one cell type out: how well is a type predicted that training never saw?

The protocol of scVAEIT (Du, Cai and Roeder, PNAS 2022): train without a type, then hide one modality of its cells and
predict it from another. It shows whether a method has learnt how modalities go together, or recalls the types.
"""

from __future__ import annotations

import difflib
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from headless.data.mosaic import Mosaic
from headless.errors import MosaicError
from headless.evaluate.imputation import compare
from headless.evaluate.metric import Metrics, MetricValue
from headless.evaluate.predict import SCALE, on_log, only, predict, truth_on_log
from headless.evaluate.views import Numbers, gather

if TYPE_CHECKING:
    from headless.models.base import Module


def leave_out_type(mosaic: Mosaic, label: str) -> tuple[Mosaic, Numbers]:
    """The mosaic to train on, without any cell of a type, and the cells left out (numbers in ``mosaic``).

    Raises
    ------
    MosaicError
        ``data.no_labels`` without a label column, ``data.unknown_label`` with the nearest name, or
        ``data.nothing_left`` if all cells are of this type.
    """
    if "label" not in mosaic.cells:
        raise MosaicError(
            "data.no_labels",
            "The cells have no labels, so no type can be left out.",
            "Name the label column in the settings of the data.",
            field="label",
        )
    names = mosaic.cells["label"].astype(object).to_numpy()
    own = np.asarray(names == label)
    if not own.any():
        known = sorted({str(name) for name in names if isinstance(name, str)})
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Labels: {', '.join(known)}."
        raise MosaicError("data.unknown_label", f"No cell has the label {label!r}.", hint, field="label")
    if own.all():
        raise MosaicError(
            "data.nothing_left", f"All cells have the label {label!r}.", "Choose a finer label column.",
            field="label",
        )  # fmt: skip
    return only(mosaic, np.flatnonzero(~own)), np.flatnonzero(own)


def score_left_out(module: Module, mosaic: Mosaic, cells: Numbers, device: str = "cpu") -> dict[str, Metrics]:
    """Every modality of the left-out cells predicted from every other, ``"rna -> adt"`` -> metrics.

    Parameters
    ----------
    module
        Trained on the first part of :func:`leave_out_type`.
    mosaic, cells
        The whole mosaic, and its cells that were left out.

    Returns
    -------
    dict
        Metrics of :func:`headless.evaluate.imputation.compare`, flattened and per feature, on log1p of 10 000 parts
        (peaks: open or not), each with the number of cells; a direction that the method cannot predict is absent with
        its reason.
    """
    scores: dict[str, Metrics] = {}
    for source, target in permutations(mosaic.modalities, 2):
        able = mosaic.measured(source)[cells] & mosaic.measured(target)[cells]
        some = cells[able]
        if not len(some):
            continue
        name = f"{source} -> {target}"
        try:
            predicted = predict(module, mosaic, some, [source], target, device)
        except MosaicError as error:
            if error.code != "model.cannot":
                raise
            scores[name] = {"imputation": MetricValue.absent(error.message, cells=len(some))}
            continue
        view = gather(mosaic, target, some)
        truth, measured = truth_on_log(view, np.ones(view.measured.shape[1], dtype=bool))
        metrics = compare(target, truth, on_log(target, predicted, view.group, measured), view.group, measured)
        scale = {} if target == "atac" else {"scale": SCALE}
        scores[name] = {
            key: MetricValue(value=metric.value, reason=metric.reason, parameters=metric.parameters | scale)
            for key, metric in metrics.items()
        }
    return scores
