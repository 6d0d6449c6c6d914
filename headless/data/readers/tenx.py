"""Cell Ranger output: feature-barcode matrices as HDF5 (``.h5``) and as folders of ``matrix.mtx``.

HDF5 since Cell Ranger 3: one group ``matrix`` with ``features``; before: one group a genome with ``genes``. Both are
CSC of features x cells, which is CSR of cells x features. Folders: ``matrix.mtx``, ``barcodes.tsv`` and
``features.tsv`` (or ``genes.tsv``, ``peaks.bed``), gzipped or not, with a common prefix or none. Each feature type is
a matrix of its own, named after the type.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.counts import Tally, is_counts, judge, refuse
from headless.data.matrix import FileInfo, Matrix, MatrixInfo
from headless.data.modality import from_type, recognise
from headless.data.readers import faults
from headless.data.readers.names import feature_table
from headless.data.readers.store import close, is_group, member, open_group, strings
from headless.data.readers.stored import Stored
from headless.errors import MosaicError

_SAMPLE_LINES = 50_000
_LAYER_REASON = "the only matrix of the format"


@dataclass(frozen=True)
class Features:
    """The features of a matrix; ``columns``: ``id``, ``feature_type``, ``genome``, ``interval``, ``chrom`` ..."""

    names: NDArray[np.object_]
    columns: Mapping[str, NDArray[Any]]

    def of_type(self, kind: str | None) -> NDArray[np.int64] | None:
        """Columns of the matrix that hold a feature type; ``None``: all of them."""
        if kind is None:
            return None
        chosen = np.flatnonzero(self.columns["feature_type"] == kind)
        return None if len(chosen) == len(self.names) else chosen

    def table(self, which: NDArray[np.int64] | None, modality: str) -> pd.DataFrame:
        """The feature table of the chosen columns."""
        if which is None:
            return feature_table(self.names, self.columns, modality)
        return feature_table(self.names[which], {k: v[which] for k, v in self.columns.items()}, modality)

    def genome(self, which: NDArray[np.int64] | None) -> str | None:
        """Assemblies named for the chosen columns."""
        values = self.columns.get("genome")
        if values is None:
            return None
        named = [name for name in dict.fromkeys(values if which is None else values[which]) if name]
        return "+".join(named) or None

    def kinds(self) -> list[str | None]:
        """Feature types in the file's order; ``[None]`` if it states none."""
        kinds = self.columns.get("feature_type")
        return [None] if kinds is None else list(dict.fromkeys(kinds))


def peek_h5(path: Path, format: str) -> FileInfo:
    """Describe a feature-barcode HDF5 file."""
    root = open_group(path, "h5")
    try:
        infos: list[MatrixInfo] = []
        for group in _groups(root):
            stored, features = _stored(root[group], path), _h5_features(root[group], path, group)
            values, where = stored.sample()
            infos += _infos(path, group, features, stored.shape[0], values, where)
        if not infos:
            raise faults.empty(path, "holds no features")
        return FileInfo(path, format, tuple(infos))
    finally:
        close(root)


def read_h5(path: Path, format: str, key: str, layer: str, modality: str | None, on_disk: bool) -> Matrix:
    """Read one feature type (before Cell Ranger 3: one genome)."""
    root = open_group(path, "h5")
    keep = False
    try:
        known = {name: (group, kind) for group in _groups(root) for name, kind in _keys(root, group, path).items()}
        if key not in known:
            raise faults.no_matrix(path, key, list(known))
        _only_x(path, layer)
        group, kind = known[key]
        features, stored = _h5_features(root[group], path, group), _stored(root[group], path)
        barcodes = strings(root[group]["barcodes"])
        if (len(barcodes), len(features.names)) != stored.shape:
            raise faults.unreadable(path, f"barcodes and features do not fit the shape {stored.shape}")
        which = features.of_type(kind)
        tally = Tally()
        x = stored.lazily(path, which, tally) if on_disk else stored.read(path, which, tally)
        matrix = _matrix(path, key, kind, features, which, x, barcodes, modality, tally)
        keep = on_disk
        return matrix
    finally:
        if not keep:
            close(root)


def is_h5(root: Any) -> bool:
    """Whether an open HDF5 file has the layout of Cell Ranger."""
    return bool(_groups(root))


def find_mtx(path: Path) -> list[Path]:
    """Matrix files of a folder (or the file itself) that have barcodes and features beside them."""
    files = [path] if path.is_file() else sorted(path.glob("*matrix.mtx")) + sorted(path.glob("*matrix.mtx.gz"))
    return [file for file in files if _beside(file, "barcodes") and _beside(file, "features")]


