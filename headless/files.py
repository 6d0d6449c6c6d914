"""Small files that must never be half written: the project, states, requests."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headless.errors import from_os_error


def now() -> str:
    """The present moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomic(path: Path, text: str, doing: str, *, durable: bool = True, backup: Path | None = None) -> None:
    """Write ``text`` to ``path`` so that a reader, a crash or a full disk sees the old file or the new one, whole.

    The text goes to a temporary file in the same folder, is forced to disk (``durable``) and renamed. With ``backup``
    the file that is replaced is kept under that name.

    Raises
    ------
    MosaicError
        ``disk.full``, ``disk.read_only`` or ``disk.failed`` (``doing`` says what was tried); ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if backup is not None and path.exists():
            _keep(path, backup)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise from_os_error(error, path, doing) from error


def as_json(values: Any, *, indent: int | None = None) -> str:
    """JSON text of plain values, numpy scalars and paths; numbers that are not finite become ``null``."""
    return json.dumps(_plain(values), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if hasattr(value, "tolist"):  # numpy and torch numbers and small arrays
        return _plain(value.tolist())
    return str(value)


def _keep(path: Path, backup: Path) -> None:
    """Make ``backup`` the present content of ``path``, itself without a moment of being half written."""
    temporary = backup.with_name(f".{backup.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(path, temporary)
        os.replace(temporary, backup)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Force the rename itself to disk, where the system can (not on Windows and some network drives)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
