"""Translation: every modality predicted from every set of other modalities, for the cells that have all of the set.

Two modalities give 2 translations, three give 9, four give 28 (MIDAS: He et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from headless.tasks.base import Sink, Subset
from headless.tasks.impute import Decoded


def translations(modalities: Sequence[str]) -> dict[str, tuple[Subset, str]]:
    """Name -> (inputs, target): every non-empty proper subset of the modalities to every modality outside it.

    The name is the sorted inputs joined by ``_``, then ``_to_`` and the target: ``adt_rna_to_atac``. Inputs keep the
    order of ``modalities``.
    """
    return {
        f"{'_'.join(sorted(inputs))}_to_{target}": (inputs, target)
        for size in range(1, len(modalities))
        for inputs in combinations(modalities, size)
        for target in modalities
        if target not in inputs
    }


def translated(name: str, inputs: Subset, target: str, sink: Sink) -> Decoded:
    """Expected values of ``target`` from ``inputs`` alone; NaN rows for cells that lack one of the inputs."""
    return Decoded(f"translated/{name}", inputs, target, sink)
