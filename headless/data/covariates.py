"""Covariates: columns of the table of cells that a method conditions on, besides the batch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.errors import MosaicError

#: A column with more levels than this is no category a network can learn.
MOST_LEVELS = 1000


@dataclass(frozen=True)
class Covariate:
    """One column: categorical if it has ``levels``, continuous (standardised by ``mean`` and ``sd``) otherwise."""

    name: str
    levels: tuple[str, ...] | None = None
    mean: float = 0.0
    sd: float = 1.0
    #: The code of the commonest level, or 0 (the mean): what decoding assumes when nothing is known.
    typical: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        levels = None if self.levels is None else list(self.levels)
        return {"name": self.name, "levels": levels, "mean": self.mean, "sd": self.sd, "typical": self.typical}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Covariate:
        """The covariate that :meth:`as_dict` wrote."""
        levels = None if values["levels"] is None else tuple(values["levels"])
        return cls(values["name"], levels, float(values["mean"]), float(values["sd"]), int(values["typical"]))


def find_covariates(cells: pd.DataFrame, names: Sequence[str]) -> tuple[Covariate, ...]:
    """What the named columns hold: numbers are continuous, everything else is categorical.

    Raises
    ------
    MosaicError
        ``data.unknown_covariate`` with the nearest name; ``data.bad_covariate`` for a column that is constant or
        different in nearly every cell.
    """
    return tuple(_find(cells, name) for name in names)


def _find(cells: pd.DataFrame, name: str) -> Covariate:
    if name not in cells:
        near = difflib.get_close_matches(name, list(map(str, cells.columns)), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Columns: {', '.join(map(str, cells.columns))}."
        raise MosaicError("data.unknown_covariate", f"No column {name!r} in the table of cells.", hint, field=name)
    column = cells[name]
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        mean, sd = float(column.mean()), float(column.std(ddof=0))
        if not np.isfinite(sd) or sd == 0:
            raise _bad(name, "is the same in every cell")
        return Covariate(name, None, mean, sd)
    counts = column.dropna().astype(str).value_counts()
    if len(counts) < 2:
        raise _bad(name, "is the same in every cell")
    if len(counts) > MOST_LEVELS:
        raise _bad(name, f"has {len(counts)} levels")
    levels = tuple(sorted(map(str, counts.index)))
    return Covariate(name, levels, typical=levels.index(str(counts.index[0])))


def _bad(name: str, why: str) -> MosaicError:
    return MosaicError(
        "data.bad_covariate", f"The covariate {name!r} {why}.", "Leave it out of the covariates.", field=name
    )


def covariate_values(cells: pd.DataFrame, covariates: Sequence[Covariate]) -> NDArray[np.float32]:
    """``(n, C)``: level codes and standardised values; missing values count as typical (the mean).

    Raises
    ------
    MosaicError
        ``data.unknown_covariate``; ``model.other_data`` for a level that the covariate does not have.
    """
    return np.stack([_values(cells, covariate) for covariate in covariates], axis=1).astype(np.float32)


def _values(cells: pd.DataFrame, covariate: Covariate) -> NDArray[np.float64]:
    if covariate.name not in cells:
        find_covariates(cells, [covariate.name])
    column = cells[covariate.name]
    if covariate.levels is None:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        return np.nan_to_num((numbers - covariate.mean) / covariate.sd)
    missing = column.isna().to_numpy()
    codes = pd.Categorical(column.astype(str), categories=list(covariate.levels)).codes
    unknown = (codes < 0) & ~missing
    if unknown.any():
        raise MosaicError(
            "model.other_data",
            f"The covariate {covariate.name!r} has a level that the model does not know: "
            f"{column[unknown].astype(str).iloc[0]!r}.",
            "Use the data of the model's own run.",
            field=covariate.name,
        )
    return np.where(missing, covariate.typical, codes).astype(np.float64)
