"""Embedding: posterior means of every cell, from all its modalities and from each one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from headless.models.base import Module
from headless.tasks.base import JOINT, Block, Item, Sink, Subset


def latent_size(module: Module) -> int:
    """Number of latent dimensions of a module: where the last of its parts ends."""
    return max(int(part.stop) for part in module.parts.values())


def pieces(parts: Mapping[str, slice], d: int) -> dict[str, slice]:
    """What is stored of a latent of ``d`` dimensions: its named parts.

    If the parts do not tile the dimensions exactly (some left out, some shared), the whole is stored too, under the
    empty name, because decoding needs it.
    """
    covered = np.zeros(d, dtype=int)
    for part in parts.values():
        covered[part] += 1
    whole = {} if (covered == 1).all() else {"": slice(0, d)}
    return {**whole, **dict(parts)}


def width(part: slice, d: int) -> int:
    """Number of dimensions of a part of a latent of ``d`` dimensions."""
    return len(range(*part.indices(d)))


def posterior_names(modalities: Sequence[str]) -> dict[str, Subset]:
    """The posteriors that an embedding consists of: ``joint``, then each modality alone."""
    return {"joint": JOINT, **{modality: (modality,) for modality in modalities}}


class Latent(Item):
    """The posterior mean from one subset; NaN rows where a cell lacks it.

    Parameters
    ----------
    name
        ``joint`` or a modality; the item is called ``latents/<name>``.
    parts
        What is stored, as :func:`pieces` gives it: part name -> dimensions.
    sinks
        Part name -> where its ``(n_cells, d_part)`` rows go.
    """

    def __init__(self, name: str, subset: Subset, parts: Mapping[str, slice], sinks: Mapping[str, Sink]) -> None:
        self.name = f"latents/{name}"
        self.subset = subset
        self.parts = parts
        self.sinks = sinks

    def take(self, module: Module, block: Block) -> None:
        mean = self._mean(block, latent_size(module))
        for name, part in self.parts.items():
            self.sinks[name][block.rows] = np.ascontiguousarray(mean[:, part])

    def _mean(self, block: Block, d: int) -> NDArray[np.float32]:
        posterior = block.posteriors.get(self.subset)
        if posterior is None:
            return np.full((block.stop - block.start, d), np.nan, dtype=np.float32)
        mean: NDArray[np.float32] = posterior.mean.float().cpu().numpy()
        return np.where(block.having(self.subset)[:, None], mean, np.float32(np.nan))
