"""Predictions of a trained method for chosen cells, from chosen modalities, on the scale on which they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headless.data.mosaic import Mosaic
from headless.evaluate.views import Flags, Floats, Numbers, View

if TYPE_CHECKING:
    from headless.models.base import Module

SCALE = "log1p(10 000 x / sum over the compared features)"


def only(mosaic: Mosaic, cells: Numbers) -> Mosaic:
    """The mosaic of some cells (ascending), numbered anew; batches keep their codes, empty tiles are absent."""
    place = np.full(mosaic.n_cells, -1, dtype=np.int64)
    place[cells] = np.arange(len(cells))
    tiles = {}
    for key, tile in mosaic.tiles.items():
        keep = np.flatnonzero(place[tile.cells] >= 0)
        if len(keep):
            tiles[key] = replace(tile, source=tile.source.take(keep), cells=place[tile.cells[keep]])
    return replace(mosaic, cells=mosaic.cells.iloc[cells], tiles=tiles)


def predict(
    module: Module, mosaic: Mosaic, cells: Numbers, sources: Sequence[str] | None, target: str, device: str = "cpu"
) -> Floats:
    """Expected values ``(n, D)`` of ``target`` for ``cells``, encoded from the modalities ``sources`` alone.

    Raises
    ------
    MosaicError
        ``model.cannot`` if the method cannot encode or decode these.
    """
    from headless.data.minibatch import MinibatchMaker
    from headless.tasks.base import BLOCK, decode, inference

    maker = MinibatchMaker(mosaic, device, module.layout.covariates)
    found = np.zeros((len(cells), module.layout.n_features(target)), dtype=np.float32)
    with inference(module, device):
        start = 0
        for batch in maker.in_order(BLOCK, cells):
            posterior = module.encode(batch, sources)
            keep = np.ones(batch.n, dtype=bool)
            found[start : start + batch.n] = decode(
                module, posterior.mean, target, batch.batch, keep, context=posterior.context
            )
            start += batch.n
    return found


def truth_on_log(view: View, features: Flags) -> tuple[Floats, Flags]:
    """Measured values ``(n, D)`` normalised over ``features`` (and to log1p), and what was measured of them."""
    measured = view.measured & features
    values = np.asarray(view.x.todense(), dtype=np.float32)
    return on_log(view.modality, values, view.group, measured), measured


def on_log(modality: str, x: Floats, group: Numbers, measured: Flags) -> Floats:
    """Counts or expected counts ``(n, D)`` as log1p of 10 000 parts, by group over its measured features.

    Peaks are open or not (truth) or a probability (prediction), and stay what they are.
    """
    if modality == "atac":
        return x if ((x > 0) & (x < 1)).any() else (x > 0.5).astype(np.float32)
    out = np.zeros_like(x)
    for code in np.unique(group):
        rows, columns = np.flatnonzero(group == code), np.flatnonzero(measured[code])
        part: Any = np.maximum(x[np.ix_(rows, columns)], 0)
        total = part.sum(axis=1, dtype=np.float64, keepdims=True)
        out[np.ix_(rows, columns)] = np.log1p(np.divide(1e4 * part, total, out=np.zeros_like(part), where=total > 0))
    return out
