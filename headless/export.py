"""Export the results of a run to files that other programs open: .h5mu, .h5ad, .csv and .csv.gz.

This file decides what is exported and checks it; :mod:`headless.export_h5` writes the HDF5 files. An input file is
never overwritten, and a file appears under its name only when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.errors import MosaicError
from headless.results import Results, near
from headless.tasks.store import replacing

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic

SUFFIXES = (".h5mu", ".h5ad", ".csv", ".csv.gz")


@dataclass(frozen=True)
class Layer:
    """One layer to export.

    Attributes
    ----------
    key
        Its name in the results: ``imputed/rna``, ``translated/rna_to_adt``.
    modality
        Whose features its columns are.
    name
        Its name in the file: ``imputed``, ``corrected``, ``rna_to_adt``.
    stored
        Is it read from the results, or computed from the model?
    """

    key: str
    modality: str
    name: str
    stored: bool


def export(
    results: Results,
    to: str | Path,
    layers: Sequence[str] | None = None,
    *,
    modality: str | None = None,
    latent: str | None = None,
    mosaic: Mosaic | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write the results of a run to one file; the suffix chooses the format.

    ``.h5mu`` holds every cell in every modality: measured counts in ``X`` (zero rows where a cell lacks the modality),
    layers, ``obs["measured"]``, the embeddings in ``obsm`` (joint: global; from one modality alone: in the modality,
    NaN rows where it is lacking) and provenance in ``uns["mosaic"]``. ``.h5ad`` holds one modality and the joint
    embedding. ``.csv`` and ``.csv.gz`` hold one latent.

    Parameters
    ----------
    layers
        ``imputed``, ``corrected``, ``translated``, or one of them for one modality (``imputed/rna``,
        ``translated/rna_to_adt``). ``None``: the imputed and corrected layers that are stored. A layer that is not
        stored is computed from the model where possible.
    modality
        Which modality a ``.h5ad`` holds; needed if there are several.
    latent
        What a ``.csv`` holds; the joint embedding by default.
    mosaic
        The data of the run, for measured counts in ``X`` and for translations from several modalities that are not
        stored. Without it ``X`` is left out.
    overwrite
        Replace a file that exists.
    inputs
        Further files that must not be overwritten, besides the input files named in the run's request.
    progress
        Called with what is being written, cells done and cells in all.

    Raises
    ------
    MosaicError
        ``usage.suffix``, ``usage.exists``, ``usage.overwrites_input``, ``usage.unknown_layer``, ``usage.modality``
        (with the nearest name); ``run.no_result``; ``data.other_cells``; ``disk.*``.
    """
    to = Path(to)
    suffix = check_target(results, to, overwrite, inputs)
    if suffix.startswith(".csv"):
        _export_csv(results, to, latent or f"joint.{results.biological}")
        return to
    chosen = results.modalities if suffix == ".h5mu" else (_one_modality(results, modality),)
    wanted = choose_layers(results, layers, chosen, mosaic)
    if mosaic is not None:
        mosaic = _as_trained(results, mosaic)
    from headless.export_h5 import write_h5

    with replacing(to, "write the export") as temporary:
        write_h5(results, temporary, chosen, wanted, mosaic, multimodal=suffix == ".h5mu", device=device, note=progress)
    return to


