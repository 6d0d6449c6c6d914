"""From a path to counts: which format a file has, what it holds, and one matrix of it. Input is only ever read.

The format follows from the content (signatures, members of archives, contents of folders); names are asked only where
content does not tell. Descriptions need headers and a few small reads, whatever the size of the file.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headless.data.matrix import FileInfo, Matrix
from headless.data.readers import faults
from headless.errors import MosaicError

FORMATS = ("h5mu", "h5ad", "zarr", "zarr zip", "10x h5", "10x mtx", "csv", "tsv", "npz")

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZARR = ("zarr.json", ".zgroup", ".zmetadata")
_KNOWN = "Known are h5mu, h5ad, zarr, 10x h5, 10x mtx folders, csv, tsv and npz."


def detect(path: str | Path) -> str:
    """The format of a file or folder, one of :data:`FORMATS`.

    Raises
    ------
    MosaicError
        ``data.missing_file``, ``data.no_permission``, ``data.empty``, ``data.truncated``, ``data.unreadable`` or
        ``data.unknown_format``.
    """
    path = Path(path)
    with faults.reading(path):
        if not path.exists():
            raise FileNotFoundError(2, "no such file", str(path))
        return _folder(path) if path.is_dir() else _file(path)


def peek(path: str | Path) -> FileInfo:
    """What a file holds, from its headers and a sample of its values.

    Raises
    ------
    MosaicError
        As :func:`detect`; besides ``data.ragged``, ``data.not_numbers``, ``data.mismatch``, ``data.no_names``,
        ``data.pickle``, ``data.several_matrices``. Values that are no counts are said in
        :attr:`~headless.data.matrix.MatrixInfo.counts` and not raised here.
    """
    path = Path(path)
    format = detect(path)
    with faults.reading(path):
        look, _ = _reader(format)
        info: FileInfo = look(path, format)
        return info


def read_matrix(
    path: str | Path, key: str, layer: str = "X", modality: str | None = None, on_disk: bool = False
) -> Matrix:
    """One matrix of a file, all its values checked to be raw counts.

    Parameters
    ----------
    path, key, layer
        As :func:`peek` lists them.
    modality
        What a person decided; recognised again where ``None``.
    on_disk
        Leave the values in the file where it is CSR (AnnData, MuData, zarr, 10x h5); ``x`` is then a
        :class:`~headless.data.sources.ZarrRows` and the file stays open for reading.

    Raises
    ------
    MosaicError
        As :func:`peek`; besides ``data.no_matrix``, ``data.no_layer``, ``data.unknown_modality``,
        ``data.not_counts``, ``memory.ram``.
    """
    path = Path(path)
    format = detect(path)
    with faults.reading(path):
        _, load = _reader(format)
        matrix: Matrix = load(path, format, key, layer, modality, on_disk)
        return matrix


def _reader(format: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if format in ("h5mu", "h5ad", "zarr", "zarr zip"):
        from headless.data.readers import anndata_files

        return anndata_files.peek, anndata_files.read
    if format in ("10x h5", "10x mtx"):
        from headless.data.readers import tenx

        return (tenx.peek_h5, tenx.read_h5) if format == "10x h5" else (tenx.peek_mtx, tenx.read_mtx)
    if format == "npz":
        from headless.data.readers import npz

        return npz.peek, npz.read
    from headless.data.readers import text

    return text.peek, text.read


def _folder(path: Path) -> str:
    from headless.data.readers import tenx

    names = {child.name for child in path.iterdir()}
    if not names:
        raise faults.empty(path)
    if names & set(_ZARR):
        return _zarr(path, "zarr")
    if tenx.find_mtx(path):
        return "10x mtx"
    if any("matrix.mtx" in name for name in names):
        raise _unknown(path, "has a matrix.mtx, but no barcodes.tsv and features.tsv beside it", "Put them together.")
    inside = sorted(name for name in names if (path / name).is_dir() and _looks_known(path / name))
    inside += sorted(name for name in names if name.endswith((".h5mu", ".h5ad", ".h5", ".npz")))
    hint = f"Choose inside it: {', '.join(inside[:4])}." if inside else _KNOWN
    raise _unknown(path, "is a folder without known data", hint)


def _looks_known(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*_ZARR, "matrix.mtx", "matrix.mtx.gz"))


def _file(path: Path) -> str:
    from headless.data.readers import tenx, text

    with path.open("rb") as stream:
        head = stream.read(4096)
    if not head:
        raise faults.empty(path)
    if _is_hdf5(path):
        return _hdf5(path)
    if head.startswith(b"PK"):
        return _zip(path)
    if head.startswith(b"\x1f\x8b"):
        with gzip.open(path, "rb") as unzipped:
            head = unzipped.read(4096)
        if head.startswith(_HDF5):
            raise _unknown(path, "is a gzipped HDF5 file", "Unpack it (gunzip), then choose the result.")
        if not head:
            raise faults.empty(path)
    if head.startswith(b"%%MatrixMarket"):
        if tenx.find_mtx(path):
            return "10x mtx"
        raise _unknown(path, "is a matrix without names", "Put barcodes.tsv and features.tsv beside it.")
    if head.startswith(b"version https://git-lfs"):
        raise _unknown(path, "is a Git LFS pointer, not the data", "Fetch the file itself with git lfs pull.")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise _unknown(path, "is a web page, not data", "The download did not work; fetch the file again.")
    if path.suffix.lower() in (".h5", ".h5ad", ".h5mu", ".hdf5", ".npz"):
        raise _unknown(path, f"is named {path.suffix}, but its content is not", "Copy or download the file again.")
    table = text.is_table(path)
    if table is None:
        raise _unknown(path, "is no format known here", _KNOWN)
    return table


def _is_hdf5(path: Path) -> bool:
    """HDF5 may have a block of the user's before its signature (MuData does), of 512 bytes or a power of two more."""
    size = path.stat().st_size
    offset = 0
    with path.open("rb") as stream:
        while offset + len(_HDF5) <= size and offset <= 1 << 20:
            stream.seek(offset)
            if stream.read(len(_HDF5)) == _HDF5:
                return True
            offset = offset * 2 or 512
    return False


def _hdf5(path: Path) -> str:
    from headless.data.readers import store, tenx

    root = store.open_group(path, "h5")
    try:
        keys = set(root)
        if store.attribute(root, "encoding-type") == "MuData" or {"mod", "obs"} <= keys:
            return "h5mu"
        if {"obs", "var"} <= keys:
            return "h5ad"
        if tenx.is_h5(root):
            return "10x h5"
    finally:
        store.close(root)
    if not keys:
        raise faults.empty(path, "is an HDF5 file without content")
    if {"row_attrs", "col_attrs"} <= keys:
        raise _unknown(path, "is a loom file", "Save it as h5ad first.")
    raise _unknown(path, f"is HDF5, but of no layout known here (it has {', '.join(sorted(keys)[:5])})", _KNOWN)


def _zip(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name in _ZARR for name in names):
        return _zarr(path, "zarr zip")
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise _unknown(path, "is a zip archive without arrays", "Unpack it, then choose what is inside.")


def _zarr(path: Path, format: str) -> str:
    from headless.data.readers import store

    root = store.open_group(path, format)
    keys = set(root)
    if "mod" in keys or {"obs", "var"} <= keys:
        return format
    raise _unknown(path, "is zarr, but neither AnnData nor MuData", "Choose the folder that holds obs and var.")


def _unknown(path: Path, what: str, hint: str) -> MosaicError:
    return MosaicError("data.unknown_format", f"{path.name} {what}.", hint, file=path)
