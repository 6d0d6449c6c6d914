"""The only error that a user sees, its codes and the exit codes of the command line.

Every fault that a user can cause is raised as a :class:`MosaicError`: what happened (``message``), where
(``where``: file, batch, modality, field ...) and what to do (``hint``). Anything else that escapes is a bug and
is reported as ``internal``.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Final

#: Exit code of ``mosaic-headless`` for each family of error codes (the part before the dot). Documented in the
#: README; scripts and schedulers rely on them, so a number is never given a second meaning.
EXIT_CODES: Final[dict[str, int]] = {
    "ok": 0,
    "usage": 2,  # the command line itself: unknown option, unknown run
    "data": 3,  # input files: missing, unreadable, not counts, barcodes, features, genome
    "project": 4,  # the project file: unreadable, newer, locked, moved data
    "model": 5,  # unknown method, misspelt or impossible setting, method cannot train on this mosaic
    "device": 6,  # the wished device cannot be used
    "memory": 7,  # out of memory, on the device or in RAM
    "diverged": 8,  # the loss is no longer a finite number
    "disk": 9,  # full disk, read-only folder, network drive gone
    "network": 10,  # a download that could not be made or did not match its checksum
    "run": 11,  # run folder: unknown, already running, damaged results
    "stopped": 12,  # paused or cancelled on request, or interrupted by a signal
    "internal": 70,  # a bug
}


class MosaicError(Exception):
    """What happened, where and what to do.

    Parameters
    ----------
    code
        ``family.detail``, for example ``data.not_counts``; the family is a key of :data:`EXIT_CODES`.
    message
        One or two sentences in plain words: what happened.
    hint
        What the user can do about it.
    field
        The field of the project or of the configuration that the error belongs to, so that a form can show it
        beside that field; empty if there is none.
    where
        Further places by name: ``file``, ``batch``, ``modality``, ``run`` ...
    """

    def __init__(self, code: str, message: str, hint: str = "", field: str = "", **where: object) -> None:
        family = code.split(".", 1)[0]
        if family not in EXIT_CODES or family == "ok":
            raise ValueError(f"unknown error family {family!r} in code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.field = field
        self.where: dict[str, str] = {key: str(value) for key, value in where.items() if value is not None}

    @property
    def exit_code(self) -> int:
        """The exit code of the command line for this error."""
        return EXIT_CODES[self.code.split(".", 1)[0]]

    def __str__(self) -> str:
        places = ", ".join(f"{key} {value}" for key, value in self.where.items())
        if self.field:
            places = f"{places}, field {self.field}" if places else f"field {self.field}"
        text = f"{self.message} ({places})" if places else self.message
        return f"{text} {self.hint}".strip()

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready values, for ``events.jsonl``, ``state.json`` and ``--json``."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "field": self.field,
            "where": self.where,
            "exit_code": self.exit_code,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # joblib sends errors between processes; keyword arguments must survive the journey.
        return _rebuild, (self.code, self.message, self.hint, self.field, self.where)


def _rebuild(code: str, message: str, hint: str, field: str, where: dict[str, str]) -> MosaicError:
    return MosaicError(code, message, hint, field, **where)


def from_os_error(error: OSError, path: str | Path, doing: str) -> MosaicError:
    """Turn an ``OSError`` met while ``doing`` something (``"write the project"``) into words.

    Full disks, read-only folders and missing files are what users meet; each has its own code and hint.
    """
    path = Path(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MosaicError(
            "disk.full",
            f"Could not {doing}: the disk is full.",
            "Free some space or choose another folder, then repeat; nothing that was saved before is lost.",
            file=path,
        )
    if isinstance(error, FileNotFoundError):
        return MosaicError(
            "data.missing_file",
            f"Could not {doing}: {path.name} does not exist.",
            "Check the path; if the file was moved, relink it.",
            file=path,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MosaicError(
            "disk.read_only",
            f"Could not {doing}: no permission, or the folder is read-only.",
            "Choose a folder that you may write to, or ask for permission.",
            file=path,
        )
    return MosaicError("disk.failed", f"Could not {doing}: {error.strerror or error}.", "", file=path)