def check_target(results: Results, to: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> str:
    """The suffix of a file that may be written.

    Raises
    ------
    MosaicError
        ``usage.suffix``, ``usage.overwrites_input``, ``usage.inside_run``, ``usage.exists``, ``usage.no_folder``.
    """
    suffix = next((known for known in sorted(SUFFIXES, key=len, reverse=True) if to.name.endswith(known)), "")
    if not suffix or to.name == suffix:
        raise MosaicError(
            "usage.suffix", f"{to.name} has no known suffix.", f"Use one of {', '.join(SUFFIXES)}.", file=to
        )
    if not to.parent.is_dir():
        raise MosaicError("usage.no_folder", f"There is no folder {to.parent}.", "Make it, or choose another.", file=to)
    target = to.resolve()
    for path in (*_input_paths(results), *map(Path, inputs)):
        source = path.resolve()
        if target == source or source in target.parents or (to.exists() and path.exists() and to.samefile(path)):
            raise MosaicError(
                "usage.overwrites_input",
                f"{to.name} is input data of this run; input files are never written to.",
                "Choose another name.",
                file=to,
            )
    if results.folder.resolve() in target.parents:
        raise MosaicError(
            "usage.inside_run", "The results of the run are kept as they are.", "Choose another folder.", file=to
        )
    if to.exists() and not (overwrite and to.is_file()):
        raise MosaicError(
            "usage.exists", f"{to.name} exists.", "Choose another name, or replace it (--overwrite).", file=to
        )
    return suffix


def choose_layers(
    results: Results, asked: Sequence[str] | None, modalities: Sequence[str], mosaic: Mosaic | None = None
) -> list[Layer]:
    """The layers that are asked for, of these modalities, stored or computable.

    Raises
    ------
    MosaicError
        ``usage.unknown_layer`` with the nearest name; ``run.no_result`` with the reason for one that is neither stored
        nor computable.
    """
    known = {layer.key: layer for layer in _all_layers(results)}
    if asked is None:
        keys = [key for key in known if key in results.layers and not key.startswith("translated/")]
    else:
        keys = [key for name in asked for key in _expand(name, list(known))]
    chosen = [known[key] for key in dict.fromkeys(keys) if known[key].modality in modalities]
    for layer in chosen:
        if not layer.stored:
            _check_computable(results, layer, mosaic)
    return chosen


def _all_layers(results: Results) -> list[Layer]:
    """Every layer that a run of these modalities can have."""
    from headless.tasks.translate import translations

    plain = [(f"{kind}/{m}", m, kind) for kind in ("imputed", "corrected") for m in results.modalities]
    made = [(f"translated/{name}", target, name) for name, (_, target) in translations(results.modalities).items()]
    return [Layer(key, modality, name, key in results.layers) for key, modality, name in (*plain, *made)]


def _expand(name: str, known: list[str]) -> list[str]:
    found = [key for key in known if key == name or key.startswith(f"{name}/")]
    if not found:
        kinds = dict.fromkeys(key.split("/")[0] for key in known)
        raise MosaicError(
            "usage.unknown_layer", f"There is no layer {name!r}.", near(name, (*kinds, *known)), field="layers"
        )
    return found


def _check_computable(results: Results, layer: Layer, mosaic: Mosaic | None) -> None:
    reason = results.cannot.get(layer.key) or results.cannot.get(layer.key.split("/")[0])
    if reason is None and not (results.folder / "model" / "model.json").exists():
        reason = "it was not stored, and the trained model is not beside the results."
    if reason is None and layer.key.startswith("translated/") and mosaic is None:
        reason = "it was not stored, and computing it needs the input data, which cannot be reached."
    if reason is not None:
        raise MosaicError(
            "run.no_result",
            f"The layer {layer.key} cannot be exported: {reason}",
            "Leave it out, or ask a new run for it.",
        )


def _one_modality(results: Results, modality: str | None) -> str:
    if modality is None and len(results.modalities) == 1:
        return results.modalities[0]
    if modality in results.modalities:
        return str(modality)
    message = (
        f"There is no modality {modality!r}." if modality else "A .h5ad file holds one modality, the run has more."
    )
    hint = f"Name one of {', '.join(results.modalities)}, or export to .h5mu."
    raise MosaicError("usage.modality", message, hint, field="modality")


def _as_trained(results: Results, mosaic: Mosaic) -> Mosaic:
    """The data as the model saw them: cells in the order of the results, and what was held out held out here too.

    Raises
    ------
    MosaicError
        ``data.other_cells`` if these are not the cells and features of the run.
    """
    same = mosaic.n_cells == results.n_cells and set(mosaic.batches) == set(results.batches)
    for modality in results.modalities:
        names = results.features(modality).index
        same = same and modality in mosaic.features and names.equals(mosaic.features[modality].index)
    place = results.cells.index.get_indexer(mosaic.cells.index) if same else np.array([-1])
    if (place < 0).any() or (results.batch_codes[place] != _codes_in(results.batches, mosaic)).any():
        raise MosaicError(
            "data.other_cells",
            "The data do not hold the cells and features of this run.",
            "Use the data and the preparation of the run, or export without measured counts.",
        )
    mosaic = _ordered(mosaic, place, results.batches)
    hidden = {m: np.flatnonzero(mosaic.measured(m) & ~results.measured(m)) for m in results.modalities}
    return mosaic.without(hidden)


def _codes_in(batches: tuple[str, ...], mosaic: Mosaic) -> NDArray[np.int64]:
    codes = pd.Categorical(mosaic.cells["batch"].astype(str), categories=list(batches)).codes
    return np.asarray(codes, dtype=np.int64)


def _ordered(mosaic: Mosaic, place: NDArray[np.intp], batches: tuple[str, ...]) -> Mosaic:
    """The mosaic with cell ``i`` at ``place[i]``: another version of the program may have read the data in another
    order, and results are kept for years."""
    if (place == np.arange(len(place))).all():
        return mosaic
    tiles = {}
    for key, tile in mosaic.tiles.items():
        rows = np.argsort(place[tile.cells])
        tiles[key] = replace(tile, source=tile.source.take(rows), cells=place[tile.cells][rows].astype(np.int64))
    return replace(mosaic, cells=mosaic.cells.iloc[np.argsort(place)], batches=batches, tiles=tiles)


def _input_paths(results: Results) -> list[Path]:
    project = results.folder.resolve().parents[2] if len(results.folder.resolve().parents) > 2 else results.folder
    paths = []
    for ref in results.provenance.get("datasets", ()):
        paths += [Path(ref["absolute"]), project / ref["path"]]
    return paths


def _export_csv(results: Results, to: Path, latent: str) -> None:
    values = results.latents(latent)
    part = latent.partition(".")[2] or "z"
    table = pd.DataFrame(
        np.asarray(values), index=results.cells.index, columns=[f"{part}_{i + 1}" for i in range(values.shape[1])]
    )
    with replacing(to, "write the export") as temporary:
        table.to_csv(temporary, index_label="cell", lineterminator="\n")
