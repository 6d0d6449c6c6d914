"""How the results of a run are written: :mod:`headless.results` reads them back and documents the layout.

Torch-free. Arrays are written block by block; ``index.json`` is written last, so that a folder with an index is
complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.mosaic import Mosaic
from headless.errors import MosaicError, from_os_error
from headless.files import as_json, write_atomic

#: Rows and columns of one compressed piece of a layer: small enough to read one feature of all cells quickly.
CHUNK = (1024, 256)

#: Expected values compress to about 85 % (random mantissas); refuse only what surely does not fit.
LEAST_SHARE = 0.6

SCHEMA_VERSION = 1


@contextmanager
def replacing(path: Path, doing: str) -> Iterator[Path]:
    """A temporary path beside ``path``, for a library to write; it takes the place of ``path`` if the block ends well.

    If the block fails, ``path`` is as it was and nothing is left beside it. The temporary name keeps the suffix,
    because libraries look at it.

    Raises
    ------
    MosaicError
        ``disk.*`` for a full disk or a read-only folder; ``doing`` says what failed.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise from_os_error(error, path, doing) from error
    finally:
        temporary.unlink(missing_ok=True)


class NpyFile:
    """A float32 ``.npy`` array of known shape, filled by rows in any order through plain writes.

    Plain writes rather than a memory map: a full disk is then an error, not a bus error.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        self.shape = shape
        self._file = path.open("wb")
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()

    def __setitem__(self, rows: slice, values: NDArray[np.float32], /) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        if values.shape != (stop - start, self.shape[1]):
            raise ValueError(f"{values.shape} does not fit {(stop - start, self.shape[1])} of {self.path.name}")
        self._file.seek(self._start + start * self.shape[1] * 4)
        self._file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())

    def close(self) -> None:
        """Flush and close; unwritten rows at the end would be missing, so every block writes its rows."""
        self._file.close()


class Store:
    """The results folder of one run, being written. What was there before is removed first.

    Attributes
    ----------
    index
        What ``index.json`` will say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "latents": [], "layers": {}, "cannot": {}}
        self._files: dict[tuple[str, str], NpyFile] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("index.json", "contribution.npy", "contribution_means.csv"):
                (folder / name).unlink(missing_ok=True)
            for name in ("latents", "features", "layers.zarr", "programs"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "latents").mkdir()
            (folder / "features").mkdir()
        except OSError as error:
            raise from_os_error(error, folder, "prepare the results folder") from error

    def require(self, layer_bytes: int) -> None:
        """Refuse before the work rather than after it if the layers cannot fit on the disk.

        Raises
        ------
        MosaicError
            ``disk.full``
        """
        free = shutil.disk_usage(self.folder).free
        if layer_bytes * LEAST_SHARE > free:
            raise MosaicError(
                "disk.full",
                f"The wanted layers need about {layer_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
                "Ask for fewer outputs, or choose another folder. The trained model is kept.",
                field="outputs",
                file=self.folder,
            )

    def write_mosaic(self, mosaic: Mosaic) -> None:
        """Cells, features and what was measured where."""
        cells = plain_columns(mosaic.cells)
        cells["batch"] = pd.Categorical(cells["batch"].astype(str), categories=list(mosaic.batches))
        for modality in mosaic.modalities:
            cells[f"measured_{modality}"] = mosaic.measured(modality)
        write_cells(self.folder / "cells.h5ad", cells)
        for modality in mosaic.modalities:
            table = plain_columns(mosaic.features[modality])
            for batch in mosaic.batches:
                table[f"measured_{batch}"] = _measured_features(mosaic, batch, modality)
            with replacing(self.folder / "features" / f"{modality}.csv", "write the features") as temporary:
                table.to_csv(temporary, index_label="feature", lineterminator="\n")
        self.index |= {
            "n_cells": mosaic.n_cells,
            "batches": list(mosaic.batches),
            "features": {m: _kinds(mosaic, m) for m in mosaic.modalities},
            "notes": list(mosaic.notes),
        }

    def latent(self, name: str, part: str, width: int) -> NpyFile:
        """A new latent array ``latents/<name>.<part>.npy`` (``<name>.npy`` if the part has no name)."""
        path = self.folder / "latents" / f"{name}.{part}.npy".replace("..", ".")
        self._files[name, part] = NpyFile(path, (self.index["n_cells"], width))
        return self._files[name, part]

    def layer(self, name: str, modality: str, **facts: Any) -> Any:
        """A new layer ``layers.zarr/<name>``, float32, NaN until written; one file for 1,024 rows."""
        import zarr
        from zarr.codecs import BloscCodec

        n, d = self.index["n_cells"], self.index["features"][modality]["n"]
        chunks = (min(CHUNK[0], n), min(CHUNK[1], d))
        shards = (chunks[0], chunks[1] * -(-d // chunks[1]))
        group = zarr.open_group(self.folder / "layers.zarr", mode="a")
        array = group.create_array(
            name,
            shape=(n, d),
            dtype="float32",
            chunks=chunks,
            shards=shards,
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")],
            fill_value=float("nan"),
        )
        self.index["layers"][name] = {"modality": modality, "shape": [n, d], **facts}
        return array

    def drop(self, name: str, reason: str) -> None:
        """Remove what a method cannot answer, and remember why. ``name`` as in :class:`headless.tasks.base.Item`."""
        self.index["cannot"][name] = reason
        self.index["layers"].pop(name, None)
        shutil.rmtree(self.folder / "layers.zarr" / name, ignore_errors=True)
        for key in [key for key in self._files if f"latents/{key[0]}" == name]:
            file = self._files.pop(key)
            file.close()
            file.path.unlink()

    def close_latents(self) -> None:
        """Close the latent arrays; they can be read now."""
        for file in self._files.values():
            file.close()
        self.index["latents"] = list(dict.fromkeys(name for name, _ in self._files))

    def write_index(self) -> None:
        """Write ``index.json``: the results are complete."""
        for name, entry in self.index["layers"].items():
            entry["files"] = count_files(self.folder / "layers.zarr" / name)
        write_atomic(self.folder / "index.json", as_json(self.index, indent=1) + "\n", "write the index of the results")


def count_files(folder: Path) -> int:
    """Number of files in a folder and the folders in it."""
    return sum(len(files) for _, _, files in os.walk(folder))


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with columns of plain kinds only: bool, integer, float, text, or categories of text.

    Missing text stays missing (as a category without value); nullable numbers become floats with NaN; anything else
    becomes text. ``/`` is not allowed in a column name on disk and becomes ``_``.
    """
    columns = {str(name).replace("/", "_"): _plain(table[name]) for name in table.columns}
    return pd.DataFrame(columns, index=table.index.astype(str).rename(None))


def _plain(column: pd.Series[Any]) -> pd.Series[Any]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.rename_categories([str(name) for name in column.cat.categories])
    if pd.api.types.is_bool_dtype(column.dtype) and not column.isna().any():
        return column.astype(bool)
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        return column if isinstance(column.dtype, np.dtype) else column.astype("float64")
    missing = column.isna()
    text = column.astype(object).where(missing, column.astype(str))
    if missing.any() or text.nunique() < len(text) / 2:
        return text.where(~missing).astype("category")
    return text


def write_cells(path: Path, cells: pd.DataFrame) -> None:
    """Write the table of cells as an AnnData file with obs only: scanpy opens it, h5py suffices to read it."""
    import anndata

    with replacing(path, "write the table of cells") as temporary:
        anndata.AnnData(obs=cells).write_h5ad(temporary)


def _measured_features(mosaic: Mosaic, batch: str, modality: str) -> NDArray[np.bool_]:
    tile = mosaic.tiles.get((batch, modality))
    n = len(mosaic.features[modality])
    if tile is None:
        return np.zeros(n, dtype=bool)
    return np.ones(n, dtype=bool) if tile.mask is None else tile.mask


def _kinds(mosaic: Mosaic, modality: str) -> dict[str, Any]:
    table = plain_columns(mosaic.features[modality])
    kinds: Mapping[str, str] = {"b": "bool", "i": "int", "u": "int", "f": "float"}
    columns = {name: kinds.get(table[name].dtype.kind, "text") for name in table.columns}
    columns |= {f"measured_{batch}": "bool" for batch in mosaic.batches}
    return {"n": len(table), "n_cells": int(mosaic.measured(modality).sum()), "columns": columns}
