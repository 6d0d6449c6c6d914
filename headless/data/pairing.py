"""Cells of a batch: its modalities joined by barcode, never by the order of rows, with a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.pattern import MODALITIES
from headless.errors import MosaicError
from headless.schema import Frozen

_SUFFIX = re.compile(r"-\d+$")


class PairingReport(Frozen):
    """How the barcodes of one batch went together (JSON-ready).

    Attributes
    ----------
    n_cells
        Cells of the batch.
    matched
        Cells that all modalities of the batch have.
    extra
        For each modality its barcodes that not all others have.
    duplicates
        For each modality the rows whose barcode had stood before.
    suffix
        Modalities whose barcodes only matched once an ending such as ``-1`` was left out.
    left_out
        Cells left out because a modality lacked them (pairing ``intersection``).
    """

    batch: str
    modalities: tuple[str, ...]
    n_cells: int
    matched: int
    extra: dict[str, int]
    duplicates: dict[str, int]
    suffix: tuple[str, ...] = ()
    left_out: int = 0

    def in_words(self) -> str:
        """One line for reports."""
        if len(self.modalities) == 1:
            text = f"Batch {self.batch}: {self.n_cells:,} cells with {self.modalities[0]}"
        else:
            extra = ", ".join(f"{n:,} extra in {m}" for m, n in self.extra.items() if n)
            text = (
                f"Batch {self.batch}: {self.matched:,} barcodes in all of {', '.join(self.modalities)}"
                + (f"; {extra}" if extra else "")
            )
        if self.suffix:
            text += f"; matched only after leaving out endings such as '-1' ({', '.join(self.suffix)})"
        double = ", ".join(f"{n:,} in {m}" for m, n in self.duplicates.items() if n)
        if double:
            text += f"; repeated barcodes: {double}"
        if self.left_out:
            text += f"; {self.left_out:,} cells without a partner left out"
        return text + "."


@dataclass(frozen=True)
class Joined:
    """The cells of a batch.

    Attributes
    ----------
    barcodes
        ``(n_cells,)``, unique; in the order of the rows of the first modality, then what others add.
    rows, cells
        For each modality, the rows of its matrix that are used and the cell (0 ... n_cells - 1, ascending) of each.
    """

    barcodes: NDArray[np.object_]
    rows: Mapping[str, NDArray[np.int64]]
    cells: Mapping[str, NDArray[np.int64]]
    report: PairingReport


def without_suffix(barcodes: NDArray[Any]) -> NDArray[np.object_]:
    """Barcodes without an ending such as ``-1``."""
    return np.array([_SUFFIX.sub("", barcode) for barcode in barcodes], dtype=object)


def join(
    batch: str,
    barcodes: Mapping[str, NDArray[Any]],
    *,
    how: Literal["union", "intersection"] = "union",
    match_without_suffix: bool = True,
    duplicates: Literal["refuse", "first"] = "refuse",
    may_be_disjoint: bool = False,
) -> Joined:
    """Join the modalities of a batch by barcode.

    Parameters
    ----------
    barcodes
        Modality -> ``(n_rows,)``, the barcode of each row of its matrix.
    how, match_without_suffix, duplicates
        See :class:`~headless.data.preparation.Preparation`.
    may_be_disjoint
        Accept a modality that shares no barcode with the others: right inside one file, whose barcodes are written
        alike; between files it is most likely a mistake.

    Raises
    ------
    MosaicError
        ``data.duplicate_barcodes`` when partners are ambiguous, ``data.no_shared_barcode`` when files share none,
        ``data.no_cells`` when the intersection is empty.
    """
    ordered = {m: np.asarray(barcodes[m], dtype=object) for m in _canonical(barcodes)}
    repeated = {m: int(pd.Index(own).duplicated().sum()) for m, own in ordered.items()}
    if len(ordered) == 1:
        (modality, own), = ordered.items()
        rows = np.arange(len(own), dtype=np.int64)
        if repeated[modality] and duplicates == "first":
            rows = np.flatnonzero(~pd.Index(own).duplicated())
            own = own[rows]
        report = PairingReport(
            batch=batch, modalities=(modality,), n_cells=len(own), matched=len(own), extra={modality: 0},
            duplicates=repeated,
        )
        return Joined(_numbered(own), {modality: rows}, {modality: np.arange(len(own), dtype=np.int64)}, report)
    rows_of: dict[str, NDArray[np.int64]] = {}
    for modality, own in ordered.items():
        again = pd.Index(own).duplicated()
        if again.any() and duplicates == "refuse":
            shown = ", ".join(map(str, pd.unique(own[again])[:3]))
            raise MosaicError(
                "data.duplicate_barcodes",
                f"In batch {batch}, {int(again.sum()):,} barcodes of {modality} repeat others (such as {shown}), "
                "so their cells in other modalities are ambiguous.",
                "Name the column that tells their batches apart, or keep the first of each (duplicates = first).",
                field="preparation.duplicates",
                batch=batch,
                modality=modality,
            )
        rows_of[modality] = np.flatnonzero(~again).astype(np.int64)
    names = pd.Index([], dtype=object)
    cells_of: dict[str, NDArray[np.int64]] = {}
    suffix: list[str] = []
    for modality, own in ordered.items():
        keys = pd.Index(own[rows_of[modality]])
        found = names.get_indexer(keys)
        if len(names) and not (found >= 0).any():
            if match_without_suffix:
                found = _stripped(names, keys)
            if (found >= 0).any():
                suffix.append(modality)
            elif not may_be_disjoint:
                raise _no_match(batch, modality, names, keys, ordered)
        fresh = found < 0
        cells = found.astype(np.int64)
        cells[fresh] = len(names) + np.arange(int(fresh.sum()))
        cells_of[modality] = cells
        names = names.append(keys[fresh])
    having = np.zeros(len(names), dtype=np.int64)
    for cells in cells_of.values():
        having[cells] += 1
    complete = having == len(ordered)
    kept = np.ones(len(names), dtype=bool) if how == "union" else complete
    if not kept.any():
        raise MosaicError(
            "data.no_cells",
            f"No barcode of batch {batch} is in all of {', '.join(ordered)}.",
            "Pair by union, or leave one of the files out.",
            field="preparation.pairing",
            batch=batch,
        )
    number = np.cumsum(kept) - 1
    final_rows, final_cells = {}, {}
    for modality, cells in cells_of.items():
        by_cell = np.argsort(cells, kind="stable")
        by_cell = by_cell[kept[cells[by_cell]]]
        if len(by_cell):
            final_rows[modality] = rows_of[modality][by_cell]
            final_cells[modality] = number[cells[by_cell]]
    report = PairingReport(
        batch=batch,
        modalities=tuple(ordered),
        n_cells=int(kept.sum()),
        matched=int(complete.sum()),
        extra={m: int((~complete[cells]).sum()) for m, cells in cells_of.items()},
        duplicates=repeated,
        suffix=tuple(suffix),
        left_out=int((~kept).sum()),
    )
    return Joined(np.asarray(names[kept], dtype=object), final_rows, final_cells, report)


def _stripped(names: pd.Index, keys: pd.Index) -> NDArray[np.intp]:
    """Positions of ``keys`` in ``names`` with endings left out; all -1 if that makes a barcode ambiguous."""
    bare_names, bare_keys = pd.Index(without_suffix(names.to_numpy())), pd.Index(without_suffix(keys.to_numpy()))
    if not bare_names.is_unique or not bare_keys.is_unique:
        return np.full(len(keys), -1, dtype=np.intp)
    return bare_names.get_indexer(bare_keys)


def _no_match(
    batch: str, modality: str, names: pd.Index, keys: pd.Index, ordered: Mapping[str, Any]
) -> MosaicError:
    others = ", ".join(m for m in ordered if m != modality)
    return MosaicError(
        "data.no_shared_barcode",
        f"In batch {batch}, none of the {len(keys):,} barcodes of {modality} (such as {keys[0]}) is among the "
        f"{len(names):,} of {others} (such as {names[0]}).",
        "If these are the same cells, their barcodes must be written alike; else give the batches different names.",
        field="preparation.batches",
        batch=batch,
        modality=modality,
    )


def _numbered(barcodes: NDArray[np.object_]) -> NDArray[np.object_]:
    """Barcodes with repeats told apart: ``AAC``, ``AAC#2`` ..."""
    if not pd.Index(barcodes).has_duplicates:
        return barcodes
    count = pd.Series(barcodes).groupby(barcodes).cumcount().to_numpy()
    return np.array([b if not n else f"{b}#{n + 1}" for b, n in zip(barcodes, count, strict=True)], dtype=object)


def _canonical(modalities: Mapping[str, Any]) -> list[str]:
    known = [m for m in MODALITIES if m in modalities]
    return known + sorted(m for m in modalities if m not in MODALITIES)
