"""Elements of AnnData-like files, HDF5 or zarr alike: tables, strings, matrices, read straight from the arrays.

Only the elements asked for are touched, and only by slices, so that a description of a large file needs its headers
and nothing else. Encodings: AnnData on-disk format 0.1 and 0.2, and the two that were before it (compound tables,
``h5sparse`` matrices). Nothing here can run code from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.matrix import ColumnKind, ObsColumn
from headless.data.readers.faults import truncated

#: Longer text columns are not read for a preview.
_PREVIEW_ROWS = 200_000
#: Integers with more levels are measurements, not groups.
_FEW = 50


def open_group(path: Path, format: str) -> Any:
    """The root group, read-only; the caller closes it with :func:`close`."""
    if format not in ("zarr", "zarr zip"):
        return h5py.File(path, "r")
    import zarr

    if format == "zarr zip":
        from zarr.storage import ZipStore

        return zarr.open_group(ZipStore(path, mode="r", read_only=True), mode="r")
    return zarr.open_group(str(path), mode="r")


def close(group: Any) -> None:
    """Let go of the file (zarr folders hold none open)."""
    if isinstance(group, h5py.File):
        group.close()


def is_group(node: Any) -> bool:
    """Whether a node has children."""
    return not hasattr(node, "shape")


def member(group: Any, key: str) -> Any:
    """A child by key, after a look that no pickle is behind it; ``None`` if there is none."""
    if key not in group:
        return None
    node = group[key]
    filters = getattr(getattr(node, "metadata", None), "filters", None) or ()
    if any("pickle" in str(getattr(item, "codec_id", item)).lower() for item in filters):
        raise ValueError(f"{key} needs pickle")
    return node


def attribute(node: Any, name: str, default: str = "") -> str:
    """A text attribute."""
    value = node.attrs.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def attribute_names(node: Any, name: str) -> list[str]:
    """An attribute that lists names."""
    values = np.asarray(node.attrs.get(name, ())).ravel()
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def strings(array: Any, stop: int | None = None) -> NDArray[np.object_]:
    """Text (or anything else, written out) of a one-dimensional array as Python strings."""
    values = array[:stop] if stop is not None else array[...]
    values = np.asarray(values)
    if values.dtype.kind == "S":
        return np.asarray(np.char.decode(values, "utf-8"), dtype=object)
    return np.asarray(
        [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.ravel()], dtype=object
    )


def scalar_text(group: Any, key: str) -> str | None:
    """A text scalar such as ``uns/genome``; ``None`` if there is none."""
    node = member(group, key) if group is not None else None
    if node is None or is_group(node) or node.shape != ():
        return None
    value = node[()]
    value = value.item() if hasattr(value, "item") else value
    text = value.decode() if isinstance(value, bytes) else value
    return text if isinstance(text, str) and text else None


def missing_chunks(array: Any) -> int:
    """Number of chunks of a zarr array that are not in the store (0 for HDF5, which notices by itself)."""
    if isinstance(array, h5py.Dataset):
        return 0
    return int(array.nchunks) - int(array.nchunks_initialized) if array.size else 0


class Table:
    """``obs`` or ``var``: a group of columns, or a compound array in files of AnnData before 0.7."""

    def __init__(self, node: Any, path: Path, uns: Any = None) -> None:
        self.node = node
        self.path = path
        self.uns = uns
        self._described: dict[str, ObsColumn | None] = {}
        self.compound = not is_group(node)
        if self.compound:
            fields = list(node.dtype.names or ())
            self.index_name = next((name for name in ("index", "_index") if name in fields), fields[0])
            self.columns = [name for name in fields if name != self.index_name]
        else:
            self.index_name = attribute(node, "_index", "index" if "index" in node else "_index")
            order = attribute_names(node, "column-order")
            known = [name for name in node if name not in (self.index_name, "__categories")]
            self.columns = [name for name in order if name in known] if order else known

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def n_rows(self) -> int:
        """Number of rows, from the shape of the index."""
        if self.compound:
            return int(self.node.shape[0])
        index = member(self.node, self.index_name)
        if index is None:
            raise ValueError(f"the table has no index '{self.index_name}'")
        if is_group(index):
            index = index["codes"] if "codes" in index else index["values"]
        return int(index.shape[0])

    def index(self, stop: int | None = None) -> NDArray[np.object_]:
        """Row names, all or the first ``stop``."""
        if self.compound:
            names = strings(self.node.fields(self.index_name), stop if stop is not None else self.n_rows)
        else:
            node = member(self.node, self.index_name)
            if node is None:
                raise ValueError(f"the table has no index '{self.index_name}'")
            if is_group(node):
                names = np.asarray([str(v) for v in np.asarray(_values(node, self.node))[:stop]], dtype=object)
            else:
                names = strings(node, stop)
                if missing_chunks(node) and (names == "").any():
                    raise truncated(self.path, "chunks of the row names are missing")
        return names

    def read(self, name: str) -> Any:
        """A column as numpy array, Categorical or nullable array; ``None`` for encodings that describe no cells."""
        if not self.compound:
            node = member(self.node, name)
            return None if node is None else _values(node, self.node)
        values = self.node[name]
        categories = member(self.uns, f"{name}_categories") if self.uns is not None else None
        if categories is not None and values.dtype.kind in "iu":
            return pd.Categorical.from_codes(values, pd.Index(_plain(categories)))
        return strings(values) if values.dtype.kind in "SO" else values

    def levels(self, name: str) -> set[str] | None:
        """Distinct values as text; ``None`` for measurements and for columns too long to look through."""
        described = self.describe(name)
        if described is None or described.kind == "number" or described.n_levels is None:
            return None
        if described.kind == "integer" and described.n_levels > _FEW:
            return None
        return {str(level) for level in pd.Series(self.read(name)).dropna().unique()}

    def describe(self, name: str) -> ObsColumn | None:
        """Kind, number of levels and examples of a column, without reading long text."""
        if name not in self._described:
            self._described[name] = self._describe(name)
        return self._described[name]

    def _describe(self, name: str) -> ObsColumn | None:
        if not self.compound:
            node = member(self.node, name)
            if node is None or _is_odd(node):
                return None
            if not is_group(node) and self.n_rows > _PREVIEW_ROWS and "categories" not in node.attrs:
                return ObsColumn(name, _kind(node.dtype), None, tuple(dict.fromkeys(strings(node, 5))))
        values = self.read(name)
        return None if values is None else describe_values(name, values)


def describe_values(name: str, values: Any) -> ObsColumn:
    """Kind, levels and examples of a column in memory."""
    series = pd.Series(values)
    kind: ColumnKind = "categorical" if isinstance(series.dtype, pd.CategoricalDtype) else _kind(series.dtype)
    levels = series.dropna().unique()
    return ObsColumn(name, kind, len(levels), tuple(str(level) for level in list(levels)[:5]))


def _kind(dtype: Any) -> ColumnKind:
    if pd.api.types.is_bool_dtype(dtype):
        return "bool"
    if pd.api.types.is_integer_dtype(dtype):
        return "integer"
    return "number" if pd.api.types.is_float_dtype(dtype) else "text"


def _is_odd(node: Any) -> bool:
    if is_group(node):
        return "codes" not in node and not ("values" in node and "mask" in node)
    return node.ndim != 1 or (node.dtype.names is not None)


def _values(node: Any, table: Any) -> Any:
    if _is_odd(node):
        return None
    if not is_group(node):
        categories = node.attrs.get("categories")
        if categories is None:
            return _plain(node)
        # AnnData 0.7: codes with a reference (HDF5) or a name (zarr) of the categories beside them
        levels = table[categories]
        return pd.Categorical.from_codes(
            np.asarray(node[...]), pd.Index(_plain(levels)), ordered=bool(levels.attrs.get("ordered", False))
        )
    if "codes" in node:
        categories = _values(node["categories"], node) if is_group(node["categories"]) else _plain(node["categories"])
        return pd.Categorical.from_codes(
            np.asarray(node["codes"][...]), pd.Index(categories), ordered=bool(node.attrs.get("ordered", False))
        )
    values, mask = _plain(node["values"]), np.asarray(node["mask"][...], dtype=bool)
    if values.dtype.kind in "iu":
        return pd.arrays.IntegerArray(values, mask)
    if values.dtype.kind == "b":
        return pd.arrays.BooleanArray(values, mask)
    if values.dtype.kind == "f":
        return np.where(mask, np.nan, values)
    text = values.astype(object)
    text[mask] = None
    return text


def _plain(array: Any) -> NDArray[Any]:
    """A simple array: numbers and booleans as they are, anything else as text."""
    kind = getattr(array.dtype, "kind", "O")
    return np.asarray(array[...]) if kind in "fiub" else strings(array)
