"""Writing results to .h5mu and .h5ad piece by piece.

mudata or anndata write the skeleton (obs, var, obsm, uns); measured counts and layers, which may be larger than
memory, are then streamed into it through h5py in anndata's on-disk format.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.errors import MosaicError
from headless.export import Layer
from headless.results import Results
from headless.tasks.store import CHUNK, LEAST_SHARE, plain_columns

if TYPE_CHECKING:
    import anndata

    from headless.data.mosaic import Mosaic

Note = Callable[[str, int, int], None]

#: Cells written at a time: the rows of one chunk.
BLOCK = CHUNK[0]


def write_h5(
    results: Results,
    path: Path,
    modalities: Sequence[str],
    layers: Sequence[Layer],
    mosaic: Mosaic | None,
    *,
    multimodal: bool,
    device: str,
    note: Note,
) -> None:
    """Write one file; see :func:`headless.export.export`, which checks everything first.

    Raises
    ------
    MosaicError
        ``disk.full`` if the layers surely do not fit, or when the disk runs full.
    """
    _require_space(results, path, layers)
    uns = provenance(results, layers, measured=mosaic is not None)
    try:
        if multimodal:
            _write_mudata_skeleton(results, path, modalities, uns)
        else:
            _write_anndata_skeleton(results, path, modalities[0], uns)
        _stream(results, path, modalities, layers, mosaic, multimodal, device, note)
    except (OSError, RuntimeError) as error:
        # HDF5 tells of a full disk in its text alone, now and then as a RuntimeError.
        if "errno = 28" in str(error) or "No space left" in str(error):
            raise MosaicError(
                "disk.full", "Could not write the export: the disk is full.", "Free some space, then repeat.", file=path
            ) from error
        raise


def provenance(results: Results, layers: Sequence[Layer], measured: bool) -> dict[str, str | int]:
    """How the exported numbers were made, for ``uns["mosaic"]``: plain values, and JSON text where they are nested.

    Of input files only the names and fingerprints are told, not where they lay: an exported file is given to others.
    """
    from headless import __version__
    from headless.files import now

    request = dict(results.provenance)
    request["datasets"] = [
        {**{key: value for key, value in ref.items() if key != "absolute"}, "path": PurePosixPath(ref["path"]).name}
        for ref in request.get("datasets", [])
    ]
    facts: dict[str, str | int] = {
        "program": "Mosaic Desktop",
        "version": str(__version__),
        "exported": now(),
        "model": results.model,
        "run": str(request.get("id", results.folder.parent.name)),
        "X": "measured counts" if measured else "absent: the input data were not at hand",
        "layers": json.dumps({layer.key: "stored" if layer.stored else "computed" for layer in layers}),
        "cannot": json.dumps(results.cannot, ensure_ascii=False),
        "notes": json.dumps(results.index.get("notes", []), ensure_ascii=False),
    }
    for name in ("project", "experiment", "preset", "created", "seed"):
        if request.get(name) is not None:
            facts[name] = request[name]
    for name in ("settings", "datasets", "preparation", "holdout", "versions"):
        if request.get(name):
            facts[name] = json.dumps(request[name], ensure_ascii=False)
    return facts


# ---- the skeleton -----------------------------------------------------------------------------------------------


def _write_mudata_skeleton(results: Results, path: Path, modalities: Sequence[str], uns: dict[str, Any]) -> None:
    import mudata

    short = [name for name in ("batch", "label") if name in results.cells]
    with mudata.set_options(pull_on_update=False), warnings.catch_warnings():
        # A gene and a protein of one name are nothing unusual, and each modality has its own names.
        warnings.filterwarnings("ignore", message="var_names are not unique")
        data = mudata.MuData({m: _anndata(results, m, results.cells[short], _obsm(results, m)) for m in modalities})
        data.obs = results.cells.copy()
        for key, values in _obsm(results, "joint").items():
            data.obsm[key] = values
        data.uns["mosaic"] = uns
        data.write_h5mu(path)


def _write_anndata_skeleton(results: Results, path: Path, modality: str, uns: dict[str, Any]) -> None:
    alone = {
        f"{key}_{modality}": values for key, values in _obsm(results, modality, parts=[results.biological]).items()
    }
    data = _anndata(results, modality, results.cells, {**_obsm(results, "joint"), **alone})
    data.uns["mosaic"] = uns
    data.write_h5ad(path)


def _anndata(
    results: Results, modality: str, obs: pd.DataFrame, obsm: dict[str, NDArray[np.float32]]
) -> anndata.AnnData:
    import anndata

    table = obs.copy()
    table["measured"] = results.measured(modality)
    var = plain_columns(results.features(modality))
    return anndata.AnnData(obs=table, var=var, obsm=obsm)


def _obsm(results: Results, name: str, parts: Sequence[str] | None = None) -> dict[str, NDArray[np.float32]]:
    """``X_<model>``: the biological part; ``X_<model>_<part>``: the others. Empty if the method gave no such latent."""
    if name not in results.index["latents"]:
        return {}
    found = {}
    for part in parts or results.parts:
        key = f"X_{results.model}" if part == results.biological else f"X_{results.model}_{part}"
        found[key] = np.array(results.latents(f"{name}.{part}"))
    return found


# ---- what is streamed into it -----------------------------------------------------------------------------------


def _stream(
    results: Results,
    path: Path,
    modalities: Sequence[str],
    layers: Sequence[Layer],
    mosaic: Mosaic | None,
    multimodal: bool,
    device: str,
    note: Note,
) -> None:
    import h5py

    compute = _Compute(results, mosaic, device)
    with h5py.File(path, "r+") as file:
        for modality in modalities:
            group = file[f"mod/{modality}"] if multimodal else file
            if mosaic is not None:
                write_counts(group, mosaic, modality, note)
            for layer in layers:
                if layer.modality != modality:
                    continue
                sink = _new_layer(group, layer.name, results.n_cells, results.index["features"][modality]["n"])
                if layer.stored:
                    _copy_layer(results, layer, sink, note)
                else:
                    compute.fill(layer.key, sink, note)


def _new_layer(group: Any, name: str, n: int, d: int) -> Any:
    """An empty dense layer in anndata's format (``array`` 0.2.0), NaN until written."""
    layers = group.require_group("layers")
    chunks = (min(CHUNK[0], n), min(CHUNK[1], d))
    dataset = layers.create_dataset(
        name, (n, d), "f4", chunks=chunks, compression="gzip", compression_opts=1, shuffle=True, fillvalue=np.nan
    )
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return dataset


