"""Events of a run in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def epoch_words(event: Mapping[str, Any]) -> str:
    """``epoch 3 of 50, loss 812.4, validation 830.1``."""
    words = f"epoch {event.get('epoch')}" + (f" of {event['epochs']}" if event.get("epochs") else "")
    for title, key in (("loss", "train"), ("validation", "validation")):
        if terms := event.get(key):
            words += f", {title} {total(terms):.5g}"
    return words


def progress_words(event: Mapping[str, Any]) -> str:
    """``correct rna, 512 of 2000``."""
    return f"{event.get('task', '')}, {event.get('done')} of {event.get('total')}"


def ended_words(event: Mapping[str, Any]) -> str:
    """``done``, ``failed: the reason``."""
    remark = event.get("remark")
    return f"{event.get('status')}{': ' + str(remark) if remark else ''}"


def total(terms: Mapping[str, Any]) -> float:
    """Sum of the terms of a loss that are numbers."""
    return sum(float(value) for value in terms.values() if isinstance(value, (int, float)))
