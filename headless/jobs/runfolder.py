"""The run folder: the one way in which a window, a command line and a cluster start and watch a run.

::

    runs/<id>/
      run.json        the frozen request, written once by whoever asks for the run
      control.json    a wish from outside, written by the asker
      state.json      written by the worker (by the queue while there is none)
      events.jsonl    one JSON object a line, appended by the worker
      log.txt         what a person reads
      checkpoints/    what a resume needs
      results/        what was asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

import headless
from headless.data.datasets import DatasetRef
from headless.data.holdout import Holdout
from headless.data.preparation import Preparation
from headless.errors import MosaicError, from_os_error
from headless.files import as_json, now, write_atomic
from headless.jobs.events import EventWriter, last_event, read_events
from headless.lock import ProcessId
from headless.project import Experiment, Output, Project, nearest, slug
from headless.schema import Frozen, from_validation

Status = Literal["queued", "running", "paused", "done", "failed", "cancelled", "interrupted"]
Wish = Literal["pause", "stop", "cancel", "checkpoint"]
#: Families of errors that the queue knows an answer to (:mod:`headless.jobs.retry`).
Failure = Literal["memory", "diverged"]

#: Folder of the runs that were thrown away, inside that of the runs.
TRASH = ".trash"

#: From these a worker goes on where it was.
RESUMABLE: tuple[Status, ...] = ("queued", "paused", "interrupted", "failed")

_PACKAGES = ("anndata", "mudata", "numpy", "pandas", "scanpy", "scipy", "torch", "zarr")


class RunRequest(Frozen):
    """``run.json``: all that a run needs besides the data. ``settings`` is the complete configuration.

    Attributes
    ----------
    varied
        In a sweep: the fields that tell this run from the others, with their values.
    origin, reason
        The run that this one was made from (a duplicate, a retry), and why, in words.
    start
        ``<run>/<checkpoint>`` that training went on from, copied into this run; empty for a fresh start.
    on_failure, retries
        The failures after which the queue is to try again by itself, and how often it has done so.
    """

    schema_version: Literal[1] = 1
    id: str
    kind: Literal["train"] = "train"
    parent: str | None = None
    project: str
    experiment: str
    model: str
    preset: str | None
    settings: dict[str, Any]
    seed: int
    device: str
    datasets: tuple[DatasetRef, ...]
    preparation: Preparation
    holdout: Holdout
    outputs: tuple[Output, ...]
    versions: dict[str, str]
    created: str
    varied: dict[str, Any] = {}
    origin: str | None = None
    reason: str = ""
    start: str = ""
    on_failure: tuple[Failure, ...] = ()
    retries: int = 0

    @property
    def content(self) -> str:
        """SHA-256 of what decides the result: two requests of equal content ask for the same run.

        Names, dates, versions, the device and where the files lie do not count.
        """
        parts = self.model_dump(
            mode="json",
            include={"kind", "parent", "model", "settings", "seed", "preparation", "holdout", "outputs", "start"},
        )
        parts["datasets"] = [ref.model_dump(mode="json", exclude={"path", "absolute"}) for ref in self.datasets]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class State(Frozen):
    """``state.json``: where the run stands.

    Attributes
    ----------
    status, phase
        As last written; :attr:`RunFolder.status` also notices a worker that is gone.
    process
        The worker's process while it runs.
    attempts
        How often a worker was started on this folder.
    wish_seen
        Id of the last wish that was obeyed: a later worker does not obey it again.
    remark
        One sentence for the user, for example that training was stopped early.
    error
        Of a failed run: ``MosaicError.as_dict()``.
    """

    status: Status
    updated: str
    phase: str = ""
    process: ProcessId | None = None
    attempts: int = 0
    wish_seen: str = ""
    remark: str = ""
    error: dict[str, Any] | None = None

    @property
    def seen(self) -> Status:
        """The status; ``interrupted`` when it is ``running`` and the worker's process is gone."""
        if self.status == "running" and (self.process is None or self.process.alive is False):
            return "interrupted"
        return self.status


