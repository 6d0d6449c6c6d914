"""Quality of cells, one modality of one batch at a time: metrics, suggested limits, which cells pass.

Metrics come from the raw sparse counts over all measured features, before any feature is chosen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data import proteins
from headless.data.columns import blocks
from headless.data.preparation import Thresholds
from headless.data.sources import RowSource

#: Median absolute deviations at which limits are suggested; lenient, as recommended for heterogeneous tissue
#: (Germain et al., Genome Biology 2020; Heumos et al., Nature Reviews Genetics 2023), and stricter for mitochondria.
N_MADS, N_MADS_MITO = 5.0, 3.0


def metrics(source: RowSource, features: pd.Index, modality: str) -> pd.DataFrame:
    """Per cell: ``counts``, ``features`` (detected), for RNA ``mito`` (share, 0 to 1), for protein ``isotype``.

    ``mito`` needs genes named ``MT-`` or ``mt-``; without any the column is absent, as is ``isotype`` without controls.
    """
    names = [str(name) for name in features]
    special: NDArray[np.bool_] | None = None
    if modality == "rna":
        special = np.array([name.upper().startswith("MT-") for name in names], dtype=bool)
    elif modality == "adt":
        special = np.array([proteins.recognise(name).isotype for name in names], dtype=bool)
    counts, detected, part = [], [], []
    for rows in blocks(source):
        row = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
        counts.append(np.bincount(row, weights=rows.data, minlength=rows.n_rows))
        detected.append(np.bincount(row[rows.data != 0], minlength=rows.n_rows))
        if special is not None and special.any():
            weights = rows.data * special[rows.indices]
            part.append(np.bincount(row, weights=weights, minlength=rows.n_rows))
    table = pd.DataFrame({"counts": _joined(counts), "features": _joined(detected).astype(np.int64)})
    if part:
        share = _joined(part)
        if modality == "rna":
            table["mito"] = share / np.maximum(table["counts"].to_numpy(), 1e-12)
        else:
            table["isotype"] = share
    return table


def passes(table: pd.DataFrame, limits: Thresholds | None) -> NDArray[np.bool_]:
    """``(n_cells,)``: cells within the limits (limits included); a metric that is absent limits nothing."""
    keep = np.ones(len(table), dtype=bool)
    if limits is None:
        return keep
    for column, low, high in (
        ("counts", limits.min_counts, limits.max_counts),
        ("features", limits.min_features, limits.max_features),
        ("mito", None, limits.max_mito),
        ("isotype", None, limits.max_isotype),
    ):
        if column in table:
            values = table[column].to_numpy()
            if low is not None:
                keep &= values >= low
            if high is not None:
                keep &= values <= high
    return keep


def kept(table: pd.DataFrame, limits: Thresholds | None) -> int:
    """Number of cells within the limits."""
    return int(passes(table, limits).sum())


def suggest(table: pd.DataFrame, n_mads: float = N_MADS) -> Thresholds:
    """Limits at median ± ``n_mads`` median absolute deviations.

    Counts and features are judged as log(1 + x), rounded outwards; mitochondrial share and isotype counts only from
    above. A metric without spread (MAD 0, as in nearly empty data) gets no limit.
    """
    if table.empty:
        return Thresholds()
    values: dict[str, Any] = {}
    for column in ("counts", "features"):
        low, high = _interval(np.log1p(table[column].to_numpy(dtype=np.float64)), n_mads)
        if low is not None and high is not None:
            values[f"min_{column}"] = max(0, math.floor(math.expm1(low)))
            values[f"max_{column}"] = math.ceil(math.expm1(high))
    if "mito" in table:
        _, high = _interval(table["mito"].to_numpy(dtype=np.float64), min(n_mads, N_MADS_MITO))
        values["max_mito"] = None if high is None else min(1.0, math.ceil(high * 1000) / 1000)
    if "isotype" in table:
        _, high = _interval(np.log1p(table["isotype"].to_numpy(dtype=np.float64)), n_mads)
        values["max_isotype"] = None if high is None else math.ceil(math.expm1(high))
    return Thresholds(**values)


def _interval(values: NDArray[np.float64], n_mads: float) -> tuple[float | None, float | None]:
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle)))
    return (middle - n_mads * spread, middle + n_mads * spread) if spread > 0 else (None, None)


def _joined(pieces: list[NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate(pieces).astype(np.float64) if pieces else np.zeros(0)
