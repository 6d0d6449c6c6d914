"""The value of a metric, with everything that is needed to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from headless.schema import Frozen


class MetricValue(Frozen):
    """A metric's value and the parameters it was computed with; or no value and the reason, never a stand-in 0."""

    value: float | None
    reason: str = ""
    parameters: dict[str, Any] = {}

    @classmethod
    def absent(cls, reason: str, **parameters: Any) -> MetricValue:
        """A metric that could not be computed, and why."""
        return cls(value=None, reason=reason, parameters=parameters)


Metrics = dict[str, MetricValue]


def measure(compute: Callable[[], float], parameters: Mapping[str, Any]) -> MetricValue:
    """Compute one metric; any failure, or a value that is not a number, makes it absent with its reason.

    Libraries fail on small or degenerate data in ways of their own, and one metric must not take the others along.
    """
    try:
        value = float(compute())
    except Exception as error:
        return MetricValue.absent(f"{type(error).__name__}: {error}"[:300], **parameters)
    if not math.isfinite(value):
        return MetricValue.absent("undefined for these cells", **parameters)
    return MetricValue(value=value, parameters=dict(parameters))


def as_plain(metrics: Mapping[str, MetricValue]) -> dict[str, dict[str, Any]]:
    """JSON-ready values by name."""
    return {name: metric.model_dump(mode="json") for name, metric in metrics.items()}
