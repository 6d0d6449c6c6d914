"""Sweeps: one experiment as many runs, over random seeds and the values of any fields."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from headless.errors import MosaicError
from headless.project import Experiment
from headless.schema import from_validation

#: A sweep of more runs is a slip of the pen.
MOST_RUNS = 5000
_OF_EXPERIMENT = ("model", "preset", "seed", "device")


def expand(
    experiment: Experiment, values: Mapping[str, Sequence[Any]], seeds: int = 1
) -> list[tuple[Experiment, dict[str, Any]]]:
    """Every combination of the values and of so many seeds, beginning with the experiment's own.

    Each comes as an experiment of the same name with what tells it from the others (field -> value). Fields are
    ``model``, ``preset``, ``seed``, ``device`` and the settings of the method, which are checked when a run is made.
    The seed of the holdout stays: all are scored on the same hidden values.

    Raises
    ------
    MosaicError
        ``usage.sweep``: no value, both ``seeds`` and values of ``seed``, too many runs, or a wrong value.
    """
    axes = {name: list(dict.fromkeys(map(_hashable, items))) for name, items in values.items()}
    if seeds < 1:
        raise MosaicError("usage.sweep", "At least one seed is needed.", field="repeat")
    if seeds > 1:
        if "seed" in axes:
            raise MosaicError("usage.sweep", "The seeds are given twice.", "Use --repeat or --sweep seed=...", "seed")
        axes["seed"] = list(range(experiment.seed, experiment.seed + seeds))
    for name, items in axes.items():
        if not items:
            raise MosaicError("usage.sweep", f"{name} has no value.", f"--sweep {name}=A,B", field=name)
    count = 1
    for items in axes.values():
        count *= len(items)
    if count > MOST_RUNS:
        raise MosaicError("usage.sweep", f"That would be {count} runs.", f"At most {MOST_RUNS} at once.")
    made = []
    for combination in itertools.product(*axes.values()):
        varied = {name: _plain(value) for name, value in zip(axes, combination, strict=True)}
        fields = {name: value for name, value in varied.items() if name in _OF_EXPERIMENT}
        settings = {name: value for name, value in varied.items() if name not in _OF_EXPERIMENT}
        raw = {**experiment.model_dump(), **fields, "settings": {**experiment.settings, **settings}}
        try:
            made.append((Experiment.model_validate(raw), varied))
        except ValidationError as error:
            raise from_validation(error, "usage.sweep") from None
    return made


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
