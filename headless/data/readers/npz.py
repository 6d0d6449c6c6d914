"""NumPy archives: scipy's sparse matrices and plain two-dimensional arrays, with names beside them.

Names are members of the archive (``barcodes``, ``features`` ...) or text files beside it (``pbmc_barcodes.tsv`` for
``pbmc.npz``). Other one-dimensional members as long as there are cells describe the cells. Object arrays are pickles
and are refused.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.counts import Tally, is_counts, judge, refuse
from headless.data.matrix import FileInfo, Matrix, MatrixInfo, ObsColumn
from headless.data.modality import recognise
from headless.data.readers import faults
from headless.data.readers.names import feature_table
from headless.data.readers.store import describe_values
from headless.data.readers.text import names_of
from headless.errors import MosaicError

_CELLS = ("barcodes", "obs_names", "cells", "cell_names", "cell_ids")
_FEATURES = ("features", "var_names", "feature_names", "genes", "gene_names", "peaks", "proteins", "names")
_SPARSE = {"format", "shape", "data"}
_SAMPLE = 200_000


@dataclass(frozen=True)
class Header:
    """Shape and type of a member."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Named:
    """A matrix of the archive with its names. ``turned``: it lies features x cells."""

    key: str
    barcodes: NDArray[np.object_]
    features: NDArray[np.object_]
    turned: bool
    used: tuple[str, ...]


def peek(path: Path, format: str) -> FileInfo:
    """Describe an archive from the headers of its members."""
    headers = _headers(path)
    infos: list[MatrixInfo] = []
    columns: dict[str, ObsColumn] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key, shape in _matrices(archive, headers).items():
            named = _named(path, archive, headers, key, shape)
            if named is None:
                continue
            modality, reason = _recognise(path, named)
            infos.append(
                MatrixInfo(
                    key=key,
                    modality=modality,
                    reason=reason + ("; features x cells, as the lengths of the names say" if named.turned else ""),
                    n_cells=len(named.barcodes),
                    n_features=len(named.features),
                    layer="X",
                    layer_reason="the only matrix of the format",
                    layers=("X",),
                    counts=judge(_sample(path, "data" if _is_sparse(headers) else key)),
                )
            )
            for name, values in _described(archive, headers, named).items():
                columns.setdefault(name, describe_values(name, values))
    if not infos:
        raise _nameless(path)
    return FileInfo(path, format, tuple(infos), tuple(columns.values()))


def read(path: Path, format: str, key: str, layer: str, modality: str | None, on_disk: bool) -> Matrix:
    """Read one matrix; ``on_disk`` has no effect on archives."""
    import scipy.sparse as sp

    headers = _headers(path)
    with np.load(path, allow_pickle=False) as archive:
        shapes = _matrices(archive, headers)
        if key not in shapes:
            raise faults.no_matrix(path, key, list(shapes))
        if layer != "X":
            raise faults.no_layer(path, layer, ["X"])
        named = _named(path, archive, headers, key, shapes[key])
        if named is None:
            raise _nameless(path)
        raw: Any = sp.load_npz(path) if _is_sparse(headers) else archive[key]
        obs = pd.DataFrame(_described(archive, headers, named), index=pd.Index(named.barcodes))
    if not len(named.barcodes) or not len(named.features):
        raise faults.empty(path, "has no cells or no features")
    known, reason = _recognise(path, named)
    modality = modality or known
    if modality is None:
        raise faults.unknown_modality(path, key, reason)
    tally = Tally()
    tally.add(raw.data if _is_sparse(headers) else raw)
    if not is_counts(tally.verdict):
        raise refuse(tally.verdict, path, modality, layer)
    x = sp.csr_matrix(raw.T if named.turned else raw).astype(np.float32)
    x.sum_duplicates()
    return Matrix(x, named.barcodes, feature_table(named.features, {}, modality), obs, modality, f"{path.name}:{key}")


def _headers(path: Path) -> dict[str, Header]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as stream:
                shape, _, dtype = _header(stream)
            if dtype.hasobject:
                raise faults.pickled(path, f"'{member.removesuffix('.npy')}'")
            found[member.removesuffix(".npy")] = Header(tuple(shape), dtype)
    return found


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _is_sparse(headers: dict[str, Header]) -> bool:
    return set(headers) >= _SPARSE and ("indices" in headers or "row" in headers)


