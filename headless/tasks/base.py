"""One pass over all cells in order: encode a block once, let every wanted array take its rows from it.

A pass never holds more than one block of cells in dense form. What a method cannot answer is left out with its
reason (``MosaicError model.cannot``) while the rest of the pass goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headless.data.minibatch import Minibatch, MinibatchMaker
from headless.data.mosaic import Mosaic
from headless.errors import MosaicError
from headless.models.base import Module, Posterior
from headless.models.likelihoods import Likelihood

#: A set of modalities to encode from; ``JOINT`` stands for all that a cell has.
Subset = tuple[str, ...]
JOINT: Subset = ()

#: Cells in one block, and rows in one chunk of a stored layer: a block is written as whole chunks.
BLOCK = 1024

CANNOT = "model.cannot"


class Sink(Protocol):
    """Rows are put here: a numpy array, a zarr array or an open ``.npy`` file."""

    def __setitem__(self, rows: slice, values: NDArray[np.float32], /) -> None: ...


@dataclass(frozen=True)
class Block:
    """Cells ``start`` ... ``stop - 1`` on their way through the network.

    Attributes
    ----------
    has
        Modality -> ``(n,)`` bool: which cells of the block have it.
    posteriors
        What was encoded, by subset; a subset that no cell of the block has is absent.
    """

    start: int
    stop: int
    batch: Minibatch
    has: Mapping[str, NDArray[np.bool_]]
    posteriors: Mapping[Subset, Posterior]

    @property
    def rows(self) -> slice:
        """The block's cells among all cells."""
        return slice(self.start, self.stop)

    def having(self, subset: Subset) -> NDArray[np.bool_]:
        """``(n,)``: cells that have every modality of ``subset``; for ``JOINT`` at least one modality."""
        return having(self.has, subset)


class Item(ABC):
    """One array that a pass fills, from one subset of the modalities.

    Attributes
    ----------
    name
        What the array is called in the results: ``latents/joint``, ``imputed/rna``, ``translated/rna_to_adt``.
    subset
        What it is encoded from.
    """

    name: str
    subset: Subset

    @abstractmethod
    def take(self, module: Module, block: Block) -> None:
        """Write the rows of this block; ``subset`` may be absent from the posteriors if no cell has it."""


def having(has: Mapping[str, NDArray[np.bool_]], subset: Subset) -> NDArray[np.bool_]:
    """``(n,)``: cells that have every modality of ``subset``; for ``JOINT`` at least one modality."""
    if subset == JOINT:
        return np.asarray(np.stack(list(has.values())).any(axis=0))
    return np.asarray(np.stack([has[modality] for modality in subset]).all(axis=0))


@contextmanager
def inference(module: Module, device: str) -> Iterator[None]:
    """The module on ``device``, in evaluation mode and without gradients; its mode is put back afterwards."""
    training = module.training
    module.to(device).eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(training)


def stream(
    module: Module,
    mosaic: Mosaic,
    items: Iterable[Item],
    device: str = "cpu",
    *,
    size: int = BLOCK,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Pass over all cells in order and fill every item.

    Returns
    -------
    The items that the method cannot answer: name -> reason.

    Raises
    ------
    MosaicError
        Whatever a module raises other than ``model.cannot``.
    """
    live, refused = list(items), dict[str, str]()
    maker = MinibatchMaker(mosaic, device, module.layout.covariates)
    measured = {modality: mosaic.measured(modality) for modality in mosaic.modalities}
    with inference(module, device):
        for start, batch in zip(range(0, mosaic.n_cells, size), maker.in_order(size), strict=True):
            stop = start + batch.n
            has = {modality: found[start:stop] for modality, found in measured.items()}
            posteriors = _encode(module, batch, has, live, refused)
            block = Block(start, stop, batch, has, posteriors)
            for item in [item for item in live if item.name not in refused]:
                _attempt([item.name], refused, item.take, module, block)
            live = [item for item in live if item.name not in refused]
            progress(stop, mosaic.n_cells)
            if not live:
                return refused
    return refused


def _encode(
    module: Module,
    batch: Minibatch,
    has: Mapping[str, NDArray[np.bool_]],
    items: Sequence[Item],
    refused: dict[str, str],
) -> dict[Subset, Posterior]:
    """Posteriors of the subsets that the items need and that some cell has.

    Modules keep what they learnt of each modality in the minibatch's cache, so a modality is encoded once.
    """
    found: dict[Subset, Posterior] = {}
    for subset in dict.fromkeys(item.subset for item in items):
        if having(has, subset).any():
            names = [item.name for item in items if item.subset == subset]
            posterior = _attempt(names, refused, module.encode, batch, None if subset == JOINT else subset)
            if posterior is not None:
                found[subset] = posterior
    return found


def _attempt(names: Sequence[str], refused: dict[str, str], call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except MosaicError as error:
        if error.code != CANNOT:
            raise
        refused.update(dict.fromkeys(names, error.message))
        return None


def decode(
    module: Module,
    latent: torch.Tensor,
    modality: str,
    codes: torch.Tensor,
    keep: NDArray[np.bool_],
    generator: torch.Generator | None = None,
    context: torch.Tensor | None = None,
) -> NDArray[np.float32]:
    """Expected values of the cells ``keep`` of a block, or a draw if a ``generator`` is given.

    Parameters
    ----------
    latent, codes
        ``(n, d)`` and ``(n,)``, on the module's device.
    keep
        ``(n,)``; the other rows of the answer are NaN.
    context
        That of the posterior, where it is to be used.

    Returns
    -------
    ``(n, D)`` float32.
    """
    if keep.all():
        return _values(module.decode(latent, modality, codes, context), generator)
    found = np.full((len(keep), module.layout.n_features(modality)), np.nan, dtype=np.float32)
    if keep.any():
        which = torch.from_numpy(np.flatnonzero(keep)).to(latent.device)
        some = None if context is None else context[which]
        found[keep] = _values(module.decode(latent[which], modality, codes[which], some), generator)
    return found


def _values(likelihood: Likelihood, generator: torch.Generator | None) -> NDArray[np.float32]:
    values = likelihood.mean if generator is None else likelihood.sample(generator)
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
