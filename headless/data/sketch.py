"""The mosaic as the files hold it: a first look, before any preparation and without reading values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headless.data.datasets import DatasetRef
from headless.data.locate import resolve
from headless.data.pattern import MODALITIES, Pattern, TilePattern


def sketch(datasets: Sequence[DatasetRef], base: str | Path) -> Pattern:
    """Batches x modalities with cells counted by barcode and features by name.

    Raises
    ------
    MosaicError
        What :func:`headless.data.locate.resolve` and the readers raise.
    """
    from headless.data.read import read_matrix

    cells: dict[str, set[str]] = {}
    tiles: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for ref in datasets:
        path = resolve(ref, Path(base), verify=False)
        for item in ref.matrices:
            matrix = read_matrix(path, item.key, item.layer, item.modality, on_disk=True)
            if ref.batch_column is None:
                batches = [ref.batch_name or ref.id] * len(matrix.barcodes)
            else:
                batches = matrix.obs[ref.batch_column].astype(str).tolist()
            names = set(map(str, matrix.features.index))
            for barcode, batch in zip(matrix.barcodes, batches, strict=True):
                cells.setdefault(batch, set()).add(barcode)
                tiles.setdefault((batch, item.modality), (set(), names))[0].add(barcode)
            for batch in set(batches):
                tiles[batch, item.modality] = (tiles[batch, item.modality][0], tiles[batch, item.modality][1] | names)
    present = [m for m in MODALITIES if any(modality == m for _, modality in tiles)]
    union = {m: set[str]().union(*(names for (_, other), (_, names) in tiles.items() if other == m)) for m in present}
    return Pattern(
        batches=tuple(cells),
        n_cells={batch: len(found) for batch, found in cells.items()},
        n_features={m: len(names) for m, names in union.items()},
        tiles=tuple(
            TilePattern(
                batch=batch,
                modality=m,
                n_cells=len(tiles[batch, m][0]),
                n_features=len(tiles[batch, m][1]),
            )
            for batch in cells
            for m in present
            if (batch, m) in tiles
        ),
    )