def _matrices(archive: Any, headers: dict[str, Header]) -> dict[str, tuple[int, int]]:
    if _is_sparse(headers):
        rows, columns = (int(n) for n in archive["shape"])
        return {"X": (rows, columns)}
    return {
        name: (header.shape[0], header.shape[1])
        for name, header in headers.items()
        if len(header.shape) == 2 and header.dtype.kind in "fiub"
    }


def _named(path: Path, archive: Any, headers: dict[str, Header], key: str, shape: tuple[int, int]) -> Named | None:
    cells, used_cells = _names(path, archive, headers, key, _CELLS)
    features, used_features = _names(path, archive, headers, key, _FEATURES)
    if cells is None or features is None:
        return None
    cells, features = _without_title(cells, features, shape)
    sizes = (len(cells), len(features))
    if sizes != shape and sizes[::-1] != shape:
        raise MosaicError(
            "data.mismatch",
            f"{path.name}: '{key}' is {shape[0]} x {shape[1]}, but there are {sizes[0]} barcodes and {sizes[1]} "
            "feature names.",
            "One name a row and one a column are needed.",
            file=path,
        )
    return Named(key, cells, features, sizes != shape, (used_cells, used_features))


def _names(
    path: Path, archive: Any, headers: dict[str, Header], key: str, words: tuple[str, ...]
) -> tuple[NDArray[np.object_] | None, str]:
    for name in (*(f"{key}_{word}" for word in words), *words):
        header = headers.get(name)
        if header is not None and len(header.shape) == 1 and header.dtype.kind in "USiu":
            values = archive[name]
            values = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)
            return values.astype(object), name
    alone = len(list(path.parent.glob("*.npz"))) == 1
    for word in words:
        for stem in (*(f"{path.stem}{mark}{word}" for mark in "._-"), *([word] if alone else [])):
            for ending in (".tsv", ".txt", ".csv", ".tsv.gz", ".txt.gz", ".csv.gz"):
                file = path.with_name(stem + ending)
                if file.is_file():
                    return names_of(file), file.name
    return None, ""


def _without_title(
    cells: NDArray[np.object_], features: NDArray[np.object_], shape: tuple[int, int]
) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Files of names may have a title line, which makes them one longer than the matrix."""
    for n_cells, n_features in (shape, shape[::-1]):
        extra = len(cells) - n_cells, len(features) - n_features
        if set(extra) <= {0, 1}:
            return cells[extra[0] :], features[extra[1] :]
    return cells, features


def _described(archive: Any, headers: dict[str, Header], named: Named) -> dict[str, Any]:
    known = {*named.used, *_CELLS, *_FEATURES, *_SPARSE, "indices", "indptr", "row", "col", named.key}
    described = {}
    for name, header in headers.items():
        if name in known or header.shape != (len(named.barcodes),) or header.dtype.kind not in "USfiub":
            continue
        if any(name.endswith(f"_{word}") for word in (*_CELLS, *_FEATURES)):
            continue
        values = archive[name]
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8")
        described[name] = values.astype(object) if values.dtype.kind == "U" else values
    return described


def _recognise(path: Path, named: Named) -> tuple[str | None, str]:
    key = "" if named.key in ("X", "counts", "matrix", "arr_0") else named.key
    return recognise(named.features.tolist(), len(named.features), key=key, file_name=path.name)


def _sample(path: Path, member: str) -> NDArray[Any]:
    """The first values of a member, without unpacking the rest."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as stream:
        shape, _, dtype = _header(stream)
        n = min(int(np.prod(shape)), _SAMPLE)
        return np.frombuffer(stream.read(n * dtype.itemsize), dtype=dtype)


def _nameless(path: Path) -> MosaicError:
    return MosaicError(
        "data.no_names",
        f"{path.name} holds no matrix with names of its cells and features.",
        "Add the members 'barcodes' and 'features' (text), or put "
        f"{path.stem}_barcodes.tsv and {path.stem}_features.tsv beside the file.",
        file=path,
    )
