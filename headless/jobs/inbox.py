"""Orders that watchers leave for the scheduler: a file each in ``runs/.orders/``, carried out in the order of names."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

from headless.errors import from_os_error
from headless.files import write_atomic
from headless.jobs.orders import Order

FOLDER = ".orders"


def leave(runs: Path, order: Order) -> Path:
    """Leave an order; its file, which is gone once the scheduler has taken it. Raises ``disk.*``."""
    folder = runs / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise from_os_error(error, folder, "leave an order for the queue") from error
    path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex}.json"
    write_atomic(path, order.model_dump_json() + "\n", "leave an order for the queue")
    return path


def left(runs: Path) -> list[Path]:
    """The orders that nobody has taken yet, oldest first."""
    try:
        names = [item.name for item in (runs / FOLDER).iterdir()]
    except OSError:
        return []
    return [runs / FOLDER / name for name in sorted(names) if name.endswith(".json") and not name.startswith(".")]


def read(path: Path) -> Order:
    """One order. Raises ``OSError`` when it is gone, ``ValueError`` when it is none."""
    return Order.model_validate(json.loads(path.read_text(encoding="utf-8")))
