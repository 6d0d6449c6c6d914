"""Samples to start with: one that is simulated on the spot, and public ones that are fetched on request.

The table is ``resources/samples/registry.json``. A fetched file is checked against its published SHA-256. Where none
is known, that is said, the computed one is shown and kept beside the file, and every later use is checked against it.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from headless.errors import MosaicError, from_os_error
from headless.schema import Frozen, from_validation

#: What ``blood`` is: fixed, so that everybody sees the same cells.
BLOOD: dict[str, Any] = {"n_cells": 1500, "n_genes": 1000, "n_proteins": 40, "n_peaks": 3000, "seed": 0}
_TIMEOUT = 30  # seconds without an answer


class RemoteFile(Frozen):
    """One file to fetch. ``sha256`` is ``None`` where its publisher gives none; ``filename``: if not the URL's."""

    url: str
    sha256: str | None = None
    filename: str | None = None

    @property
    def packed_name(self) -> str:
        """The name it is fetched under."""
        return self.filename or self.url.rsplit("/", 1)[-1]

    @property
    def name(self) -> str:
        """The name it is used under: without ``.gz``, as it is unpacked."""
        return self.packed_name.removesuffix(".gz")


class Sample(Frozen):
    """One row of the table of samples."""

    name: str
    title: str
    kind: Literal["simulated", "download"]
    modalities: tuple[str, ...]
    organism: str
    size: str
    licence: str
    citation: str
    note: str
    files: tuple[RemoteFile, ...]

    @property
    def checked(self) -> bool:
        """Whether what is made or fetched can be compared with a published checksum (simulated: need not be)."""
        return all(file.sha256 for file in self.files)


@cache
def table() -> tuple[Sample, ...]:
    """All samples, the simulated one first.

    Raises
    ------
    MosaicError
        ``internal.*`` when the table of the installation is missing or damaged.
    """
    from headless import resources

    text = resources.path("samples/registry.json").read_text(encoding="utf-8")
    try:
        return tuple(Sample.model_validate(row) for row in json.loads(text)["samples"])
    except ValidationError as error:
        raise from_validation(error, "internal.samples") from None


def get(name: str) -> Sample:
    """The sample of that name.

    Raises
    ------
    MosaicError
        ``usage.unknown_sample``, with the names there are.
    """
    for sample in table():
        if sample.name == name:
            return sample
    raise MosaicError(
        "usage.unknown_sample",
        f"There is no sample {name!r}.",
        f"Choose one of: {', '.join(sample.name for sample in table())}.",
    )


def fetch(sample: str | Sample, folder: str | Path, note: Callable[[str], None] = print) -> list[Path]:
    """Make or fetch a sample into ``folder`` and return its data files.

    Files that are there already, from an earlier fetch, are checked and not fetched again. ``note`` receives what a
    person should know (a checksum that nobody published).

    Raises
    ------
    MosaicError
        ``usage.unknown_sample``; ``network.offline``, ``network.failed`` or ``network.checksum`` (nothing is kept of
        a file that fails its check); ``data.changed_file`` if a file fetched before has changed since; ``disk.*``.
    """
    chosen = get(sample) if isinstance(sample, str) else sample
    folder = Path(folder)
    if chosen.kind == "simulated":
        from headless.data.simulate import simulate

        return simulate(**BLOOD).write(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, folder, "make the folder of the sample") from error
    return [_fetch(file, folder, note) for file in chosen.files]


def _fetch(file: RemoteFile, folder: Path, note: Callable[[str], None]) -> Path:
    target = folder / file.name
    record = target.with_name(target.name + ".sha256")
    try:
        if target.exists():
            _check(target, record)
            return target
        packed = _download(file, folder)
        if file.sha256 is None:
            note(
                f"No checksum was published for {file.packed_name}, so it could not be verified. The SHA-256 of what "
                f"was fetched is {_hash(packed)}: compare it with a copy that you trust."
            )
        if packed != target:
            _unpack(packed, target)
        record.write_text(f"{_hash(target)}  {target.name}\n", encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, target, "store the sample") from error
    return target


def _check(target: Path, record: Path) -> None:
    """A file that is there already must be one that was fetched, and unchanged."""
    if not record.exists():
        raise MosaicError(
            "disk.exists",
            f"{target.name} is there already and did not come from an earlier fetch.",
            "Choose another folder, or move the file away.",
            file=target,
        )
    if record.read_text(encoding="utf-8").split()[:1] != [_hash(target)]:
        raise MosaicError(
            "data.changed_file",
            f"{target.name} is not what was fetched: its SHA-256 differs from the one recorded then.",
            "Delete the file and fetch it again.",
            file=target,
        )


def _download(file: RemoteFile, folder: Path) -> Path:
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(
            file.url,
            known_hash=f"sha256:{file.sha256}" if file.sha256 else None,
            fname=file.packed_name,
            path=folder,
            downloader=pooch.HTTPDownloader(timeout=_TIMEOUT),
        )
    except (requests.ConnectionError, requests.Timeout) as error:
        # ConnectionError is also what a connection that breaks off in the middle raises.
        raise MosaicError(
            "network.offline",
            f"{file.packed_name} could not be fetched: no answer from {_host(file.url)}.",
            "Check the network connection or the proxy (HTTPS_PROXY) and repeat; nothing was changed. "
            "The sample blood needs no network.",
            url=file.url,
        ) from error
    except requests.RequestException as error:
        raise MosaicError(
            "network.failed",
            f"{file.packed_name} could not be fetched: {error}.",
            "Repeat later; if it stays so, the address may have moved: fetch the file by hand and add it as data.",
            url=file.url,
        ) from error
    except ValueError as error:
        raise MosaicError(
            "network.checksum",
            f"What arrived as {file.packed_name} is not the published file (its SHA-256 differs); it was thrown away.",
            "Repeat. If it stays so, a proxy changes the file or its publisher has replaced it.",
            url=file.url,
        ) from error
    return Path(path)


def _host(url: str) -> str:
    return url.split("/")[2]


def _hash(path: Path) -> str:
    import pooch

    return str(pooch.file_hash(str(path), alg="sha256"))


def _unpack(packed: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".part")
    try:
        with gzip.open(packed, "rb") as source, open(partial, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        partial.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
        raise MosaicError(
            "network.failed", f"{packed.name} is not a whole gzip file.", "Repeat.", file=packed
        ) from error
    partial.replace(target)
    packed.unlink()
