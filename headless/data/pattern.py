"""What a mosaic looks like without its numbers: batches x modalities, counts of cells and features.

Torch-free and small: the project's checks, ``supports()`` of every method, run folders and the window's mosaic map
read it.
"""

from __future__ import annotations

from typing import Literal

from headless.schema import Frozen

#: The order in which modalities are shown, stored and encoded everywhere.
MODALITIES: tuple[str, ...] = ("rna", "adt", "atac")


class TilePattern(Frozen):
    """One measured tile: a modality of a batch."""

    batch: str
    modality: str
    n_cells: int
    n_features: int


class Pattern(Frozen):
    """Batches, modalities (with the size of the union of features) and the measured tiles."""

    batches: tuple[str, ...]
    n_cells: dict[str, int]
    n_features: dict[str, int]
    tiles: tuple[TilePattern, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in the canonical order."""
        return tuple(self.n_features)

    def measured(self, batch: str) -> tuple[str, ...]:
        """Modalities that at least one cell of the batch has."""
        return tuple(tile.modality for tile in self.tiles if tile.batch == batch)

    def bridges(self) -> list[set[str]]:
        """Groups of batches connected by shared modalities; more than one group means a diagonal mosaic."""
        groups: list[tuple[set[str], set[str]]] = []
        for batch in self.batches:
            names, modalities = {batch}, set(self.measured(batch))
            rest = []
            for other_names, other_modalities in groups:
                if modalities & other_modalities:
                    names, modalities = names | other_names, modalities | other_modalities
                else:
                    rest.append((other_names, other_modalities))
            groups = [*rest, (names, modalities)]
        return [names for names, _ in groups]


class Verdict(Frozen):
    """The answer of ``supports()``: can a method train on a pattern, and why (not)."""

    level: Literal["fits", "limits", "cannot"]
    reasons: tuple[str, ...] = ()
