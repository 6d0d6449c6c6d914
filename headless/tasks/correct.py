"""Batch correction: decode every cell after its technical latents were made equal.

What "equal" means is the method's own answer (:meth:`headless.models.base.Module.corrected`). For MIDAS it is the
standard noise of He et al. 2024: the mean technical latent of the batch nearest to the mean over all cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from headless.data.minibatch import MinibatchMaker
from headless.data.mosaic import Mosaic
from headless.models.base import Module
from headless.tasks.base import BLOCK, decode, inference


def corrected_latents(
    module: Module, latents: NDArray[np.float32], codes: NDArray[np.int64], device: str = "cpu"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Latents ``(n_cells, d)`` and batch codes ``(n_cells,)`` of all cells with technical effects made equal.

    Cells without a latent (NaN rows) take no part and stay NaN.

    Raises
    ------
    MosaicError
        ``model.cannot`` if the method has no batch correction.
    """
    valid = np.isfinite(latents).all(axis=1)
    found, found_codes = np.array(latents), np.array(codes)
    if valid.any():
        with inference(module, device):
            latent, code = module.corrected(
                torch.from_numpy(found[valid]).to(device), torch.from_numpy(found_codes[valid]).to(device)
            )
        found[valid], found_codes[valid] = latent.float().cpu().numpy(), code.cpu().numpy()
    return found, found_codes


def decode_blocks(
    module: Module,
    latents: NDArray[np.float32],
    codes: NDArray[np.int64],
    modality: str,
    device: str = "cpu",
    *,
    size: int = BLOCK,
    sample: bool = False,
    seed: int = 0,
    mosaic: Mosaic | None = None,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Decode stored latents block by block: (rows, values ``(n, D)``); NaN rows where the latent is NaN.

    ``sample`` draws from the likelihood with the random state ``seed`` instead of taking expected values. ``mosaic``
    is asked for the cells again where the module needs their context to decode; all others decode with what is
    typical (the median library size), so that technical depth is taken out too.
    """
    generator = torch.Generator(device=device).manual_seed(seed) if sample else None
    maker = None
    if module.needs_context:
        if mosaic is None:
            raise ValueError("the module needs the context of the cells")
        maker = MinibatchMaker(mosaic, device, module.layout.covariates)
    for start in range(0, len(latents), size):
        rows = slice(start, min(start + size, len(latents)))
        block = np.array(latents[rows])
        keep = np.asarray(np.isfinite(block).all(axis=1))
        with inference(module, device):
            context = None
            if maker is not None:
                context = module.encode(maker.make(np.arange(rows.start, rows.stop))).context
            values = decode(
                module,
                torch.from_numpy(block).to(device),
                modality,
                torch.from_numpy(np.array(codes[rows])).to(device),
                keep,
                generator,
                context,
            )
        yield rows, values