class RunFolder:
    """One run on disk. Cheap to make; nothing is read before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._request: RunRequest | None = None

    @classmethod
    def create(cls, project_path: str | Path, project: Project, experiment: Experiment, **request: Any) -> RunFolder:
        """Make ``runs/<experiment>-<n>`` beside the project file, with its request, in state ``queued``.

        ``request`` are fields of :class:`RunRequest` that the experiment does not decide, such as ``varied``.

        Raises
        ------
        MosaicError
            ``model.*`` for an unknown method or a wrong setting; ``disk.*``.
        """
        return cls.make(runs_of(project_path), request_of(project, experiment).model_copy(update=request))

    @classmethod
    def make(cls, folder: Path, request: RunRequest) -> RunFolder:
        """Make a run folder in ``folder`` for a request, whose id is given here; state ``queued``. Raises ``disk.*``.

        A number is given once, also if its run is in the trash.
        """
        stem = slug(request.experiment)
        try:
            folder.mkdir(exist_ok=True)
            names = {item.name for place in (folder, folder / TRASH) if place.is_dir() for item in place.iterdir()}
            number = max((int(name[len(stem) + 1 :]) for name in names if _numbered(name, stem)), default=0) + 1
            while True:
                path = folder / f"{stem}-{number}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:  # somebody else made it since
                    number += 1
        except OSError as error:
            raise from_os_error(error, folder, "make the run folder") from error
        run = cls(path)
        run._write("run.json", request.model_copy(update={"id": path.name}))
        run.write_state(State(status="queued", updated=now()))
        return run

    @property
    def id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def base(self) -> Path:
        """Folder of the project, from which the paths of the data are relative."""
        return Path(os.path.abspath(self.path)).parents[1]

    @property
    def checkpoints(self) -> Path:
        """Where training is saved."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """Where the answers are."""
        return self.path / "results"

    @property
    def events_path(self) -> Path:
        """The file of events."""
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        """The file for people."""
        return self.path / "log.txt"

    @property
    def request(self) -> RunRequest:
        """The frozen request.

        Raises
        ------
        MosaicError
            ``run.unknown`` if this is no run folder, ``run.damaged`` if the request cannot be understood.
        """
        if self._request is None:
            values = self._read_json("run.json")
            if values is None:
                raise MosaicError(
                    "run.unknown", f"{self.path} is not a run folder.", "It has no readable run.json.", run=self.id
                )
            try:
                self._request = RunRequest.model_validate(values)
            except ValidationError as error:
                raise from_validation(error, "run.damaged", run=self.id) from None
        return self._request

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What ``state.json`` says; ``queued`` when there is none yet."""
        values = self._read_json("state.json")
        try:
            return State.model_validate(values) if values else State(status="queued", updated="")
        except ValidationError as error:
            raise from_validation(error, "run.damaged", run=self.id) from None

    @property
    def status(self) -> Status:
        """The state; ``interrupted`` when it says running and the worker's process is gone.

        The worker of another computer cannot be asked: what it wrote last is believed.
        """
        return self.state.seen

    def write_state(self, state: State) -> None:
        """Replace ``state.json``. Raises ``disk.*``."""
        self._write("state.json", state.model_copy(update={"updated": now()}))

    # -- wishes --------------------------------------------------------------------------------------------------

    def ask(self, wish: Wish) -> None:
        """Leave a wish for the worker: pause, stop early and keep, cancel, or write a checkpoint now.

        Raises
        ------
        MosaicError
            ``usage.unknown_wish``; ``disk.*``.
        """
        if wish not in get_args(Wish):
            raise MosaicError("usage.unknown_wish", f"There is no wish {wish!r}.", nearest(wish, get_args(Wish)))
        self._write("control.json", {"id": uuid.uuid4().hex, "wish": wish, "time": now()})

    def wish(self) -> tuple[str, Wish] | None:
        """Id and kind of the last wish; ``None`` when there is none."""
        values = self._read_json("control.json") or {}
        for wish in get_args(Wish):
            if wish == values.get("wish"):
                return str(values.get("id", "")), wish
        return None

    # -- events --------------------------------------------------------------------------------------------------

    def events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events after byte ``offset``, and the offset to go on from.

        A line that is still being written is left for the next time; a line damaged by a crash is skipped.
        """
        return read_events(self.events_path, offset)

    def last(self, kind: str, within: int = 262_144) -> dict[str, Any] | None:
        """The last event of a kind among the last ``within`` bytes; ``None`` if there is none."""
        return last_event(self.events_path, kind, within)

    def writer(self) -> EventWriter:
        """The worker's pen for events and log."""
        return EventWriter(self.events_path, self.log_path)

    # -- files ---------------------------------------------------------------------------------------------------

    def _write(self, name: str, value: Any) -> None:
        text = as_json(value, indent=2) + "\n"
        # The request is written once and must survive a power loss; the state changes often and may be derived.
        write_atomic(self.path / name, text, f"write {name} of the run", durable=name == "run.json")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, self.path / name, f"read {name} of the run") from error
        except ValueError:
            raise MosaicError(
                "run.damaged",
                f"{name} of the run is not readable JSON.",
                "Start the run anew.",
                run=self.id,
                file=self.path / name,
            ) from None
        return values if isinstance(values, dict) else None


