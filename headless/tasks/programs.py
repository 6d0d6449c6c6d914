"""Programs: what each latent dimension does to every feature, read off pseudocells.

One dimension is moved from one end of the prior to the other while all others stay at 0; the decoded means of these
pseudocells are compared with the moved values by Spearman's correlation (Minoura et al., Cell Reports Methods
1:100071, 2021). A decoded mean is a smooth function of one coordinate, so correlations near 1 are common: a small p
says "monotone", not "different across cells". The effect size says how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headless.errors import MosaicError
from headless.models.base import Module
from headless.tasks.base import CANNOT, inference
from headless.tasks.embed import latent_size
from headless.tasks.store import Store, replacing

Traversal = Literal["faithful", "corrected"]

#: Largest p that still counts, as in the public code; peaks were not published.
ALPHA: Mapping[str, float] = {"rna": 1e-12, "adt": 1e-2, "atac": 1e-12}
#: Step of the traversal, in standard deviations.
STEP = 0.5
#: Decoded means that differ by less than this share are the same number in float32.
SAME = 1e-6
#: Means below this are not told apart in ratios.
TINY = 1e-8

NOTE = "p says how monotone the decoded mean is along the dimension, not that cells differ; log2_ratio says how much."


@dataclass(frozen=True)
class Programs:
    """The programs of all dimensions.

    Attributes
    ----------
    tables
        Modality -> one row a dimension and feature: ``dimension`` (from 1), ``feature``, ``rho``, ``p``, ``q``
        (Benjamini-Hochberg within the dimension), ``kept`` (p below alpha), ``log2_ratio`` (last to first
        pseudocell), ``rank_up`` and ``rank_down`` (from 1 among the kept features that rise or fall, else missing).
    facts
        How they were made, JSON-ready.
    """

    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any]


def points(kind: Traversal) -> NDArray[np.float64]:
    """Values of the moved dimension in standard deviations: 20 from -5 to +4.5 (``faithful``), or 21 to +5."""
    return np.arange(-10, 10 if kind == "faithful" else 11, dtype=np.float64) * STEP


def programs(
    module: Module,
    *,
    kind: Traversal = "corrected",
    alpha: Mapping[str, float] = ALPHA,
    rank_by: Literal["rho", "log2_ratio"] = "rho",
    modalities: Sequence[str] | None = None,
    device: str = "cpu",
) -> Programs:
    """Traverse every dimension of the biological part of a trained module; the other dimensions stay at 0.

    Expected values are taken at a library of 10,000 where the method has libraries, and averaged over the batches in
    which the modality was measured.

    Parameters
    ----------
    kind
        ``corrected``: -5 to +5 standard deviations of the prior. ``faithful``: as the public code has it, without
        the end point and, for scMM, with ``sqrt(exp phi)`` for the standard deviation.
    alpha
        Modality -> largest p that still counts (1e-12 for those not named).
    rank_by
        Order of the ranked lists. Equal correlations are ordered by effect size.

    Raises
    ------
    MosaicError
        ``model.cannot`` if the method cannot decode without the data of a cell.
    """
    if module.needs_context:
        raise MosaicError(
            CANNOT, "The method decodes with the data of a cell in view, so it has no pseudocells to show programs of."
        )
    part = module.parts[module.biological]
    numbers = range(*part.indices(latent_size(module)))
    x = points(kind)
    with inference(module, device):
        sd = module.prior_sd(kind).to(device)[part]
        latent = torch.zeros(len(numbers), len(x), latent_size(module), device=device)
        for place, number in enumerate(numbers):
            latent[place, :, number] = torch.from_numpy(x).to(device, torch.float32) * sd[place]
        tables = {
            m: _table(module, m, latent, alpha.get(m, 1e-12), rank_by)
            for m in (module.layout.modalities if modalities is None else modalities)
        }
    has_library = type(module).standard_mean is not Module.standard_mean
    facts = {
        "traversal": kind,
        "points": [float(value) for value in x],
        "sd": [float(value) for value in sd.cpu()],
        "part": module.biological,
        "library": 10_000 if has_library else None,
        "alpha": {m: alpha.get(m, 1e-12) for m in tables},
        "rank_by": rank_by,
        "modalities": list(tables),
        "note": NOTE,
    }
    return Programs(tables, facts)


def pseudocells(module: Module, modality: str, latent: torch.Tensor) -> NDArray[np.float64]:
    """Expected values of latents ``(..., d)``, averaged over the batches that measured the modality."""
    flat = latent.reshape(-1, latent.shape[-1])
    names = module.layout.measured_in[modality] or module.layout.batches
    total: NDArray[np.float64] | None = None
    for name in names:
        codes = torch.full((len(flat),), module.layout.batches.index(name), dtype=torch.int64, device=flat.device)
        values = module.standard_mean(flat, modality, codes).double().cpu().numpy()
        total = values if total is None else total + values
    assert total is not None
    return np.asarray(total / len(names)).reshape(*latent.shape[:-1], -1)


def spearman(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spearman's correlation of ``x (s,)`` with every column of ``y (..., s, G)`` as one product of ranks.

    Returns
    -------
    rho, p
        ``(..., G)``; two-sided p by the t approximation. Where a column (or ``x``) is constant, 0 and 1.
    """
    from scipy.stats import rankdata, t

    def standard(values: NDArray[Any]) -> NDArray[np.float64]:
        ranks = rankdata(values, axis=-2)
        ranks = ranks - ranks.mean(axis=-2, keepdims=True)
        size = np.sqrt((ranks**2).sum(axis=-2, keepdims=True))
        return np.asarray(np.divide(ranks, size, out=np.zeros_like(ranks), where=size > 0), dtype=np.float64)

    n = len(x)
    rho = np.clip((standard(np.asarray(x)[:, None]) * standard(y)).sum(axis=-2), -1.0, 1.0)
    rho[np.abs(rho) > 1 - 1e-12] = np.sign(rho[np.abs(rho) > 1 - 1e-12])
    with np.errstate(divide="ignore"):
        p = 2 * t.sf(np.abs(rho) * np.sqrt((n - 2) / (1 - rho**2)), n - 2)
    return rho, p


