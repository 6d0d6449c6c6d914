"""The project: which data, how they are prepared, which experiments. A value and the file that keeps it.

The file ``study.mosaic`` is readable JSON with relative POSIX paths, so that a study folder opens on another machine.
Everything here is torch-free; the window, the command line and the queue share it.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field as PlainField
from pydantic import ValidationError, field_validator

import headless
from headless.data.datasets import DatasetRef
from headless.data.holdout import Holdout
from headless.data.locate import moved_to, relocated, resolve
from headless.data.preparation import Preparation
from headless.errors import MosaicError, from_os_error
from headless.files import now, write_atomic
from headless.lock import Lock
from headless.schema import Frozen, from_validation

__all__ = [
    "SCHEMA_VERSION", "Experiment", "Output", "Project", "load", "lock", "new", "relink", "resolve", "save", "slug",
]  # fmt: skip

_log = logging.getLogger(__name__)

#: Version of the project file that this program writes.
SCHEMA_VERSION = 1

#: One function a version step: ``MIGRATIONS[n]`` turns the raw values of version n into those of version n + 1.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

Output = Literal["embedding", "imputed", "corrected", "translated", "contribution", "programs"]


class Experiment(Frozen):
    """What one run is to do: a method, its settings and what is asked of it.

    Attributes
    ----------
    name
        Unique in the project.
    model, preset, settings
        The method's registered name, one of its presets and the fields that differ from that preset.
    seed
        State of every random choice of the run.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a wish for a GPU is never answered by the CPU in silence.
    holdout
        Measured values hidden from training to score imputation with.
    outputs
        What is computed once training has ended.
    notes
        Free text.
    """

    name: str
    model: str = "midas"
    preset: str | None = None
    settings: dict[str, Any] = PlainField(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    holdout: Holdout = Holdout()
    outputs: tuple[Output, ...] = ("embedding", "imputed", "corrected")
    notes: str = ""

    @field_validator("name")
    @classmethod
    def _sayable(cls, name: str) -> str:
        if not slug(name):
            raise ValueError("a name needs at least one letter or digit")
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return device


class Project(Frozen):
    """A study as a value: changed by making another one, kept by :func:`save`.

    Attributes
    ----------
    schema_version, program
        Of the file, and the version of the program that wrote it last.
    name, created, notes
        What the user sees.
    datasets
        References to the input files, never copies of them.
    preparation
        How the files become a mosaic: quality control, feature selection, edits of batches.
    experiments
        In the order in which they were added.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    created: str
    program: str = ""
    notes: str = ""
    datasets: tuple[DatasetRef, ...] = ()
    preparation: Preparation = Preparation()
    experiments: tuple[Experiment, ...] = ()

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name.

        Raises
        ------
        MosaicError
            ``usage.unknown_experiment`` with the nearest name.
        """
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        names = [experiment.name for experiment in self.experiments]
        raise MosaicError(
            "usage.unknown_experiment", f"There is no experiment {name!r}.", nearest(name, names), field="experiments"
        )

    def with_experiment(self, experiment: Experiment) -> Self:
        """The project with one experiment more.

        Raises
        ------
        MosaicError
            ``project.name_taken``: the name is used already, or gives the same folder names.
        """
        for other in self.experiments:
            if slug(other.name) == slug(experiment.name):
                raise MosaicError(
                    "project.name_taken",
                    f"There is an experiment {other.name!r} already.",
                    "Choose another name.",
                    field="name",
                )
        return self.model_copy(update={"experiments": (*self.experiments, experiment)})

    def with_datasets(self, refs: Iterable[DatasetRef]) -> Self:
        """The project with further data.

        Raises
        ------
        MosaicError
            ``project.data_twice`` when a file's content is in the project already, or its id is.
        """
        known = list(self.datasets)
        for ref in refs:
            for other in known:
                if ref.id == other.id or (ref.fingerprint == other.fingerprint and ref.matrices == other.matrices):
                    raise MosaicError(
                        "project.data_twice",
                        f"{ref.path} is in the project already, as {other.id!r}.",
                        "Name every file once.",
                        field="datasets",
                        file=ref.absolute,
                    )
            known.append(ref)
        return self.model_copy(update={"datasets": tuple(known)})


def new(
    path: str | Path,
    name: str | None = None,
    datasets: Iterable[DatasetRef] = (),
    preparation: Preparation | None = None,
    notes: str = "",
) -> Project:
    """Make a project and its file.

    Raises
    ------
    MosaicError
        ``project.exists`` when there is a file already; ``disk.*``.
    """
    path = Path(path)
    if path.exists():
        raise MosaicError(
            "project.exists", f"{path.name} exists already.", "Choose another name; nothing was changed.", file=path
        )
    project = Project(
        name=name or path.stem,
        created=now(),
        program=headless.__version__,
        preparation=preparation or Preparation(),
        notes=notes,
    ).with_datasets(datasets)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, path.parent, "make the project's folder") from error
    save(project, path)
    return project


def save(project: Project, path: str | Path) -> None:
    """Write the project; the version before stays beside it as ``.bak``.

    The file on disk is at every moment the old project or the new one, whole.

    Raises
    ------
    MosaicError
        ``disk.full``, ``disk.read_only``, ``disk.failed``.
    """
    path = Path(path)
    project = project.model_copy(update={"program": headless.__version__})
    # A damaged file must not push out the good copy that it is being recovered from.
    backup = _backup(path) if _parses(path) else None
    write_atomic(path, project.model_dump_json(indent=2) + "\n", "save the project", backup=backup)


def load(path: str | Path, note: Callable[[str], None] = _log.warning) -> Project:
    """Read a project file, of this or an older version.

    A damaged file is replaced by its ``.bak`` in memory, and ``note`` is told so in words; nothing is written.

    Raises
    ------
    MosaicError
        ``project.missing``, ``project.damaged``, ``project.newer``, ``project.invalid`` (naming the field).
    """
    path = Path(path)
    try:
        return _read(path)
    except MosaicError as error:
        if error.code not in ("project.damaged", "project.missing") or not _backup(path).exists():
            raise
        project = _read(_backup(path))
        note(
            f"{error.message} The copy {_backup(path).name} from the save before was opened instead: "
            "the last change may be missing."
        )
        return project


def lock(path: str | Path) -> Lock:
    """The lock that everybody who changes the project holds while changing it; reading needs none.

    Used as ``with lock(path): ...``; raises ``project.locked`` naming the holder.
    """
    path = Path(path)
    return Lock(path.with_name(f"{path.name}.lock"), "project.locked", f"The project {path.name}")


def relink(project: Project, base: str | Path, where: str | Path | Mapping[str, str | Path]) -> Project:
    """The project with moved data found again.

    References whose file is still in place are kept. The others are looked up in ``where``: a mapping from id (or old
    path) to the new path, or a folder that is searched for a file of the same content, the same name first.

    Raises
    ------
    MosaicError
        ``project.moved_data`` naming everything that was not found; ``project.data_changed`` when a named file has
        other content.
    """
    base = Path(base)
    places = {key: Path(item) for key, item in where.items()} if isinstance(where, Mapping) else Path(where)
    refs, lost = [], []
    for ref in project.datasets:
        path = _in_place(ref, base) or moved_to(ref, places, base)
        if path is None:
            lost.append(ref.id)
        refs.append(relocated(ref, path, base) if path is not None else ref)
    if lost:
        raise MosaicError(
            "project.moved_data",
            f"Not found: {', '.join(lost)}.",
            "Name the new place of each, or a folder that holds them all.",
            field="datasets",
            folder=where if not isinstance(where, Mapping) else None,
        )
    return project.model_copy(update={"datasets": tuple(refs)})


def slug(name: str) -> str:
    """A name as a part of file names: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint with the nearest known name, or with all of them."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names)}." if names else "There is none yet."


