"""``events.jsonl`` and ``log.txt``: written line by line by the worker, followed by anybody."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from headless.errors import from_os_error
from headless.files import as_json


class EventWriter:
    """Appends events and log lines; each is flushed, so that a crash loses at most the one being written."""

    def __init__(self, events: Path, log: Path) -> None:
        try:
            self._close_half_line(events)
            self._events = open(events, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
            self._log = open(log, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        except OSError as error:
            raise from_os_error(error, events, "write the events of the run") from error

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event ``{"time": seconds since the epoch, "kind": kind, **fields}``. Raises ``disk.*``."""
        try:
            self._events.write(as_json({"time": round(time.time(), 3), "kind": kind, **fields}) + "\n")
            self._events.flush()
        except OSError as error:
            raise from_os_error(error, self._events.name, "write the events of the run") from error

    def log(self, text: str) -> None:
        """Append a line with the time of day to the log. Raises ``disk.*``."""
        try:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()
        except OSError as error:
            raise from_os_error(error, self._log.name, "write the log of the run") from error

    def close(self) -> None:
        """Close both files."""
        self._events.close()
        self._log.close()

    @staticmethod
    def _close_half_line(path: Path) -> None:
        """End the line that a killed worker left half written, so that the next event is a line of its own."""
        if not path.exists() or path.stat().st_size == 0:
            return
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events after byte ``offset``, and the offset to go on from.

    A line that is still being written is left for the next time; a line damaged by a crash is skipped.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            block = file.read()
    except FileNotFoundError:
        return [], offset
    except OSError as error:
        raise from_os_error(error, path, "read the events") from error
    end = block.rfind(b"\n") + 1
    events = [event for line in block[:end].splitlines() if (event := _event(line)) is not None]
    return events, offset + end


def last_event(path: Path, kind: str, within: int) -> dict[str, Any] | None:
    """The last event of a kind among the last ``within`` bytes; ``None`` if there is none. Reads from the end."""
    mark = f'"kind": "{kind}"'.encode()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            span = 0
            while span < min(within, size):
                span = min(max(4096, 4 * span), within, size)
                file.seek(size - span)
                lines = file.read(span).split(b"\n")
                # What follows the last line end is being written; what precedes the first is cut off.
                for line in reversed(lines[0 if span == size else 1 : -1]):
                    if mark in line and (event := _event(line)) is not None and event.get("kind") == kind:
                        return event
    except OSError:
        return None
    return None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