def request_of(project: Project, experiment: Experiment) -> RunRequest:
    """The request of an experiment, its settings complete and checked; ``id`` is empty.

    Raises
    ------
    MosaicError
        ``model.unknown``, ``model.unknown_preset``, ``model.unknown_setting``, ``model.bad_setting``.
    """
    from headless import models

    config = models.get(experiment.model).config.make(experiment.preset, **experiment.settings)
    return RunRequest(
        id="",
        project=project.name,
        experiment=experiment.name,
        model=experiment.model,
        preset=experiment.preset,
        settings=config.model_dump(mode="json"),
        seed=experiment.seed,
        device=experiment.device,
        datasets=project.datasets,
        preparation=project.preparation,
        holdout=experiment.holdout,
        outputs=experiment.outputs,
        versions=versions(),
        created=now(),
    )


def versions() -> dict[str, str]:
    """Versions of this program, of Python and of the libraries that results depend on; nothing is imported."""
    found = {"mosaic": str(headless.__version__), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def runs_of(project_path: str | Path) -> Path:
    """The folder of a project's runs."""
    return Path(project_path).parent / "runs"


def list_runs(project_path: str | Path) -> list[RunFolder]:
    """All runs of a project, oldest first (by number within an experiment)."""
    folder = runs_of(project_path)
    if not folder.is_dir():
        return []
    runs = [RunFolder(item) for item in folder.iterdir() if (item / "run.json").is_file()]
    return sorted(runs, key=lambda run: (run.request.created, _number(run.id), run.id))


def find_run(project_path: str | Path, name: str) -> RunFolder:
    """The run of that id, or the newest run of the experiment of that name.

    Raises
    ------
    MosaicError
        ``usage.unknown_run`` with the nearest name.
    """
    runs = list_runs(project_path)
    for run in runs:
        if run.id == name:
            return run
    of_experiment = [run for run in runs if run.request.experiment == name]
    if of_experiment:
        return of_experiment[-1]
    names = [*dict.fromkeys(run.request.experiment for run in runs), *(run.id for run in runs)]
    hint = nearest(name, names) if names else "Nothing was run yet: mosaic-headless run STUDY"
    raise MosaicError("usage.unknown_run", f"There is no run {name!r}.", hint, run=name)


def _numbered(name: str, stem: str) -> bool:
    return name.startswith(f"{stem}-") and name[len(stem) + 1 :].isdecimal()


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0
