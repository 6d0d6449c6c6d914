"""From what a file holds to the reference that a project keeps: decisions that a person can look at and change."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from headless.data.counts import is_counts, refuse
from headless.data.datasets import DatasetRef, MatrixRef
from headless.data.fingerprint import fingerprint
from headless.data.matrix import FileInfo, MatrixInfo, ObsColumn
from headless.data.pattern import MODALITIES
from headless.errors import MosaicError

_BATCH = ("batch", "batchid", "sample", "sampleid", "origident", "donor", "donorid", "library", "libraryid", "lane")
_LABEL = ("celltype", "celltypes", "label", "labels", "annotation", "cellannotation")
_ENDINGS = (".gz", ".h5mu", ".h5ad", ".h5", ".hdf5", ".zip", ".zarr", ".csv", ".tsv", ".txt", ".npz", ".mtx")
#: A column with more levels than this tells cells apart rather than batches.
_MOST_BATCHES = 1000


def propose(
    info: FileInfo,
    base: Path,
    batch: str | None = None,
    label: str | None = None,
    *,
    modalities: Mapping[str, str | None] | None = None,
    layers: Mapping[str, str] | None = None,
) -> DatasetRef:
    """A reference to a file, with every matrix whose modality is known.

    Parameters
    ----------
    base
        Folder of the project; the relative path counts from there.
    batch, label
        Columns of obs. ``None``: a column with a usual name (``batch``, ``sample``, ``donor`` ...; ``cell_type`` ...)
        if there is one; ``""``: none, so that the whole file is one batch named after it.
    modalities, layers
        What a person decided, by matrix key; a modality of ``None`` leaves the matrix out.

    Raises
    ------
    MosaicError
        ``data.unknown_modality`` if no matrix is recognised, ``data.not_counts``, ``data.no_column``,
        ``data.no_matrix``, ``data.no_layer``, or what :func:`~headless.data.fingerprint.fingerprint` raises.
    """
    matrices = _matrices(info, dict(modalities or {}), dict(layers or {}))
    batch_column = _column(info, batch, "batch_column", _BATCH)
    label_column = _column(info, label, "label_column", _LABEL)
    path = info.path.parent.resolve() / info.path.name  # a link stays a link: people arrange data with them
    name = dataset_id(info.path)
    return DatasetRef(
        id=name,
        path=_relative(path, Path(base).resolve()),
        absolute=path.as_posix(),
        format=info.format,
        fingerprint=fingerprint(path),
        matrices=matrices,
        batch_column=batch_column,
        batch_name=None if batch_column else name,
        label_column=label_column,
    )


def dataset_id(path: PurePath) -> str:
    """A short name from a file name: endings dropped, anything unusual an underscore."""
    name = path.name
    if name in ("matrix.mtx", "matrix.mtx.gz"):
        name = path.parent.name
    while any(name.lower().endswith(ending) for ending in _ENDINGS):
        name = name[: name.rindex(".")]
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "data"


def _matrices(info: FileInfo, modalities: dict[str, str | None], layers: dict[str, str]) -> tuple[MatrixRef, ...]:
    known = {matrix.key: matrix for matrix in info.matrices}
    for key in (*modalities, *layers):
        if key not in known:
            raise MosaicError(
                "data.no_matrix", f"{info.path.name} has no matrix '{key}'.", f"It has: {', '.join(known)}.",
                field="matrices", file=info.path,
            )  # fmt: skip
    chosen: dict[str, tuple[MatrixInfo, MatrixRef]] = {}
    skipped: list[str] = []
    for matrix in info.matrices:
        modality = modalities.get(matrix.key, matrix.modality)
        reason = "chosen by hand" if matrix.key in modalities else matrix.reason
        if modality is None:
            skipped.append(f"{matrix.key} left out ({reason})")
            continue
        if modality not in MODALITIES:
            raise MosaicError(
                "data.unknown_modality", f"'{modality}' is no modality known here.",
                f"Choose one of: {', '.join(MODALITIES)}.", field="modality", file=info.path, key=matrix.key,
            )  # fmt: skip
        ref = MatrixRef(key=matrix.key, modality=modality, layer=_layer(info, matrix, modality, layers), reason=reason)
        if modality in chosen:
            other = chosen[modality][0]
            loser = matrix if other.n_cells * other.n_features >= matrix.n_cells * matrix.n_features else other
            skipped.append(f"{loser.key} left out (a second {modality}; the larger one is kept)")
            if loser is matrix:
                continue
        chosen[modality] = (matrix, ref)
    if not chosen:
        raise MosaicError(
            "data.unknown_modality",
            f"{info.path.name}: no modality was recognised ({'; '.join(m.reason for m in info.matrices)}).",
            "Say for each matrix which modality it is: rna, adt or atac.",
            field="modality",
            file=info.path,
        )
    return tuple(ref.model_copy(update={"reason": "; ".join([ref.reason, *skipped])}) for _, ref in chosen.values())


def _layer(info: FileInfo, matrix: MatrixInfo, modality: str, layers: dict[str, str]) -> str:
    wished = layers.get(matrix.key)
    if wished is not None:
        if wished not in matrix.layers:
            raise MosaicError(
                "data.no_layer", f"{info.path.name}: {matrix.key} has no layer '{wished}'.",
                f"It has: {', '.join(matrix.layers)}.", field="layer", file=info.path,
            )  # fmt: skip
        return wished
    if not is_counts(matrix.counts):
        raise refuse(matrix.counts, info.path, modality, matrix.layer, matrix.layers)
    return matrix.layer


def _column(info: FileInfo, wished: str | None, field: str, usual: tuple[str, ...]) -> str | None:
    names = [column.name for column in info.obs_columns]
    if wished == "":
        return None
    if wished is None:
        for name in usual:
            for column in info.obs_columns:
                if re.sub(r"[^a-z]", "", column.name.lower()) == name and _groups(column):
                    return column.name
        return None
    if wished in names:
        return wished
    # 'rna:batch' is listed as 'batch' where the modalities agree on it (see readers.obs).
    modality, mark, rest = wished.partition(":")
    if mark and rest in names and any(matrix.key == f"mod/{modality}" for matrix in info.matrices):
        return rest
    near = difflib.get_close_matches(wished, names, n=3, cutoff=0.5)
    near += [name for name in names if name.partition(":")[2] == wished and name not in near]
    if near:
        hint = f"Did you mean {' or '.join(repr(name) for name in near)}?"
    else:
        hint = f"It has: {', '.join(names)}." if names else "It describes no cells."
    raise MosaicError(
        "data.no_column", f"{info.path.name} has no column '{wished}' in obs.", hint, field=field, file=info.path
    )


def _groups(column: ObsColumn) -> bool:
    return column.kind != "number" and column.n_levels is not None and 0 < column.n_levels <= _MOST_BATCHES


def _relative(path: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(path, base)).as_posix()
    except ValueError:  # another drive
        return path.as_posix()
