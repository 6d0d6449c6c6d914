"""Reading the tables of a results folder: cells from an AnnData file, programs from text. No anndata, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd


def read_obs(path: Path) -> pd.DataFrame:
    """The obs table of an AnnData file, through h5py (format: anndata's documentation, "on-disk format")."""
    import h5py

    with h5py.File(path, "r") as file:
        obs = file["obs"]
        index = pd.Index(_element(obs[obs.attrs["_index"]]), dtype=object)
        columns = {str(name): _element(obs[name]) for name in obs.attrs["column-order"]}
        return pd.DataFrame(columns, index=index)


def _element(item: Any) -> Any:
    kind = item.attrs["encoding-type"]
    if kind == "categorical":
        codes, categories = item["codes"][:], _element(item["categories"])
        return pd.Categorical.from_codes(codes, categories=categories, ordered=bool(item.attrs["ordered"]))
    if kind == "string-array":
        return item.asstr()[:]
    if kind == "array":
        return item[:]
    raise ValueError(f"a column of kind {kind!r}")


def read_programs(path: Path) -> pd.DataFrame:
    """The programs of one modality, as :class:`headless.tasks.programs.Programs` describes them."""
    ranks = ("rank_up", "rank_down")
    kinds: dict[str, Any] = {"feature": str, "kept": bool, **dict.fromkeys(("rho", "p", "q", "log2_ratio"), float)}
    table = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values={name: [""] for name in ranks})
    return table.astype(dict.fromkeys(ranks, "Int64"))
