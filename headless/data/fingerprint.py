"""Recognise an input file after it moved, and notice that it changed, without reading all of it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from headless.data.datasets import Fingerprint
from headless.errors import MosaicError, from_os_error

BLOCKS = 64
BLOCK_SIZE = 65_536


def fingerprint(path: Path) -> Fingerprint:
    """Size and SHA-256 over the size and evenly spread blocks of a file, or of a folder's files taken as one.

    At most 64 blocks of 64 KiB are read, so files below 4 MiB are hashed whole.

    Raises
    ------
    MosaicError
        ``data.missing_file`` or ``disk.*``.
    """
    try:
        if path.is_dir():
            files = sorted((item for item in path.rglob("*") if item.is_file()), key=lambda item: item.as_posix())
            names = [item.relative_to(path).as_posix() for item in files]
        else:
            files, names = [path], [""]
        sizes = [item.stat().st_size for item in files]
        digest = hashlib.sha256(str(sum(sizes)).encode())
        for name, size in zip(names, sizes, strict=True):
            if name:
                digest.update(f"{name}\0{size}\0".encode())
        for block in _blocks(files, sizes):
            digest.update(block)
    except OSError as error:
        raise from_os_error(error, path, "read the data") from error
    return Fingerprint(size=sum(sizes), sha256=digest.hexdigest())


def matches(path: Path, expected: Fingerprint) -> bool:
    """Is this the file (or folder) that the fingerprint was taken of? ``False`` too if it cannot be read."""
    try:
        if path.is_file() and path.stat().st_size != expected.size:
            return False
        return fingerprint(path) == expected
    except (OSError, MosaicError):
        return False


def _blocks(files: Sequence[Path], sizes: Sequence[int]) -> Iterator[bytes]:
    """Blocks at evenly spread positions of the files joined end to end."""
    starts = [0, *accumulate(sizes)]
    total = starts[-1]
    count = min(BLOCKS, -(-total // BLOCK_SIZE))
    for number in range(count):
        position = max(total - BLOCK_SIZE, 0) * number // max(count - 1, 1)
        stop = min(position + BLOCK_SIZE, total)
        which = bisect_right(starts, position) - 1
        while position < stop:
            with open(files[which], "rb") as file:
                file.seek(position - starts[which])
                part = file.read(stop - position)
            if not part and sizes[which]:
                raise OSError(f"{files[which].name} became shorter while it was read")
            yield part
            position += len(part)
            which += 1
