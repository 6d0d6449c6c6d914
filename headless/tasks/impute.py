"""Imputation: expected values of every modality for every cell, decoded from the joint posterior mean.

Observed cells are imputed too. MIDAS: He et al. 2024; the methods note, section 6.2, says why imputation is better
judged by translation or by hidden cells than by observed ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headless.data.minibatch import Minibatch
from headless.models.base import Module
from headless.models.likelihoods import Bernoulli
from headless.tasks.base import JOINT, Block, Item, Sink, Subset, decode


class Decoded(Item):
    """One modality decoded from the posterior given a subset, with each cell's own technical latent and batch.

    Rows of cells that lack a modality of the subset are NaN; blocks without any such cell are not written, so the
    sink must start as NaN.

    Parameters
    ----------
    keep_observed
        Return measured values where they exist (the cell has the modality and the feature was measured there):
        counts, or open/closed where the decoder gives the probability of an open peak.
    """

    def __init__(self, name: str, subset: Subset, modality: str, sink: Sink, keep_observed: bool = False) -> None:
        self.name = name
        self.subset = subset
        self.modality = modality
        self.sink = sink
        self.keep_observed = keep_observed

    def take(self, module: Module, block: Block) -> None:
        posterior = block.posteriors.get(self.subset)
        if posterior is None:
            return
        latent, codes, context = posterior.mean, block.batch.batch, posterior.context
        values = decode(module, latent, self.modality, codes, block.having(self.subset), context=context)
        if self.keep_observed:
            likelihood = module.decode(latent[:1], self.modality, codes[:1], None if context is None else context[:1])
            put_observed(values, block.batch, self.modality, binary=isinstance(likelihood, Bernoulli))
        self.sink[block.rows] = values


def imputed(modality: str, sink: Sink, keep_observed: bool = False) -> Decoded:
    """Expected values of a modality for all cells, from the joint posterior mean."""
    return Decoded(f"imputed/{modality}", JOINT, modality, sink, keep_observed)


def put_observed(values: NDArray[np.float32], batch: Minibatch, modality: str, binary: bool = False) -> None:
    """Replace expected values ``(n, D)`` by measured ones (``binary``: by 0 and 1), in place, where there are any."""
    tile = batch.x.get(modality)
    if tile is None:
        return
    rows = np.arange(batch.n) if tile.rows is None else tile.rows.cpu().numpy()
    measured = tile.dense.cpu().numpy()
    if binary:
        measured = (measured > 0.5).astype(np.float32)
    if tile.mask is None:
        values[rows] = measured
    else:
        values[rows] = np.where(tile.mask.cpu().numpy() > 0, measured, values[rows])
