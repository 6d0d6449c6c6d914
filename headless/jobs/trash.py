"""The trash of a project's runs: whole run folders moved aside, and back. A move is one rename: done or not done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from headless.errors import from_os_error
from headless.jobs.runfolder import TRASH


def throw(folder: Path, run: str) -> None:
    """Move ``folder/<run>`` to the trash; nothing happens if it is there already. Raises ``disk.*``."""
    target = folder / TRASH / run
    if not (folder / run).is_dir():
        return
    try:
        target.parent.mkdir(exist_ok=True)
        os.rename(folder / run, target)
    except OSError as error:
        raise from_os_error(error, folder / run, "move the run to the trash") from error


def bring_back(folder: Path, run: str) -> None:
    """Move a run out of the trash; nothing happens if it is back already. Raises ``disk.*``."""
    source = folder / TRASH / run
    if not source.is_dir():
        return
    try:
        os.rename(source, folder / run)
    except OSError as error:
        raise from_os_error(error, source, "take the run out of the trash") from error


def thrown(folder: Path) -> list[str]:
    """Ids of the runs in the trash, by name."""
    place = folder / TRASH
    return sorted(item.name for item in place.iterdir() if item.is_dir()) if place.is_dir() else []


def size(folder: Path) -> int:
    """Bytes that the trash takes."""
    return sum(item.lstat().st_size for item in (folder / TRASH).rglob("*") if item.is_file())


def empty(folder: Path) -> None:
    """Delete what is in the trash for good. Raises ``disk.*``."""
    for name in thrown(folder):
        try:
            shutil.rmtree(folder / TRASH / name)
        except OSError as error:
            raise from_os_error(error, folder / TRASH / name, "empty the trash") from error
