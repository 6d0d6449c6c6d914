"""Are these raw counts? Judged block by block, so that a matrix never has to be in memory twice.

Likelihoods of counts (Poisson, negative binomial, Bernoulli) are wrong for normalised or scaled values, so anything
but non-negative whole numbers is refused, in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headless.errors import MosaicError

#: Above this float32 no longer holds every whole number.
LARGEST = 2**24
_EXAMPLES = 3


class Tally:
    """A running judgement over blocks of stored values (zeros may be left out)."""

    def __init__(self) -> None:
        self.bad: list[float] = []
        self.binary = True
        self.seen = 0

    def add(self, values: Any) -> None:
        """Judge one more block (any shape, any numeric or bool type)."""
        values = np.asarray(values).ravel()
        if values.dtype.kind not in "fiub":
            raise TypeError(f"values of type {values.dtype} are not numbers")
        self.seen += values.size
        if values.dtype.kind == "b" or not values.size:
            return
        wrong = (values < 0) | (values > LARGEST)
        if values.dtype.kind == "f":
            wrong |= ~np.isfinite(values)
            wrong |= values != np.floor(values)
        if len(self.bad) < _EXAMPLES and wrong.any():
            for value in np.unique(values[wrong])[:_EXAMPLES]:
                if len(self.bad) < _EXAMPLES and float(value) not in self.bad:
                    self.bad.append(float(value))
        self.binary = self.binary and bool(((values == 0) | (values == 1)).all())

    @property
    def verdict(self) -> str:
        """``counts``, ``binary`` or ``not counts: values ...``."""
        if self.bad:
            return f"not counts: values {', '.join(f'{value:.4g}' for value in self.bad)}"
        return "binary" if self.binary and self.seen else "counts"


def judge(values: Any) -> str:
    """The verdict on one block of values."""
    tally = Tally()
    tally.add(values)
    return tally.verdict


def is_counts(verdict: str) -> bool:
    """Whether a verdict lets the values through (binarised data are fine)."""
    return not verdict.startswith("not counts")


def refuse(verdict: str, path: Path, modality: str | None, layer: str, layers: tuple[str, ...] = ()) -> MosaicError:
    """The error for values that are no raw counts."""
    others = [name for name in layers if name != layer]
    values = verdict.partition(": ")[2]
    hint = "Choose the layer with raw counts" + (f" (the file also has {', '.join(others)})." if others else ".")
    if not others:
        hint += " This file has no other layer: export the unnormalised counts from where it was made."
    return MosaicError(
        "data.not_counts",
        f"{path.name}: {modality or 'matrix'} in {layer} is not raw counts ({values}).",
        hint,
        field="layer",
        file=path,
        modality=modality,
        layer=layer,
    )


def choose_layer(verdicts: Mapping[str, str]) -> tuple[str, str]:
    """Which layer holds the raw counts, and why; ``verdicts`` maps layer -> verdict in the file's order.

    ``X`` first, then layers named like counts, ``raw/X``, then any other layer of whole numbers (spliced counts are
    whole numbers too, hence last). A binarised layer gives way to real counts.
    """
    order = sorted(verdicts, key=_preference)
    for wanted in ("counts", "binary"):
        for layer in order:
            if verdicts[layer] == wanted:
                return layer, _why(layer, verdicts)
    return order[0], "no layer holds raw counts"


def _preference(layer: str) -> tuple[int, str]:
    name = layer.lower()
    if name == "x":
        return 0, name
    if name.startswith("layers/") and ("count" in name or "raw" in name or "umi" in name) and "norm" not in name:
        return 1, name
    return (2, name) if name == "raw/x" else (3, name)


def _why(layer: str, verdicts: Mapping[str, str]) -> str:
    kind = "whole numbers" if verdicts[layer] == "counts" else "zeros and ones"
    reason = f"{layer} holds {kind}"
    if layer != "X" and "X" in verdicts:
        other = verdicts["X"]
        reason += "; X is binarised" if other == "binary" else f"; X does not ({other.partition(': ')[2]})"
    return reason
