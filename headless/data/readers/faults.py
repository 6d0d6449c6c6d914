"""Faults of input files in words: whatever a damaged file makes a library raise becomes a MosaicError."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headless.errors import MosaicError, from_os_error

_COPY_AGAIN = "Copy or download the file again; if it opens elsewhere, save it anew."


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise while ``path`` is read into MosaicErrors that name the file.

    Codes: ``data.missing_file``, ``data.no_permission``, ``data.truncated``, ``data.locked``, ``data.pickle``,
    ``data.unreadable``, ``memory.ram``, ``disk.failed``.
    """
    try:
        yield
    except MosaicError:
        raise
    except PermissionError as error:
        raise MosaicError(
            "data.no_permission", f"No permission to read {path.name}.", "Ask for read permission.", file=path
        ) from error
    except MemoryError as error:
        raise MosaicError(
            "memory.ram",
            f"{path.name} does not fit into memory.",
            "Close other programs, or convert the file to a sparse layout (CSR) that can stay on disk.",
            file=path,
        ) from error
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise truncated(path, str(error)) from error
    except OSError as error:
        raise _from_os(error, path) from error
    except (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, NotImplementedError) as error:
        raise unreadable(path, str(error) or type(error).__name__) from error


def truncated(path: Path, detail: str = "") -> MosaicError:
    """Part of the file is missing."""
    return MosaicError("data.truncated", f"{path.name} is incomplete{_brackets(detail)}.", _COPY_AGAIN, file=path)


def unreadable(path: Path, detail: str) -> MosaicError:
    """The file is damaged, or not what it claims to be."""
    if "pickle" in detail.lower():
        return pickled(path)
    return MosaicError("data.unreadable", f"{path.name} cannot be read{_brackets(detail)}.", _COPY_AGAIN, file=path)


def pickled(path: Path, what: str = "") -> MosaicError:
    """The file holds Python objects, which could run code when they are opened."""
    return MosaicError(
        "data.pickle",
        f"{path.name} stores {what or 'something'} as pickled Python objects, which are never opened.",
        "Save names as text (dtype str) and counts as numbers.",
        file=path,
    )


def empty(path: Path, what: str = "") -> MosaicError:
    """There is nothing in the file."""
    return MosaicError("data.empty", f"{path.name} {what or 'is empty'}.", "Choose a file with data.", file=path)


def no_matrix(path: Path, key: str, known: list[str]) -> MosaicError:
    """The file has no matrix of that key."""
    return MosaicError(
        "data.no_matrix",
        f"{path.name} has no matrix '{key}'.",
        f"It has: {', '.join(known)}." if known else "It has none.",
        field="matrices",
        file=path,
        key=key,
    )


def no_layer(path: Path, layer: str, known: list[str]) -> MosaicError:
    """The matrix has no such layer."""
    return MosaicError(
        "data.no_layer",
        f"{path.name} has no layer '{layer}'.",
        f"It has: {', '.join(known)}.",
        field="layer",
        file=path,
        layer=layer,
    )


def unknown_modality(path: Path, key: str, reason: str = "") -> MosaicError:
    """A matrix whose modality has to be named by a person."""
    return MosaicError(
        "data.unknown_modality",
        f"{path.name}: the modality of {key} is not known{_brackets(reason)}.",
        "Say which it is: rna, adt or atac.",
        field="modality",
        file=path,
        key=key,
    )


def _from_os(error: OSError, path: Path) -> MosaicError:
    text = str(error)
    if "truncated" in text or "end-of-stream" in text or "Not a gzipped" in text or "CRC check" in text:
        return truncated(path, text if len(text) < 120 else "")
    if "unable to lock" in text:
        return MosaicError(
            "data.locked",
            f"{path.name} is being written by another program.",
            "Close it there, then repeat.",
            file=path,
        )
    # HDF5 reports damage as OSError too, but without an errno of the system.
    return unreadable(path, text) if error.errno is None else from_os_error(error, path, "read the file")


def _brackets(detail: str) -> str:
    detail = " ".join(detail.split())[:200]
    return f" ({detail})" if detail else ""
