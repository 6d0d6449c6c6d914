"""Hiding measured values on purpose, so that imputation can be scored against the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headless.errors import MosaicError
from headless.schema import Config, Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from headless.data.mosaic import Mosaic


class Holdout(Config):
    """Which part of the measured values training does not see. Torch-free; part of a run's request."""

    fraction: float = Field(
        0.0, title="Hidden for scoring", tier="basic", ge=0, le=0.5,
        help="Share of the cells with several modalities in which one of them is hidden from training, "
        "per modality and batch. The hidden values are predicted and compared with the truth; 0 = hide nothing.",
    )  # fmt: skip
    modalities: tuple[str, ...] = Field(
        (), title="Modalities to hide", tier="advanced",
        help="Modalities that are hidden in turn (never two in the same cell); empty = all of them.",
    )  # fmt: skip
    seed: int = Field(0, title="Random state", tier="advanced", ge=0, help="Decides which cells are chosen.")


def choose(mosaic: Mosaic, holdout: Holdout) -> dict[str, NDArray[np.int64]]:
    """Choose the cells in which each modality is to be hidden.

    Per batch and modality, ``fraction`` of the cells that have it and at least one other; no cell loses two
    modalities, so every cell keeps one. Where the shares of all modalities do not fit into a batch (more than two
    modalities at a high fraction), each gets an equal part of it.

    Returns
    -------
    dict
        Modality -> ascending cell numbers, for :meth:`Mosaic.without`; modalities with none are absent.

    Raises
    ------
    MosaicError
        ``model.bad_holdout`` for a modality that the mosaic does not have, or if no cell has two modalities.
    """
    import numpy as np  # here, as the project and the queue need none

    if holdout.fraction == 0:
        return {}
    unknown = [name for name in holdout.modalities if name not in mosaic.modalities]
    if unknown:
        raise MosaicError(
            "model.bad_holdout",
            f"{unknown[0]} cannot be hidden: no batch has it.",
            f"Choose among {', '.join(mosaic.modalities)}.",
            field="holdout.modalities",
        )
    wanted = [name for name in mosaic.modalities if name in holdout.modalities or not holdout.modalities]
    has = {name: mosaic.measured(name) for name in mosaic.modalities}
    several = np.sum(list(has.values()), axis=0) >= 2
    codes = mosaic.batch_codes
    hidden: dict[str, list[NDArray[np.int64]]] = {name: [] for name in wanted}
    for code in range(len(mosaic.batches)):
        rng = np.random.default_rng([holdout.seed, code])
        here = several & (codes == code)
        present = [name for name in wanted if (here & has[name]).any()]
        taken = np.zeros(mosaic.n_cells, dtype=bool)
        for name in present:
            eligible = np.flatnonzero(here & has[name])
            count = min(round(holdout.fraction * len(eligible)), len(eligible) // max(2, len(present)))
            free = eligible[~taken[eligible]]
            picked = rng.permutation(free)[:count]
            taken[picked] = True
            hidden[name].append(picked)
    chosen = {name: np.sort(np.concatenate(parts)) for name, parts in hidden.items() if parts}
    chosen = {name: cells for name, cells in chosen.items() if len(cells)}
    if not chosen:
        raise MosaicError(
            "model.bad_holdout",
            "Nothing can be hidden for scoring: too few cells have "
            + (f"{', '.join(holdout.modalities)} and another modality." if holdout.modalities else "two modalities."),
            "Set the hidden fraction to 0, or add a batch in which modalities were measured together.",
            field="holdout.fraction",
        )
    return chosen
