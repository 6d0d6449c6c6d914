"""Where the small tables, samples and texts that ship with the program are.

In a checkout they lie in the top-level folder ``resources``; the wheel carries the same files as
``headless/_resources``. They are read through :mod:`importlib.resources`, so a zipped or frozen program works too.
"""

from __future__ import annotations

import importlib.resources
from importlib.resources.abc import Traversable
from pathlib import Path

from headless.errors import MosaicError


def path(*parts: str) -> Traversable:
    """The resource ``parts`` (``path("genome", "hg38.tsv")``): something to ``open`` or to ``iterdir``.

    Raises
    ------
    MosaicError
        ``internal.missing_resource`` when the installation is incomplete.
    """
    package = importlib.resources.files("headless")
    roots: list[Traversable] = [package / "_resources"]
    if isinstance(package, Path):
        roots.append(package.parent / "resources")
    for root in roots:
        found = root.joinpath(*parts)
        if found.is_file() or found.is_dir():
            return found
    raise MosaicError(
        "internal.missing_resource",
        f"{'/'.join(parts)} is missing from the installation.",
        "Install the program again.",
    )
