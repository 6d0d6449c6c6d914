"""Which rows of which matrices make up a batch: names of the data, edits of the user, equal names in several files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.matrix import Matrix
from headless.data.pairing import without_suffix
from headless.data.preparation import BatchEdit, Preparation
from headless.errors import MosaicError

#: Two files whose smaller set of barcodes overlaps by this share hold the same cells. Barcodes come from a common
#: whitelist, so a small overlap between different samples is chance.
SAME_CELLS = 0.1


@dataclass(frozen=True)
class Part:
    """One matrix, and what its dataset says of its cells.

    Attributes
    ----------
    dataset
        Id of the dataset (file); batches of one name in several datasets are told apart by it.
    batch
        ``(n_cells,)``: name of the batch of each row; missing values are left out of the mosaic.
    label
        ``(n_cells,)``: cell type of each row, for evaluation only; ``None`` if the dataset has no labels.
    """

    dataset: str
    matrix: Matrix
    batch: NDArray[Any]
    label: NDArray[Any] | None = None


@dataclass(frozen=True)
class Segment:
    """Rows of one part that belong to a batch."""

    part: int
    rows: NDArray[np.int64]


#: Batch name -> modality -> its rows; several segments of a modality stand below one another.
Grouping = dict[str, dict[str, list[Segment]]]


def group(parts: Sequence[Part], preparation: Preparation) -> tuple[Grouping, list[str]]:
    """The rows of every batch, and notes.

    Batches of one name are one batch if their datasets hold different modalities or the same cells. If they hold the
    same modality of different cells, they are different batches, and the dataset's id is added to the name.

    Raises
    ------
    MosaicError
        ``data.unknown_batch`` for an edit of a batch that does not exist, ``data.duplicate_cells`` when two files hold
        the same modality of the same cells, ``data.no_cells`` when nothing is left.
    """
    notes: list[str] = []
    found: dict[tuple[str, str], list[tuple[str, Segment]]] = {}
    datasets = {name: i for i, name in enumerate(dict.fromkeys(part.dataset for part in parts))}
    for number, part in enumerate(parts):
        missing = pd.isna(part.batch)
        if missing.any():
            notes.append(f"{int(missing.sum()):,} cells of {part.matrix.source} have no batch and are left out.")
        codes, names = pd.factorize(pd.Series(part.batch, dtype=object))
        for code, name in enumerate(names):
            rows = np.flatnonzero(codes == code).astype(np.int64)
            found.setdefault((part.dataset, str(name)), []).append((part.matrix.modality, Segment(number, rows)))
    found = {key: found[key] for key in sorted(found, key=lambda key: (datasets[key[0]], _natural(key[1])))}
    _check_edits(preparation, found)
    named: dict[str, dict[str, list[tuple[str, Segment]]]] = {}
    merged: set[str] = set()
    for (dataset, name), segments in found.items():
        edit = _edit(preparation, dataset, name)
        if edit.exclude:
            notes.append(f"Batch {name} of {dataset} left out on request.")
            continue
        if edit.without:
            segments = _without(edit.without, segments, name)
            notes.append(f"Batch {name} of {dataset} is used without {', '.join(edit.without)}, as asked.")
        if edit.name is not None and edit.name != name:
            notes.append(f"Batch {name} of {dataset} renamed to {edit.name}.")
            merged.add(edit.name)
        named.setdefault(edit.name or name, {}).setdefault(dataset, []).extend(segments)
    grouping: Grouping = {}
    for name, holding in named.items():
        asked = name in merged
        if not asked:
            _refuse_two_matrices(parts, name, holding)
        together = [list(holding)] if asked else _same_cells(parts, name, holding)
        if len(together) > 1:
            notes.append(
                f"Several files have a batch {name} with different cells of the same modality; they are kept apart as "
                + ", ".join(f"{name} ({' + '.join(own)})" for own in together) + "."
            )
        for own in together:
            unique = name if len(together) == 1 else f"{name} ({' + '.join(own)})"
            modalities: dict[str, list[Segment]] = {}
            for dataset in own:
                for modality, segment in holding[dataset]:
                    modalities.setdefault(modality, []).append(segment)
            grouping[unique] = modalities
    if not grouping:
        raise MosaicError(
            "data.no_cells", "No batch is left.", "Add a file, or take a batch back in.", field="preparation.batches"
        )
    return grouping, notes


def _without(
    modalities: tuple[str, ...], segments: list[tuple[str, Segment]], name: str
) -> list[tuple[str, Segment]]:
    """The segments of a batch that stay; a batch must keep a modality."""
    there = {modality for modality, _ in segments}
    for modality in modalities:
        if modality not in there:
            raise MosaicError(
                "data.unknown_modality",
                f"Batch {name!r} has no {modality} to leave out.",
                f"It has {', '.join(sorted(there))}.",
                field="preparation.batches",
                batch=name,
            )
    kept = [(modality, segment) for modality, segment in segments if modality not in modalities]
    if not kept:
        raise MosaicError(
            "data.no_cells",
            f"Batch {name!r} would lose all its modalities.",
            "Leave the batch out instead (exclude).",
            field="preparation.batches",
            batch=name,
        )
    return kept


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``day2`` before ``day10``."""
    return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in re.split(r"(\d+)", name) if text]