def _copy_layer(results: Results, layer: Layer, sink: Any, note: Note) -> None:
    kind, name = layer.key.split("/")
    for rows in _blocks(results.n_cells):
        sink[rows] = results.rows(kind, name, rows)
        note(layer.key, rows.stop, results.n_cells)


def write_counts(group: Any, mosaic: Mosaic, modality: str, note: Note = lambda what, done, total: None) -> None:
    """Measured counts of all cells as the group's ``X`` (``csr_matrix`` 0.1.0); other cells' rows are empty."""
    if "X" in group:
        del group["X"]
    n, d = mosaic.n_cells, len(mosaic.features[modality])
    matrix = group.create_group("X")
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n, d])})
    packed = {"maxshape": (None,), "chunks": (262_144,), "compression": "gzip", "compression_opts": 1, "shuffle": True}
    data = matrix.create_dataset("data", (0,), "f4", **packed)
    # scipy wants both index arrays of one width, and the number of values is not known before they are written.
    width = "i4" if n * d < 2**31 else "i8"
    indices = matrix.create_dataset("indices", (0,), width, **packed)
    lengths = np.zeros(n, dtype=np.int64)
    # Cells of a batch stand together in the order of the batches, so tiles in that order are in the order of cells.
    tiles = [mosaic.tiles[batch, modality] for batch in mosaic.batches if (batch, modality) in mosaic.tiles]
    for tile in tiles:
        for block in _blocks(tile.source.n_rows):
            rows = tile.source.rows(np.arange(block.start, block.stop))
            lengths[tile.cells[block]] = np.diff(rows.indptr)
            for dataset, values in ((data, rows.data), (indices, rows.indices)):
                start = len(dataset)
                dataset.resize((start + len(values),))
                dataset[start:] = values
            note(f"measured/{modality}", int(tile.cells[block.stop - 1]) + 1, n)
    matrix.create_dataset("indptr", data=np.r_[0, np.cumsum(lengths)].astype(width))


class _Compute:
    """Layers that were not stored, decoded with the run's model; it is loaded when the first one is needed."""

    def __init__(self, results: Results, mosaic: Mosaic | None, device: str) -> None:
        self.results = results
        self.mosaic = mosaic
        self.device = device
        self._module: Any = None

    @property
    def module(self) -> Any:
        if self._module is None:
            from headless.models.store import load_model

            self._module = load_model(self.results.folder / "model", self.device)
        return self._module

    def fill(self, key: str, sink: Any, note: Note) -> None:
        """Compute the layer ``key`` into ``sink``."""
        kind, name = key.split("/")
        if kind == "translated":
            self._translate(key, name, sink, note)
            return
        from headless.tasks.correct import corrected_latents, decode_blocks

        latents, codes = np.asarray(self.results.latents("joint")), self.results.batch_codes
        if kind == "corrected":
            latents, codes = corrected_latents(self.module, latents, codes, self.device)
        for rows, values in decode_blocks(self.module, latents, codes, name, self.device):
            sink[rows] = values
            note(key, rows.stop, self.results.n_cells)

    def _translate(self, key: str, name: str, sink: Any, note: Note) -> None:
        from headless.tasks.base import CANNOT, stream
        from headless.tasks.translate import translated, translations

        assert self.mosaic is not None  # checked by headless.export
        inputs, target = translations(self.results.modalities)[name]
        refused = stream(
            self.module,
            self.mosaic,
            [translated(name, inputs, target, sink)],
            self.device,
            progress=lambda done, total: note(key, done, total),
        )
        if refused:
            raise MosaicError(CANNOT, f"The layer {key} cannot be computed: {refused[key]}")


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _require_space(results: Results, path: Path, layers: Sequence[Layer]) -> None:
    need = sum(4 * results.n_cells * results.index["features"][layer.modality]["n"] for layer in layers)
    free = shutil.disk_usage(path.parent).free
    if need * LEAST_SHARE > free:
        raise MosaicError(
            "disk.full",
            f"The layers need about {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
            "Export fewer layers, or choose another disk.",
            file=path,
        )
