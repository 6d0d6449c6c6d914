"""Feature tables: unique names, identifiers and coordinates, the same for every format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: ``chr1:100-200``, ``chr1-100-200``, ``chr1_100_200``, ``GL000205.2-100-200``
INTERVAL = r"^(.*\w)[:_-](\d+)[-_](\d+)$"


def unique(names: NDArray[Any]) -> NDArray[np.object_]:
    """Names made unique: the first keeps its name, repeats become ``name-1``, ``name-2`` ..."""
    result = np.asarray([str(name) for name in names], dtype=object)
    repeated = pd.Series(result).duplicated().to_numpy()
    if not repeated.any():
        return result
    taken = set(result)
    last: dict[str, int] = {}
    for i in np.flatnonzero(repeated):
        name = result[i]
        number = last.get(name, 0) + 1
        while f"{name}-{number}" in taken:
            number += 1
        last[name] = number
        result[i] = f"{name}-{number}"
        taken.add(result[i])
    return result


def intervals(texts: Any) -> pd.DataFrame | None:
    """``chrom``, ``start``, ``end`` (Int64) of interval texts, missing where a text is none; ``None`` if none is."""
    parts = pd.Series(np.asarray(texts, dtype=object)).astype(str).str.extract(INTERVAL)
    ok = parts.notna().all(axis=1)
    if not ok.any():
        return None
    return pd.DataFrame(
        {
            "chrom": parts[0].where(ok),
            "start": pd.to_numeric(parts[1]).astype("Int64"),
            "end": pd.to_numeric(parts[2]).astype("Int64"),
        }
    )


def feature_table(names: NDArray[Any], columns: Mapping[str, Any], modality: str | None) -> pd.DataFrame:
    """The features of a matrix: index = unique names, columns as known (``id``, ``chrom``, ``start``, ``end`` ...).

    ``interval`` among ``columns`` is taken apart; peaks without coordinates get them from their names.
    """
    table = pd.DataFrame({key: value for key, value in columns.items() if key != "interval"})
    if not len(table.columns):
        table = pd.DataFrame(index=range(len(names)))
    found = None
    if "chrom" not in table:
        found = intervals(columns["interval"]) if "interval" in columns else None
        if found is None and modality == "atac":
            found = intervals(names)
    if found is not None:
        table = pd.concat([table, found], axis=1)
    table.index = pd.Index(unique(names), name=None)
    for key in ("start", "end"):
        if key in table and not table[key].isna().any():
            table[key] = table[key].astype("int64")
    return table
