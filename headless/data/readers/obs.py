"""Columns that describe cells, joined by barcode over the modalities of a MuData.

A MuData has a global ``obs`` and one a modality. Listed are: every global column under its own name; a column that all
modalities share under its own name too; what remains as ``modality:column``, as MuData itself writes it. A modality's
column of the same name *and* with no level that the global (or shared) one lacks is the same column and listed once.
The columns that are listed are the columns that are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.matrix import ObsColumn
from headless.data.readers.store import Table


def listed_columns(shared: Table | None, tables: Mapping[str, Table]) -> tuple[ObsColumn, ...]:
    """The columns of a file (``shared``: global obs, ``None`` in a file of one AnnData; ``tables``: by modality)."""
    listed = []
    for name, sources in _plan(shared, tables).items():
        described = _describe(name, [table.describe(column) for table, column in sources])
        if described is not None:
            listed.append(described)
    return tuple(listed)


def joined_obs(
    shared: Table | None, tables: Mapping[str, Table], own: str, barcodes: NDArray[np.object_]
) -> pd.DataFrame:
    """The listed columns for the cells of one modality, by barcode: the global value, else the modality's own."""
    columns: dict[str, Any] = {}
    positions: dict[int, NDArray[np.intp]] = {}
    for name, sources in _plan(shared, tables).items():
        # The global value counts first; its holes are filled from the modality itself, then from the others.
        ordered = sorted(sources, key=lambda source: (source[0] is not shared, source[0] is not tables[own]))
        value: pd.Series | None = None
        for table, column in ordered:
            values = table.read(column)
            if values is None:
                continue
            if id(table) not in positions:
                positions[id(table)] = _positions(table, table is tables[own], barcodes)
            series = _take(values, positions[id(table)])
            value = series if value is None else _filled(value, series)
            if not value.isna().any():
                break
        if value is not None:
            if isinstance(value.dtype, pd.CategoricalDtype):
                value = value.cat.remove_unused_categories()
            columns[name] = value.array
    return pd.DataFrame(columns, index=pd.Index(barcodes, name=None))


def _plan(shared: Table | None, tables: Mapping[str, Table]) -> dict[str, list[tuple[Table, str]]]:
    """Listed name -> where its values come from."""
    plan: dict[str, list[tuple[Table, str]]] = {}
    if shared is not None:
        plan.update({column: [(shared, column)] for column in shared.columns})
    if len(tables) == 1:
        for table in tables.values():
            for column in table.columns:
                plan.setdefault(column, []).append((table, column))
        return plan
    for column in dict.fromkeys(column for table in tables.values() for column in table.columns):
        having = {name: table for name, table in tables.items() if column in table}
        levels = {name: table.levels(column) for name, table in having.items()}
        if shared is not None and column in shared:
            whole = shared.levels(column)
            same = {name for name, own in levels.items() if own is not None and whole is not None and own <= whole}
        else:
            alike = len(having) == len(tables) and all(own is not None for own in levels.values())
            same = set(having) if alike else set()
        for name, table in having.items():
            plan.setdefault(column if name in same else f"{name}:{column}", []).append((table, column))
    return plan


def _describe(name: str, columns: list[ObsColumn | None]) -> ObsColumn | None:
    known = [column for column in columns if column is not None]
    if not known:
        return None
    best = max(known, key=lambda column: column.n_levels or 0)
    return ObsColumn(name, best.kind, best.n_levels, best.examples)


def _positions(table: Table, own: bool, barcodes: NDArray[np.object_]) -> NDArray[np.intp]:
    if own:
        return np.arange(len(barcodes))
    names = pd.Index(table.index())
    first = np.flatnonzero(~names.duplicated())
    found = names[first].get_indexer(pd.Index(barcodes))
    return np.where(found >= 0, first[found], -1)


def _take(values: Any, positions: NDArray[np.intp]) -> pd.Series:
    series = pd.Series(values)
    if (positions >= 0).all():
        return series.iloc[positions].reset_index(drop=True)
    return series.reindex(positions).reset_index(drop=True)


def _filled(value: pd.Series, other: pd.Series) -> pd.Series:
    categorical = isinstance(value.dtype, pd.CategoricalDtype)
    filled = value.astype(object).where(value.notna(), other.astype(object))
    return filled.astype("category") if categorical else filled.infer_objects()