def peek_mtx(path: Path, format: str) -> FileInfo:
    """Describe a folder from its features and the head of the matrix."""
    file = _one_mtx(path)
    features = _mtx_features(file)
    n_cells, values, where = _mtx_head(file, len(features.names))
    infos = _infos(path, "matrix", features, n_cells, values, where)
    return FileInfo(path, format, tuple(infos))


def read_mtx(path: Path, format: str, key: str, layer: str, modality: str | None, on_disk: bool) -> Matrix:
    """Read one feature type of a folder; text cannot stay on disk, so ``on_disk`` has no effect."""
    import scipy.io
    import scipy.sparse as sp

    file = _one_mtx(path)
    features = _mtx_features(file)
    known = {kind or "matrix": kind for kind in features.kinds()}
    if key not in known:
        raise faults.no_matrix(path, key, list(known))
    _only_x(path, layer)
    barcodes = np.asarray([line.split("\t")[0] for line in _lines(cast(Path, _beside(file, "barcodes")))], dtype=object)
    if len(barcodes) and str(barcodes[0]).lower() in ("barcode", "barcodes", "cell"):
        barcodes = barcodes[1:]
    n_cells, _, _ = _mtx_head(file, len(features.names))
    if n_cells != len(barcodes):
        raise _mismatch(path, f"{len(barcodes)} barcodes but {n_cells} cells in the matrix")
    with _binary(file) as stream:
        coo = scipy.io.mmread(stream, spmatrix=True)
    tally = Tally()
    which = features.of_type(known[key])
    x = sp.csr_matrix(coo.T if coo.shape[0] == len(features.names) else coo)
    x = x if which is None else x[:, which]
    tally.add(x.data)
    x = x.astype(np.float32)
    return _matrix(path, key, known[key], features, which, x, barcodes, modality, tally)


def _infos(
    path: Path, group: str, features: Features, n_cells: int, values: NDArray[Any], where: NDArray[np.int64]
) -> list[MatrixInfo]:
    infos = []
    for kind in features.kinds():
        which = features.of_type(kind)
        chosen = values if which is None else values[np.isin(where, which)]
        modality, reason = _recognise(path, features, kind, which)
        infos.append(
            MatrixInfo(
                key=kind or group,
                modality=modality,
                reason=reason,
                n_cells=n_cells,
                n_features=len(features.names if which is None else which),
                layer="X",
                layer_reason=_LAYER_REASON,
                layers=("X",),
                counts=judge(chosen),
                genome=features.genome(which),
            )
        )
    return infos


def _recognise(
    path: Path, features: Features, kind: str | None, which: NDArray[np.int64] | None
) -> tuple[str | None, str]:
    if kind:
        known, reason = from_type(kind)
        if known:
            return known, reason
    names = features.names if which is None else features.names[which]
    return recognise(names.tolist(), len(names), feature_type=kind or "", file_name=path.name)


def _matrix(
    path: Path,
    key: str,
    kind: str | None,
    features: Features,
    which: NDArray[np.int64] | None,
    x: Any,
    barcodes: NDArray[np.object_],
    modality: str | None,
    tally: Tally,
) -> Matrix:
    if not len(barcodes) or not len(features.names):
        raise faults.empty(path, f"has no cells or no features in {key}")
    known, reason = _recognise(path, features, kind, which)
    modality = modality or known
    if modality is None:
        raise faults.unknown_modality(path, key, reason)
    if not is_counts(tally.verdict):
        raise refuse(tally.verdict, path, modality, "X")
    obs = pd.DataFrame(index=pd.Index(barcodes))
    return Matrix(x, barcodes, features.table(which, modality), obs, modality, f"{path.name}:{key}")


def _only_x(path: Path, layer: str) -> None:
    if layer != "X":
        raise faults.no_layer(path, layer, ["X"])


def _groups(root: Any) -> list[str]:
    found = []
    for name in root:
        node = root[name]
        if not is_group(node) or "indptr" not in node or "barcodes" not in node:
            continue
        if "features" in node or "genes" in node:
            found.append(str(name))
    return found


def _keys(root: Any, group: str, path: Path) -> dict[str, str | None]:
    return {kind or group: kind for kind in _h5_features(root[group], path, group).kinds()}


def _stored(group: Any, path: Path) -> Stored:
    if member(group, "shape") is None:
        raise faults.truncated(path, "'shape' is missing")
    n_features, n_cells = (int(n) for n in group["shape"][...])
    return Stored(group, "csr", (n_cells, n_features))