def _table(
    module: Module, modality: str, latent: torch.Tensor, alpha: float, rank_by: Literal["rho", "log2_ratio"]
) -> pd.DataFrame:
    from scipy.stats import false_discovery_control

    values = pseudocells(module, modality, latent)
    largest = np.abs(values).max(axis=1)
    still = np.ptp(values, axis=1) <= SAME * largest
    rho, p = spearman(np.arange(values.shape[1]), np.where(still[:, None], largest[:, None], values))
    ratio = np.log2(np.maximum(values[:, -1], TINY)) - np.log2(np.maximum(values[:, 0], TINY))
    ratio[still] = 0.0
    kept = p < alpha
    dims, names = len(values), list(module.layout.features[modality])
    first, second = (rho, ratio) if rank_by == "rho" else (ratio, rho)
    return pd.DataFrame(
        {
            "dimension": np.repeat(np.arange(1, dims + 1), len(names)),
            "feature": names * dims,
            "rho": rho.ravel(),
            "p": p.ravel(),
            "q": false_discovery_control(p, axis=1).ravel(),
            "kept": kept.ravel(),
            "log2_ratio": ratio.ravel(),
            "rank_up": _ranks(first, second, kept & (rho > 0)).ravel(),
            "rank_down": _ranks(-first, -second, kept & (rho < 0)).ravel(),
        }
    ).astype({"rank_up": "Int64", "rank_down": "Int64"})


def _ranks(first: NDArray[Any], second: NDArray[Any], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ranks from 1, largest first, among the chosen of each row; NaN elsewhere."""
    ranks = np.full(chosen.shape, np.nan)
    for row, here in enumerate(chosen):
        own = np.flatnonzero(here)
        # Correlations that differ by rounding alone are equal.
        keys = (-np.round(second[row, own], 9), -np.round(first[row, own], 9))
        ranks[row, own[np.lexsort(keys)]] = np.arange(1, len(own) + 1)
    return ranks


def write_programs(found: Programs, store: Store) -> list[str]:
    """Write ``programs/<modality>.csv`` and the facts into the index; the files' names."""
    folder = store.folder / "programs"
    folder.mkdir(exist_ok=True)
    names = []
    for modality, table in found.tables.items():
        path: Path = folder / f"{modality}.csv"
        with replacing(path, "write the programs") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.8g")
        names.append(f"programs/{modality}.csv")
    store.index["programs"] = dict(found.facts)
    return names
