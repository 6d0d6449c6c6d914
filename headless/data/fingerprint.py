"""Recognise a file again after it moved or changed, in constant time on files of any size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from headless.data.datasets import Fingerprint
from headless.errors import MosaicError, from_os_error

BLOCKS = 64
BLOCK = 65_536


def fingerprint(path: str | Path) -> Fingerprint:
    """Size and hash of a file, or of a folder taken as its files one after the other in the order of their names.

    The SHA-256 runs over the size (for a folder also over relative names and sizes) and 64 blocks of 64 KiB spread
    evenly from the first byte to the last; up to 4 MiB that is the whole content.

    Raises
    ------
    MosaicError
        ``data.missing_file``, ``data.no_permission`` or ``disk.failed``.
    """
    path = Path(path)
    try:
        files = sorted(_walk(path)) if path.is_dir() else [("", path.stat().st_size)]
        digest = hashlib.sha256()
        total = sum(size for _, size in files)
        digest.update(f"{total}\n".encode())
        if path.is_dir():
            for name, size in files:
                digest.update(f"{name}\t{size}\n".encode())
        for start, stop in _blocks(total):
            for piece in _slice(path, files, start, stop):
                digest.update(piece)
    except PermissionError as error:
        raise MosaicError(
            "data.no_permission", f"No permission to read {path.name}.", "Ask for read permission.", file=path
        ) from error
    except OSError as error:
        raise from_os_error(error, path, "read the file") from error
    return Fingerprint(size=total, sha256=digest.hexdigest())


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    def stop(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=stop):
        for name in names:
            file = Path(parent) / name
            yield file.relative_to(folder).as_posix(), file.stat().st_size


def _blocks(total: int) -> list[tuple[int, int]]:
    if total <= BLOCKS * BLOCK:
        return [(0, total)]
    starts = [round(i * (total - BLOCK) / (BLOCKS - 1)) for i in range(BLOCKS)]
    return [(start, start + BLOCK) for start in starts]


def _slice(path: Path, files: list[tuple[str, int]], start: int, stop: int) -> Iterator[bytes]:
    offset = 0
    for name, size in files:
        low, high = max(start, offset), min(stop, offset + size)
        if low < high:
            with (path / name if name else path).open("rb") as stream:
                stream.seek(low - offset)
                yield stream.read(high - low)
        offset += size
        if offset >= stop:
            return
