"""Results: lazy reads of one run's results folder.

Layout (written by :mod:`headless.tasks.write`, ``index.json`` last)::

    index.json                      what is here; ``cannot``: what the method could not answer, and why
    cells.h5ad                      AnnData with obs only: batch, barcode, label, other columns, measured_<modality>
    features/<modality>.csv         names and columns of the features, measured_<batch>
    latents/<name>.<part>.npy       float32 (n_cells, d); name ``joint`` or a modality; NaN rows where it is lacking
    layers.zarr/imputed/<modality>  float32 (n_cells, D) zarr arrays; likewise corrected/<modality>
    layers.zarr/translated/<a>_to_<b>
    contribution.npy                float32 (n_cells, n_modalities); contribution_means.csv
    programs/<modality>.csv         what each dimension does to every feature; how they were made is in the index
    metrics.json, model/            written by the evaluation and by the trainer

Everything is read when it is asked for, arrays from disk piece by piece. No torch, scanpy or anndata: the window
reads results too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.errors import MosaicError
from headless.tables import read_obs, read_programs

if TYPE_CHECKING:
    import zarr

    from headless.data.mosaic import Mosaic

#: The newest layout that this version reads.
SCHEMA_VERSION = 1


class Results:
    """The results of one run.

    Parameters
    ----------
    folder
        The ``results`` folder, or the run folder that holds it.

    Raises
    ------
    MosaicError
        ``run.no_result`` if the run has no complete results; ``run.damaged`` (here or when a piece is read) names the
        piece that cannot be read; ``run.newer`` if a newer version wrote them.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        inner = folder / "results"
        self.folder = inner if inner.is_dir() and not (folder / "index.json").exists() else folder
        self.index: dict[str, Any] = self._read_index()
        self._names: dict[str, pd.Index[Any]] = {}
        self._open: dict[str, zarr.Array[Any]] = {}

    def __repr__(self) -> str:
        layers = ", ".join(self.index["layers"]) or "none"
        return f"Results({str(self.folder)!r}): {self.n_cells} cells, layers: {layers}"

    # ---- what is there ------------------------------------------------------------------------------------------

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.index["n_cells"])

    @property
    def batches(self) -> tuple[str, ...]:
        """Batch names in the order of their codes."""
        return tuple(self.index["batches"])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in the canonical order."""
        return tuple(self.index["features"])

    @property
    def parts(self) -> dict[str, slice]:
        """Named parts of the latent dimensions."""
        return {name: slice(start, stop) for name, (start, stop) in self.index["parts"].items()}

    @property
    def biological(self) -> str:
        """The part that is the embedding to show."""
        return str(self.index["biological"])

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Every name that :meth:`latents` takes: ``joint``, ``joint.c``, ``joint.u``, ``rna``, ``rna.c`` ..."""
        return tuple(
            full
            for name in self.index["latents"]
            for full in (name, *(f"{name}.{part}" for part in self.index["parts"]))
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Stored layers as ``layer/name``: ``imputed/rna``, ``translated/rna_to_adt`` ..."""
        return tuple(self.index["layers"])

    @property
    def cannot(self) -> dict[str, str]:
        """What was asked for and could not be answered: name -> reason."""
        return dict(self.index["cannot"])

    # ---- tables -------------------------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> pd.DataFrame:
        """One row a cell, index = cell name: ``batch``, ``barcode``, ``label``, ..., ``measured_<modality>``."""
        path = self.folder / "cells.h5ad"
        try:
            cells = read_obs(path)
        except Exception as error:  # h5py raises many kinds on a damaged file
            raise _damaged(path, error) from error
        if len(cells) != self.n_cells:
            raise _damaged(path, f"{len(cells)} cells instead of {self.n_cells}")
        return cells

    @property
    def batch_codes(self) -> NDArray[np.int64]:
        """``(n_cells,)``: position of each cell's batch in :attr:`batches`."""
        codes = pd.Categorical(self.cells["batch"], categories=list(self.batches)).codes
        return np.asarray(codes, dtype=np.int64)

    def measured(self, modality: str) -> NDArray[np.bool_]:
        """``(n_cells,)``: which cells have the modality (as the model saw them)."""
        self._check_modality(modality)
        return np.asarray(self.cells[f"measured_{modality}"], dtype=bool)

    def features(self, modality: str) -> pd.DataFrame:
        """Features of a modality, index = name; columns ``chrom``, ``start``, ..., and ``measured_<batch>``."""
        self._check_modality(modality)
        path = self.folder / "features" / f"{modality}.csv"
        entry = self.index["features"][modality]
        try:
            table = pd.read_csv(path, index_col="feature", dtype=str, keep_default_na=False, encoding="utf-8")
            table = pd.DataFrame(
                {name: _typed(table[name], kind) for name, kind in entry["columns"].items()}, index=table.index
            )
        except Exception as error:
            raise _damaged(path, error) from error
        if len(table) != entry["n"]:
            raise _damaged(path, f"{len(table)} features instead of {entry['n']}")
        return table.rename_axis(index=None)

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores of the run.

        Raises
        ------
        MosaicError
            ``run.no_result`` if it was not scored.
        """
        return self._json(self.folder / "metrics.json", "The run was not scored.", "Run `mosaic-headless evaluate`.")

    @property
    def contribution(self) -> pd.DataFrame:
        """Contribution of each modality to the joint embedding of each cell: one row a cell, one column a modality."""
        if "contribution" not in self.index:
            raise self._absent("contribution", "contribution")
        modalities = self.index["contribution"]["modalities"]
        values = self._npy(self.folder / "contribution.npy", len(modalities))
        return pd.DataFrame(np.array(values), columns=modalities, index=self.cells.index)

    @property
    def contribution_means(self) -> pd.DataFrame:
        """Mean contribution: columns ``by`` (batch or label), ``group``, ``n_cells``, then the modalities."""
        if "contribution" not in self.index:
            raise self._absent("contribution", "contribution")
        path = self.folder / "contribution_means.csv"
        try:
            return pd.read_csv(
                path,
                dtype={"by": str, "group": str},
                keep_default_na=False,
                na_values={name: [""] for name in self.index["contribution"]["modalities"]},
            )
        except Exception as error:
            raise _damaged(path, error) from error

    def programs(self, modality: str) -> pd.DataFrame:
        """What each dimension does to every feature (:mod:`headless.tasks.programs`); how: ``index["programs"]``."""
        self._check_modality(modality)
        if modality not in self.index.get("programs", {}).get("modalities", ()):
            raise self._absent("programs", "programs")
        path = self.folder / "programs" / f"{modality}.csv"
        try:
            return read_programs(path)
        except Exception as error:
            raise _damaged(path, error) from error

    @property
    def provenance(self) -> dict[str, Any]:
        """How the results were made: the run's frozen request (empty if the folder was moved out of its run)."""
        path = self.folder.parent / "run.json"
        return self._json(path, "", "") if path.exists() else {}

    @property
    def model(self) -> str:
        """Name of the method, ``model`` if unknown."""
        if name := self.provenance.get("model"):
            return str(name)
        path = self.folder / "model" / "model.json"
        return str(self._json(path, "", "").get("method", "model")) if path.exists() else "model"

    # ---- arrays -------------------------------------------------------------------------------------------------

    def latents(self, name: str = "joint") -> NDArray[np.float32]:
        """A latent: ``joint.c`` (one part, mapped from disk) or ``joint`` (all dimensions), ``(n_cells, d)``.

        Raises
        ------
        MosaicError
            ``run.no_result`` with the nearest name; ``run.damaged``.
        """
        if name not in self.latent_names:
            raise self._absent(f"latents/{name}", "latent", name, self.latent_names)
        stem, _, part = name.partition(".")
        parts, folder = self.parts, self.folder / "latents"
        if part:
            return self._npy(folder / f"{name}.npy", parts[part].stop - parts[part].start)
        d = max(where.stop for where in parts.values())
        if (folder / f"{name}.npy").exists():
            return self._npy(folder / f"{name}.npy", d)
        whole = np.empty((self.n_cells, d), dtype=np.float32)
        for each, where in parts.items():
            whole[:, where] = self._npy(folder / f"{stem}.{each}.npy", where.stop - where.start)
        return whole

    def layer(self, layer: str, modality: str) -> zarr.Array[Any]:
        """A stored layer, ``(n_cells, D)`` float32, read from disk where it is sliced.

        Parameters
        ----------
        layer, modality
            ``imputed`` or ``corrected`` and a modality; ``translated`` and ``<from>_to_<target>``.

        Raises
        ------
        MosaicError
            ``run.no_result`` with the nearest name or the method's reason; ``run.damaged``.
        """
        import zarr

        name = f"{layer}/{modality}"
        if name not in self.index["layers"]:
            raise self._absent(name, "layer", name, self.layers)
        if name in self._open:
            return self._open[name]
        path = self.folder / "layers.zarr" / name
        entry = self.index["layers"][name]
        try:
            array = zarr.open_array(path, mode="r")
        except Exception as error:
            raise _damaged(path, error) from error
        if list(array.shape) != entry["shape"]:
            raise _damaged(path, f"shape {array.shape} instead of {tuple(entry['shape'])}")
        # A missing piece reads as NaN without complaint, so the pieces are counted.
        found = sum(1 for file in path.rglob("*") if file.is_file())
        if found != entry["files"]:
            raise _damaged(path, f"{found} files instead of {entry['files']}")
        self._open[name] = array
        return array

    def rows(self, layer: str, modality: str, rows: slice) -> NDArray[np.float32]:
        """Some rows of a layer in memory, ``(n, D)``."""
        array = self.layer(layer, modality)
        try:
            return np.asarray(array[rows], dtype=np.float32)
        except Exception as error:
            raise _damaged(self.folder / "layers.zarr" / layer / modality, error) from error

    def column(self, layer: str, modality: str, feature: str) -> NDArray[np.float32]:
        """One feature of a layer for all cells, ``(n_cells,)``; NaN where there is no value.

        Raises
        ------
        MosaicError
            ``run.no_feature`` with the nearest name, and what :meth:`layer` raises.
        """
        array = self.layer(layer, modality)
        number = self.feature_number(self.index["layers"][f"{layer}/{modality}"]["modality"], feature)
        try:
            return np.asarray(array[:, number], dtype=np.float32)
        except Exception as error:
            raise _damaged(self.folder / "layers.zarr" / layer / modality, error) from error

    def feature_number(self, modality: str, feature: str) -> int:
        """Position of a feature in the columns of a modality's layers."""
        if modality not in self._names:
            self._names[modality] = self.features(modality).index
        names = self._names[modality]
        found = np.flatnonzero(names == feature)
        if not len(found):
            raise MosaicError(
                "run.no_feature",
                f"There is no feature {feature!r} in {modality}.",
                near(feature, names),
                modality=modality,
            )
        return int(found[0])

    def measured_column(self, mosaic: Mosaic, modality: str, feature: str) -> NDArray[np.float32]:
        """Measured values of one feature for all cells of the results, ``(n_cells,)``; NaN where not measured.

        ``mosaic`` holds the data of the run (:func:`headless.data.build.build_mosaic`); cells are matched by name.
        """
        names = mosaic.features[modality].index if modality in mosaic.features else pd.Index([])
        if feature not in names:
            raise MosaicError(
                "run.no_feature", f"The data have no feature {feature!r} in {modality}.", modality=modality
            )
        number = int(np.flatnonzero(names == feature)[0])
        values = np.full(mosaic.n_cells, np.nan, dtype=np.float32)
        for tile in mosaic.tiles.values():
            if tile.modality != modality or (tile.mask is not None and not tile.mask[number]):
                continue
            for start in range(0, tile.source.n_rows, 4096):
                rows = np.arange(start, min(start + 4096, tile.source.n_rows))
                block = tile.source.rows(rows).to_scipy()
                values[tile.cells[rows]] = block[:, [number]].toarray().ravel()
        return pd.Series(values, index=mosaic.cells.index).reindex(self.cells.index).to_numpy(dtype=np.float32)

    # ---- help ---------------------------------------------------------------------------------------------------

    def _read_index(self) -> dict[str, Any]:
        index = self._json(
            self.folder / "index.json", "There are no complete results here.", "Let the run finish, or resume it."
        )
        version = index.get("schema_version")
        if not isinstance(version, int) or not {"n_cells", "batches", "features", "latents", "layers"} <= index.keys():
            raise _damaged(self.folder / "index.json", "entries are missing")
        if version > SCHEMA_VERSION:
            raise MosaicError(
                "run.newer",
                "These results were written by a newer version.",
                "Update Mosaic Desktop.",
                file=self.folder / "index.json",
            )
        return index

    def _json(self, path: Path, absent: str, hint: str) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise MosaicError("run.no_result", absent, hint, file=path) from None
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        if not isinstance(values, dict):
            raise _damaged(path, "not a JSON object")
        return values

    def _npy(self, path: Path, width: int) -> NDArray[np.float32]:
        try:
            array: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, error) from error
        if array.shape != (self.n_cells, width) or array.dtype != np.float32:
            raise _damaged(path, f"{array.dtype} {array.shape} instead of float32 {(self.n_cells, width)}")
        return array

    def _check_modality(self, modality: str) -> None:
        if modality not in self.modalities:
            raise MosaicError(
                "run.no_result",
                f"There is no modality {modality!r} in these results.",
                near(modality, self.modalities),
            )

    def _absent(self, key: str, what: str, name: str = "", known: Iterable[str] = ()) -> MosaicError:
        """The error for something that is not in the index, with the method's reason if there is one."""
        for asked in (key, key.rsplit(".", 1)[0], key.split("/", 1)[0]):
            if asked in self.index["cannot"]:
                return MosaicError("run.no_result", f"There is no {what} {name}: {self.index['cannot'][asked]}")
        message = f"There is no {what} {name!r} in these results." if name else f"These results hold no {what}."
        return MosaicError("run.no_result", message, near(name, known) if name else "Ask for it in the outputs.")


def near(name: str, known: Iterable[str]) -> str:
    """The nearest known names, or what there is, as a hint."""
    names = list(map(str, known))
    if found := difflib.get_close_matches(name, names, n=3):
        return f"Did you mean {' or '.join(map(repr, found))}?"
    return f"There are: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}." if names else "There are none."


def _damaged(path: Path, why: object) -> MosaicError:
    if isinstance(why, FileNotFoundError):
        why = "it is missing"
    return MosaicError(
        "run.damaged",
        f"{path.name} cannot be read: {why}.",
        "The other results are not concerned. Resume the run to write its results again.",
        file=path,
    )


def _typed(column: pd.Series[Any], kind: str) -> pd.Series[Any]:
    if kind == "bool":
        return column == "True"
    if kind == "int":
        return column.astype("int64")
    if kind == "float":
        return pd.to_numeric(column.where(column != "")).astype("float64")
    return column.where(column != "")