def _edit(preparation: Preparation, dataset: str, name: str) -> BatchEdit:
    edits = preparation.batches
    return edits.get(f"{dataset}:{name}") or edits.get(name) or BatchEdit()


def _check_edits(preparation: Preparation, found: dict[tuple[str, str], Any]) -> None:
    known = {name for _, name in found} | {f"{dataset}:{name}" for dataset, name in found}
    for name in preparation.batches:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            shown = ", ".join(sorted({name for _, name in found})[:8])
            raise MosaicError(
                "data.unknown_batch",
                f"There is no batch {name!r} to change.",
                f"Did you mean {near[0]!r}?" if near else f"Batches of the data: {shown}.",
                field="preparation.batches",
                batch=name,
            )


def _same_cells(
    parts: Sequence[Part], name: str, datasets: dict[str, list[tuple[str, Segment]]]
) -> list[list[str]]:
    """Datasets that belong to one batch, group by group; one group if no modality stands in two datasets."""
    modalities = [modality for segments in datasets.values() for modality in {m for m, _ in segments}]
    if len(modalities) == len(set(modalities)):
        return [list(datasets)]
    barcodes = {dataset: _barcodes(parts, segments) for dataset, segments in datasets.items()}
    groups: list[list[str]] = []
    for dataset in datasets:
        touching = [own for own in groups if any(_overlap(barcodes[dataset], barcodes[other]) for other in own)]
        for other in (other for own in touching for other in own):
            shared = {m for m, _ in datasets[dataset]} & {m for m, _ in datasets[other]}
            if shared and _overlap(barcodes[dataset], barcodes[other]):
                raise _twice(name, sorted(shared)[0], f"{other} and {dataset}")
        groups = [own for own in groups if own not in touching] + [[*(d for own in touching for d in own), dataset]]
    position = {dataset: i for i, dataset in enumerate(datasets)}
    for own in groups:
        own.sort(key=position.__getitem__)
        held = [modality for dataset in own for modality in {m for m, _ in datasets[dataset]}]
        for modality in held:
            if held.count(modality) > 1:
                raise _twice(name, modality, " and ".join(own))
    return sorted(groups, key=lambda own: position[own[0]])


def _refuse_two_matrices(
    parts: Sequence[Part], name: str, datasets: dict[str, list[tuple[str, Segment]]]
) -> None:
    """Two matrices of one modality in one file (spliced and unspliced, say) cannot both be the modality of a cell."""
    for segments in datasets.values():
        seen: dict[str, int] = {}
        for modality, segment in segments:
            other = seen.setdefault(modality, segment.part)
            if other != segment.part:
                raise _twice(name, modality, f"{parts[other].matrix.source} and {parts[segment.part].matrix.source}")


def _twice(batch: str, modality: str, sources: str) -> MosaicError:
    return MosaicError(
        "data.duplicate_cells",
        f"{sources} hold {modality} of the same cells of batch {batch}.",
        "Leave one of the two out; if the cells are different after all, give their batches different names.",
        field="datasets",
        batch=batch,
        modality=modality,
    )


def _barcodes(parts: Sequence[Part], segments: list[tuple[str, Segment]]) -> pd.Index:
    pieces = [parts[segment.part].matrix.barcodes[segment.rows] for _, segment in segments]
    return pd.Index(np.concatenate(pieces)).unique()


def _overlap(first: pd.Index, second: pd.Index) -> bool:
    smaller = min(len(first), len(second))
    if not smaller:
        return False
    if len(first.intersection(second)) >= SAME_CELLS * smaller:
        return True
    bare = [pd.Index(without_suffix(own.to_numpy())).unique() for own in (first, second)]
    return len(bare[0].intersection(bare[1])) >= SAME_CELLS * smaller
