"""Where the data of a project are now: relative path first, absolute second, and after a move by fingerprint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from headless.data.datasets import DatasetRef, Fingerprint
from headless.data.fingerprint import fingerprint
from headless.errors import MosaicError

#: Folders looked through at most when a moved file is searched for; a whole network drive is not walked.
MAX_FOLDERS = 2_000


def resolve(ref: DatasetRef, base: Path, *, verify: bool = True) -> Path:
    """The file of a reference, seen from the project's folder ``base``.

    Raises
    ------
    MosaicError
        ``project.moved_data`` when it is at neither of its two places, ``project.data_changed`` when what lies there
        is no longer what was added (only with ``verify``).
    """
    found = _present(ref, base)
    if not found:
        raise MosaicError(
            "project.moved_data",
            f"The data {ref.id!r} are no longer at {ref.path}.",
            "Put the file back, or say where it is: mosaic-headless check STUDY --relink FOLDER.",
            field="datasets",
            file=_places(ref, base)[0],
        )
    if not verify:
        return found[0]
    for path in found:
        if matches(path, ref.fingerprint):
            return path
    size = fingerprint(found[0]).size
    changed = f"{ref.fingerprint.size} bytes then, {size} now" if size != ref.fingerprint.size else "same size"
    raise MosaicError(
        "project.data_changed",
        f"The data {ref.id!r} are not what was added to the project ({changed}).",
        "Restore the original file, or add the changed one to a new project; old results would not belong to it.",
        field="datasets",
        file=found[0],
    )


def moved_to(ref: DatasetRef, where: Path | Mapping[str, Path], base: Path) -> Path | None:
    """The new place of a reference: named by id or old path in a mapping, or found by name and content in a folder.

    ``None`` when it is not there. The content must be the same in any case.

    Raises
    ------
    MosaicError
        ``project.data_changed`` when a mapping names a file with other content; ``data.missing_file``.
    """
    if isinstance(where, Mapping):
        named = next((where[key] for key in (ref.id, ref.path, ref.absolute) if key in where), None)
        if named is None:
            return None
        path = Path(named) if Path(named).is_absolute() else base / named
        if fingerprint(path) != ref.fingerprint:
            raise MosaicError(
                "project.data_changed",
                f"{path.name} is not the file that was added as {ref.id!r}: its content differs.",
                "Choose the original file.",
                field="datasets",
                file=path,
            )
        return path
    name = _name(ref)
    same_name: list[Path] = []
    others: list[Path] = []
    for path in _candidates(Path(where), folders=Path(ref.path).suffix in ("", ".zarr")):
        (same_name if path.name == name else others).append(path)
    # Renamed files are recognised too, by content; those of the right name are asked first.
    suffix = PurePosixPath(name).suffix
    return next(
        (path for path in (*same_name, *(p for p in others if p.suffix == suffix)) if matches(path, ref.fingerprint)),
        None,
    )


def relocated(ref: DatasetRef, path: Path, base: Path) -> DatasetRef:
    """The reference with its file at ``path``."""
    return ref.model_copy(update=dict(zip(("path", "absolute"), paths_of(path, base), strict=True)))


def paths_of(path: Path, base: Path) -> tuple[str, str]:
    """A file's path relative to the project's folder (POSIX form; absolute on another drive) and its absolute path."""
    absolute = Path(os.path.abspath(path))
    try:
        relative = Path(os.path.relpath(absolute, os.path.abspath(base))).as_posix()
    except ValueError:  # Windows: no relative path between two drives
        relative = absolute.as_posix()
    return relative, absolute.as_posix()


def matches(path: Path, expected: Fingerprint) -> bool:
    """Is this the file (or folder) that the fingerprint was taken of? ``False`` too if it cannot be read."""
    try:
        if path.is_file() and path.stat().st_size != expected.size:
            return False
        return fingerprint(path) == expected
    except (OSError, MosaicError):
        return False


def _places(ref: DatasetRef, base: Path) -> tuple[Path, Path]:
    return Path(os.path.normpath(base / ref.path)), Path(ref.absolute)


def _present(ref: DatasetRef, base: Path) -> list[Path]:
    places = dict.fromkeys(_places(ref, base))
    return [path for path in places if path.exists()]


def _name(ref: DatasetRef) -> str:
    # A project may come from another system: both kinds of path are understood.
    return PureWindowsPath(ref.path).name or PurePosixPath(ref.path).name


def _candidates(folder: Path, *, folders: bool) -> Iterator[Path]:
    for count, (root, names, files) in enumerate(os.walk(folder)):
        if count >= MAX_FOLDERS:
            return
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(files))
        if folders:
            yield from (Path(root) / name for name in names)
