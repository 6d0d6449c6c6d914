"""Where the files are that ship beside the code: ``resources/`` in a checkout, ``headless/_resources`` in a wheel."""

from __future__ import annotations

from pathlib import Path

from headless.errors import MosaicError


def folder() -> Path:
    """The folder of resources of this installation.

    Raises
    ------
    MosaicError
        ``internal.resources`` if the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_resources", package.parent / "resources"):
        if candidate.is_dir():
            return candidate
    raise MosaicError(
        "internal.resources", "The files that belong to the program are missing.", "Install it again.", file=package
    )


def path(name: str) -> Path:
    """A resource by its POSIX name, for example ``help/overview.png``.

    Raises
    ------
    MosaicError
        ``internal.resources`` if there is no such file or folder.
    """
    found = folder() / name
    if not found.exists():
        raise MosaicError(
            "internal.resources", f"The program's file {name} is missing.", "Install it again.", file=found
        )
    return found
