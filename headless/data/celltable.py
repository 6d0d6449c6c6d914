"""The table of cells: batch, barcode, label and the columns that the files tell of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: Label of cells whose type nobody named.
UNKNOWN: Final = "unknown"
_OWN: Final = ("batch", "barcode", "label")


@dataclass(frozen=True)
class Piece:
    """What one modality tells of the cells of a batch: rows of obs, their cells, and their labels if there are any."""

    obs: pd.DataFrame
    cells: NDArray[np.int64]
    label: NDArray[Any] | None


def table(batch: str, barcodes: NDArray[np.object_], pieces: Mapping[str, Sequence[Piece]]) -> pd.DataFrame:
    """The cells of one batch, one row a cell.

    A column that several modalities have counts once; where they contradict each other, each modality's own is kept
    as ``modality:column``. A file's column named ``batch``, ``barcode`` or ``label`` that means something else here
    becomes ``column_in_file``.
    """
    n = len(barcodes)
    columns: dict[str, dict[str, pd.Series]] = {}
    label = pd.Series(np.full(n, None, dtype=object))
    for modality, own in pieces.items():
        for piece in own:
            for name in map(str, piece.obs.columns):
                values = np.asarray(piece.obs[name].astype(object))
                into = columns.setdefault(f"{name}_in_file" if name in _OWN else name, {})
                series = into.setdefault(modality, pd.Series(np.full(n, None, dtype=object)))
                series.iloc[piece.cells] = values
            if piece.label is not None:
                fresh = pd.Series(np.full(n, None, dtype=object))
                fresh.iloc[piece.cells] = np.asarray(piece.label, dtype=object)
                label = label.where(label.notna(), fresh)
    result: dict[str, Any] = {"batch": np.full(n, batch, dtype=object), "barcode": barcodes}
    if any(piece.label is not None for own in pieces.values() for piece in own):
        result["label"] = label.to_numpy()
    for name, by_modality in columns.items():
        if _agree(list(by_modality.values())):
            together = pd.Series(np.full(n, None, dtype=object))
            for series in by_modality.values():
                together = together.where(together.notna(), series)
            result[name] = together.to_numpy()
        else:
            result.update({f"{modality}:{name}": series.to_numpy() for modality, series in by_modality.items()})
    return pd.DataFrame(result)


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The cells of all batches, with unique names as index.

    The name is the barcode, or ``batch:barcode`` for every cell if any barcode stands in two batches.
    """
    cells = pd.concat(list(tables), ignore_index=True)
    if "label" in cells:
        cells["label"] = [UNKNOWN if pd.isna(value) else str(value) for value in cells["label"]]
    first = [name for name in _OWN if name in cells]
    cells = cells[[*first, *(name for name in cells.columns if name not in first)]]
    for name in cells.columns[len(first):]:
        cells[name] = _typed(cells[name])
    if cells["barcode"].is_unique:
        names = cells["barcode"].astype(str)
    else:
        names = cells["batch"].astype(str) + ":" + cells["barcode"].astype(str)
    cells.index = pd.Index(names.to_numpy(), name=None)
    return cells


def _agree(columns: Sequence[pd.Series]) -> bool:
    for i, first in enumerate(columns):
        for second in columns[:i]:
            both = (first.notna() & second.notna()).to_numpy()
            if (first.to_numpy()[both] != second.to_numpy()[both]).any():
                return False
    return True


def _typed(column: pd.Series) -> pd.Series:
    """Numbers as numbers, everything else as text with missing values, so that any format can store it."""
    inferred = column.infer_objects()
    if inferred.dtype != object:
        return inferred
    known = column.notna()
    if known.any() and all(isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))
                           for value in column[known]):
        return pd.to_numeric(column)
    return pd.Series([str(value) if ok else None for value, ok in zip(column, known, strict=True)],
                     index=column.index, dtype=object)
