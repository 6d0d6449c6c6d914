"""AnnData and MuData files: h5ad, h5mu and their zarr twins.

A file of one AnnData has the matrix ``X``; where its features are of several types (Gene Expression and Antibody
Capture in one table) each type is a matrix of its own, named after the type. A MuData has ``mod/<name>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.counts import Tally, choose_layer, is_counts, judge, refuse
from headless.data.matrix import FileInfo, Matrix, MatrixInfo, ObsColumn
from headless.data.modality import recognise
from headless.data.readers import faults
from headless.data.readers.names import feature_table
from headless.data.readers.obs import joined_obs, listed_columns
from headless.data.readers.store import Table, attribute_names, close, is_group, member, open_group, scalar_text
from headless.data.readers.stored import Stored

#: Feature names looked at to recognise a modality.
_NAMES = 50_000
_TYPE_COLUMNS = ("feature_types", "feature_type", "modality")
_COLUMNS = {
    "id": ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "feature_id", "id"),
    "chrom": ("chrom", "chr", "chromosome", "seqnames", "seqname"),
    "start": ("start", "chromStart", "chrom_start"),
    "end": ("end", "chromEnd", "chrom_end", "stop"),
    "interval": ("interval",),
    "genome": ("genome",),
    "isotype_control": ("isotype_control", "is_isotype", "isotype"),
}
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_names", "gene_name", "symbol")


@dataclass(frozen=True)
class Part:
    """One AnnData of a file: the root, or a modality of a MuData (``name``)."""

    node: Any
    path: Path
    name: str = ""

    @cached_property
    def obs(self) -> Table:
        """Cells."""
        return self._table(self.node, "obs")

    @cached_property
    def layers(self) -> dict[str, Stored]:
        """Every matrix of cells x features by layer: ``X``, ``layers/*``, ``raw/X``."""
        found = {"X": Stored.of(member(self.node, "X"))}
        layers = member(self.node, "layers")
        for name in layers if layers is not None and is_group(layers) else ():
            found[f"layers/{name}"] = Stored.of(member(layers, name))
        raw = member(self.node, "raw")
        if raw is not None and is_group(raw):
            found["raw/X"] = Stored.of(member(raw, "X"))
        elif member(self.node, "raw.X") is not None:  # AnnData before 0.7
            found["raw/X"] = Stored.of(self.node["raw.X"])
        return {name: stored for name, stored in found.items() if stored is not None}

    def var(self, layer: str) -> Table:
        """Features of a layer; ``raw`` has its own."""
        if layer != "raw/X":
            return self._table(self.node, "var")
        if member(self.node, "raw") is not None:
            return self._table(self.node["raw"], "var")
        return self._table(self.node, "raw.var")

    def types(self, layer: str) -> NDArray[np.object_] | None:
        """Feature type of each feature, if the file states them."""
        var = self.var(layer)
        for column in _TYPE_COLUMNS:
            if column in var and (values := var.read(column)) is not None:
                return np.asarray(pd.Series(values).astype(str), dtype=object)
        return None

    def keys(self) -> dict[str, str | None]:
        """Matrix key -> feature type that it is restricted to (``None``: all features)."""
        base = f"mod/{self.name}" if self.name else "X"
        types = self.types(next(iter(self.layers), "X"))
        present = list(dict.fromkeys(types)) if types is not None else []
        if len(present) < 2:
            return {base: None}
        return {f"{base}/{kind}" if self.name else kind: kind for kind in present}

    def _table(self, node: Any, key: str) -> Table:
        found = member(node, key)
        if found is None:
            raise faults.truncated(self.path, f"'{key}' is missing")
        return Table(found, self.path, member(self.node, "uns"))


def parts(root: Any, path: Path) -> Iterator[Part]:
    """The AnnData of a file in its own order."""
    mods = member(root, "mod")
    if mods is None:
        yield Part(root, path)
        return
    order = attribute_names(mods, "mod-order")
    for name in [*(n for n in order if n in mods), *(n for n in mods if n not in order)]:
        yield Part(mods[name], path, name)


def peek(path: Path, format: str) -> FileInfo:
    """Describe a file from headers and a sample of values."""
    root = open_group(path, format)
    try:
        found = list(parts(root, path))
        infos = [info for part in found for info in _describe(part, root)]
        if not infos:
            raise faults.empty(path, "holds no matrix of cells and features")
        return FileInfo(path, format, tuple(infos), _columns(root, found))
    finally:
        close(root)


def read(path: Path, format: str, key: str, layer: str, modality: str | None, on_disk: bool) -> Matrix:
    """Read one matrix. With ``on_disk`` a CSR layer stays in the file, which is kept open for reading."""
    root = open_group(path, format)
    keep = False
    try:
        found = list(parts(root, path))
        part, kind = _find(found, key, path)
        if layer not in part.layers:
            raise faults.no_layer(path, layer, list(part.layers))
        stored = part.layers[layer]
        columns = None
        if kind is not None:
            types = part.types(layer)
            if types is None:
                raise faults.no_layer(path, layer, [name for name in part.layers if name != layer])
            columns = np.flatnonzero(types == kind)
        names, described = _features(part, layer, columns)
        barcodes = part.obs.index()
        if (len(barcodes), len(part.var(layer).index())) != stored.shape:
            raise faults.unreadable(path, f"{layer} of {key} has the shape {stored.shape}, unlike obs and var")
        if not len(barcodes) or not len(names):
            raise faults.empty(path, f"has no cells or no features in {key}")
        if modality is None:
            modality, reason = _recognise(part, layer, kind, columns)
            if modality is None:
                raise faults.unknown_modality(path, key, reason)
        tally = Tally()
        lazy = on_disk and stored.layout == "csr"
        x = stored.lazily(path, columns, tally) if lazy else stored.read(path, columns, tally)
        if not is_counts(tally.verdict):
            raise refuse(tally.verdict, path, modality, layer, tuple(part.layers))
        obs = joined_obs(_global(root, path), {p.name: p.obs for p in found}, part.name, barcodes)
        features = feature_table(names, described, modality)
        keep = lazy
        return Matrix(x, barcodes, features, obs, modality, f"{path.name}:{key}")
    finally:
        if not keep:
            close(root)


def _describe(part: Part, root: Any) -> list[MatrixInfo]:
    if not part.layers:
        if not part.name:
            return []
        reason = "skipped: holds no matrix of cells and features"
        return [MatrixInfo(f"mod/{part.name}", None, reason, 0, 0, "X", "", (), "counts")]
    return [_matrix_info(part, key, kind, root) for key, kind in part.keys().items()]


def _matrix_info(part: Part, key: str, kind: str | None, root: Any) -> MatrixInfo:
    verdicts = {}
    for name, stored in part.layers.items():
        values, features = stored.sample()
        types = part.types(name) if kind is not None else None
        if kind is not None and types is None:
            continue  # a layer whose features have no types cannot be taken apart
        if types is not None:
            values = values[types[np.clip(features, 0, len(types) - 1)] == kind]
        verdicts[name] = judge(values)
    layer, layer_reason = choose_layer(verdicts)
    columns = None
    if kind is not None:
        types = part.types(layer)
        columns = np.flatnonzero(types == kind) if types is not None else None
    modality, reason = _recognise(part, layer, kind, columns)
    n_cells, n_features = part.layers[layer].shape
    return MatrixInfo(
        key=key,
        modality=modality,
        reason=reason,
        n_cells=n_cells,
        n_features=n_features if columns is None else len(columns),
        layer=layer,
        layer_reason=layer_reason,
        layers=tuple(verdicts),
        counts=verdicts[layer],
        genome=_genome(part, layer, columns, root),
    )


def _recognise(part: Part, layer: str, kind: str | None, columns: NDArray[np.int64] | None) -> tuple[str | None, str]:
    var = part.var(layer)
    types = part.types(layer) if kind is None else None
    feature_type = kind or (str(types[0]) if types is not None and len(types) else "")
    names = var.index(None if columns is not None else _NAMES)
    n_features = var.n_rows if columns is None else len(columns)
    if columns is not None:
        names = names[columns]
    return recognise(
        names.tolist(),
        n_features,
        key=part.name,
        feature_type=feature_type,
        widths=_widths(var, columns),
        file_name="" if part.name else part.path.name,
    )


def _widths(var: Table, columns: NDArray[np.int64] | None) -> list[int]:
    pair = [name for key in ("start", "end") if (name := next((n for n in _COLUMNS[key] if n in var), None))]
    if len(pair) < 2:
        return []
    starts, ends = (_coordinates(var.read(name)) for name in pair)
    widths = (ends - starts).to_numpy(dtype=float, na_value=np.nan)
    widths = widths if columns is None else widths[columns]
    return [int(width) for width in widths[np.isfinite(widths)][:_NAMES]]


def _features(part: Part, layer: str, columns: NDArray[np.int64] | None) -> tuple[NDArray[np.object_], dict[str, Any]]:
    """Names and known columns. Ensembl identifiers with symbols beside them trade places with those."""
    var = part.var(layer)
    names = var.index()
    described: dict[str, Any] = {}
    for key, aliases in _COLUMNS.items():
        column = next((name for name in aliases if name in var), None)
        values = var.read(column) if column else None
        if values is None:
            continue
        if key in ("start", "end"):
            described[key] = _coordinates(values)
        elif key == "isotype_control":
            described[key] = _truth(values)
        else:
            described[key] = pd.Series(values).astype(object).to_numpy()
    types = part.types(layer)
    if types is not None:
        described["feature_type"] = types
    symbols = next((name for name in _SYMBOLS if name in var), None)
    if symbols and pd.Series(names).str.match(r"^ENS[A-Z]*G\d{6,}").mean() > 0.5:
        given = pd.Series(var.read(symbols)).astype(object)
        described.setdefault("id", names)
        names = np.asarray(given.where(given.notna() & (given != ""), pd.Series(names)).astype(str), dtype=object)
    if columns is not None:
        names = names[columns]
        described = {key: values[columns] for key, values in described.items()}
    if not {"chrom", "start", "end"} <= described.keys():
        described = {key: values for key, values in described.items() if key not in ("chrom", "start", "end")}
    return names, described


def _coordinates(values: Any) -> Any:
    """Whole numbers (nullable), whatever they are stored as."""
    return pd.Series(pd.to_numeric(pd.Series(values, dtype=object), errors="coerce")).round().astype("Int64").array


def _truth(values: Any) -> NDArray[np.bool_]:
    text = pd.Series(values).astype(str).str.strip().str.lower()
    return text.isin(("true", "1", "1.0", "yes", "isotype", "isotype_control", "control")).to_numpy(dtype=bool)


def _genome(part: Part, layer: str, columns: NDArray[np.int64] | None, root: Any) -> str | None:
    var = part.var(layer)
    if "genome" in var and (values := var.read("genome")) is not None:
        series = pd.Series(values).astype(str)
        series = series if columns is None else series.iloc[columns]
        named = [name for name in dict.fromkeys(series) if name not in ("", "nan", "None", "NA")]
        if named:
            return "+".join(named)
    for node in (part.node, root):
        text = scalar_text(member(node, "uns"), "genome")
        if text:
            return text.split()[0]  # remarks may follow the name
    return None


def _find(found: list[Part], key: str, path: Path) -> tuple[Part, str | None]:
    known: dict[str, tuple[Part, str | None]] = {}
    for part in found:
        if part.layers:
            known.update({name: (part, kind) for name, kind in part.keys().items()})
    if key not in known:
        raise faults.no_matrix(path, key, list(known))
    return known[key]


def _global(root: Any, path: Path) -> Table | None:
    node = member(root, "obs") if member(root, "mod") is not None else None
    return None if node is None else Table(node, path, member(root, "uns"))


def _columns(root: Any, found: list[Part]) -> tuple[ObsColumn, ...]:
    shared = _global(root, found[0].path)
    return listed_columns(shared, {part.name: part.obs for part in found})