def _in_place(ref: DatasetRef, base: Path) -> Path | None:
    try:
        return resolve(ref, base)
    except MosaicError:
        return None


def _backup(path: Path) -> Path:
    return path.with_name(f"{path.name}.bak")


def _parses(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _read(path: Path) -> Project:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MosaicError(
            "project.missing",
            f"There is no project {path.name}.",
            f"Check the path, or make one: mosaic-headless new {path.name} --data FILE",
            file=path,
        ) from None
    except OSError as error:
        raise from_os_error(error, path, "read the project") from error
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise MosaicError(
            "project.damaged",
            f"{path.name} is damaged or is not a project: it is not readable JSON.",
            f"Restore it from a backup; run folders in {path.parent.name or '.'}/runs are not affected.",
            file=path,
        )
    return _validate(_migrate(values, path), path)


def _migrate(values: dict[str, Any], path: Path) -> dict[str, Any]:
    version = values.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise MosaicError(
            "project.invalid",
            f"{path.name} does not say which version of the project file it is.",
            "Is it a project of this program?",
            field="schema_version",
            file=path,
        )
    if version > SCHEMA_VERSION:
        raise MosaicError(
            "project.newer",
            f"{path.name} was written by a newer program (file version {version}; this program reads up to "
            f"{SCHEMA_VERSION}).",
            "Update this program; the file was not changed.",
            field="schema_version",
            file=path,
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise MosaicError(
                "project.invalid", f"File version {version} is unknown.", field="schema_version", file=path
            )
        values = MIGRATIONS[version](values)
        version += 1
        values["schema_version"] = version
    return values


def _validate(values: dict[str, Any], path: Path) -> Project:
    try:
        return Project.model_validate(values)
    except ValidationError as error:
        raise from_validation(error, "project.invalid", file=path) from None