def _h5_features(group: Any, path: Path, name: str) -> Features:
    if "genes" in group:  # before Cell Ranger 3
        ids = strings(group["genes"])
        names = strings(group["gene_names"]) if "gene_names" in group else ids
        genome = np.full(len(ids), name, dtype=object)
        return Features(names, {"id": ids, "genome": genome})
    node = group["features"]
    columns: dict[str, NDArray[Any]] = {}
    for key in ("id", "feature_type", "genome", "interval"):
        if key in node:
            columns[key] = strings(node[key])
    if "id" not in columns and "name" not in node:
        raise faults.truncated(path, "features have no names")
    names = strings(node["name"]) if "name" in node else columns["id"]
    return Features(names, columns)


def _one_mtx(path: Path) -> Path:
    found = find_mtx(path)
    if len(found) > 1:
        raise MosaicError(
            "data.several_matrices",
            f"{path.name} holds {len(found)} matrices: {', '.join(file.name for file in found[:4])}.",
            "Choose one of these files; barcodes of different samples must not be mixed.",
            file=path,
        )
    if not found:
        raise MosaicError(
            "data.unknown_format", f"{path.name} has no barcodes and features beside the matrix.",
            "matrix.mtx, barcodes.tsv and features.tsv belong together in one folder.", file=path,
        )  # fmt: skip
    return found[0]


def _beside(matrix: Path, what: str) -> Path | None:
    prefix = matrix.name[: matrix.name.index("matrix.mtx")] if "matrix.mtx" in matrix.name else ""
    names = {"barcodes": ["barcodes.tsv"], "features": ["features.tsv", "genes.tsv", "peaks.bed"]}[what]
    for name in names:
        for suffix in ("", ".gz"):
            file = matrix.with_name(f"{prefix}{name}{suffix}")
            if file.exists():
                return file
    return None


def _mtx_features(matrix: Path) -> Features:
    file = cast(Path, _beside(matrix, "features"))
    rows = [line.split("\t") for line in _lines(file)]
    if not rows:
        raise faults.empty(file)
    width = min(len(row) for row in rows)
    if width != max(len(row) for row in rows) and width < 2:
        short = next(i for i, row in enumerate(rows) if len(row) == width)
        raise faults.unreadable(file, f"line {short + 1} has {width} fields")
    fields = [np.asarray([row[i] for row in rows], dtype=object) for i in range(width)]
    if ".bed" in file.name and width >= 3:
        names = np.asarray([f"{c}:{s}-{e}" for c, s, e in zip(*fields[:3], strict=True)], dtype=object)
        return Features(names, {"feature_type": np.full(len(names), "Peaks", dtype=object)})
    columns: dict[str, NDArray[Any]] = {"id": fields[0]}
    if width >= 3:
        columns["feature_type"] = fields[2]
    if width >= 6:
        columns["interval"] = np.asarray([f"{c}:{s}-{e}" for c, s, e in zip(*fields[3:6], strict=True)], dtype=object)
    return Features(fields[1] if width >= 2 else fields[0], columns)


def _mtx_head(file: Path, n_features: int) -> tuple[int, NDArray[Any], NDArray[np.int64]]:
    """Number of cells, and the first values with the features that they belong to."""
    with _text(file) as stream:
        banner = stream.readline().lower().split()
        if len(banner) < 5 or banner[0] != "%%matrixmarket" or banner[2] != "coordinate":
            raise faults.unreadable(file, "not a sparse MatrixMarket file")
        line = stream.readline()
        while line.startswith("%") or (line and not line.strip()):
            line = stream.readline()
        size = line.split()
        if len(size) != 3:
            raise faults.truncated(file, "the size line is missing")
        n_rows, n_columns = int(size[0]), int(size[1])
        entries = [line.split() for line, _ in zip(stream, range(_SAMPLE_LINES), strict=False)]
    if n_features not in (n_rows, n_columns):
        raise _mismatch(file, f"{n_features} features but a matrix of {n_rows} x {n_columns}")
    upright = n_rows == n_features
    values = np.asarray([1.0 if banner[3] == "pattern" else float(entry[2]) for entry in entries])
    where = np.asarray([int(entry[0 if upright else 1]) - 1 for entry in entries], dtype=np.int64)
    return (n_columns if upright else n_rows), values, where


def _mismatch(path: Path, what: str) -> MosaicError:
    return MosaicError(
        "data.mismatch", f"{path.name}: {what}.", "The three files must come from the same run.", file=path
    )


def _lines(file: Path) -> list[str]:
    with _text(file) as stream:
        return [line.rstrip("\r\n") for line in stream if line.strip()]


def _is_gzip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _binary(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if _is_gzip(file) else file.open("rb")


def _text(file: Path) -> IO[str]:
    if _is_gzip(file):
        return cast(IO[str], gzip.open(file, "rt", encoding="utf-8"))
    return file.open(encoding="utf-8")
