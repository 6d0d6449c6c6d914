"""The queue: which run is next. No thread, no daemon: somebody calls :meth:`Queue.tick` now and then.

It starts one worker at a time, in order, and can be left and taken up again at any moment: all it knows is in
``runs/queue.json`` and in the run folders.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from headless.errors import MosaicError, from_os_error
from headless.files import write_atomic
from headless.jobs.launch import launch
from headless.jobs.runfolder import RESUMABLE, RunFolder, Status, runs_of
from headless.lock import Lock, ProcessId
from headless.schema import Frozen

Launcher = Callable[[RunFolder], "subprocess.Popen[bytes]"]


class Active(Frozen):
    """The run that a worker is at: its process, and the how manieth attempt it is."""

    run: str
    process: ProcessId
    attempt: int


class QueueState(Frozen):
    """``queue.json``: the runs that wait, in order, and the one that runs."""

    schema_version: int = 1
    waiting: tuple[str, ...] = ()
    active: Active | None = None


class Queue:
    """The queue of a project, used inside ``with``: one user of the queue at a time.

    Raises
    ------
    MosaicError
        ``run.queue_in_use`` on entering, when another program runs the queue of this project.
    """

    def __init__(self, project_path: str | Path, launcher: Launcher = launch) -> None:
        self.folder = runs_of(project_path)
        self.path = self.folder / "queue.json"
        self.state = QueueState()
        self._launcher = launcher
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock(self.folder / "queue.lock", "run.queue_in_use", f"The queue of {Path(project_path).name}")

    def __enter__(self) -> Queue:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, self.folder, "make the folder of the runs") from error
        self._lock.acquire()
        try:
            self.state = self._read()
            self._reap()  # a worker that ended while nobody looked must not pass for one at work
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def add(self, run: RunFolder) -> None:
        """Put a run at the end; one that waits or runs already stays where it is."""
        active = self.state.active.run if self.state.active else None
        if run.id != active and run.id not in self.state.waiting:
            self._write(waiting=(*self.state.waiting, run.id))

    def clear(self) -> None:
        """Let no run wait any more; the active one goes on."""
        self._write(waiting=())

    @property
    def active(self) -> RunFolder | None:
        """The run that a worker is at."""
        return RunFolder(self.folder / self.state.active.run) if self.state.active else None

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.state.active is None and not self.state.waiting

    def tick(self) -> dict[str, Status]:
        """Look after the active run and start the next one if there is none.

        Returns the runs whose worker has ended since the last tick, and how. Never waits.
        """
        ended = self._reap()
        while self.state.active is None and self.state.waiting:
            run = RunFolder(self.folder / self.state.waiting[0])
            self._write(waiting=self.state.waiting[1:])
            if run.path.is_dir() and run.status in RESUMABLE:
                self._start(run)
        return ended

    def _reap(self) -> dict[str, Status]:
        """Let go of the active run if its worker is gone; how it ended."""
        active = self.state.active
        if active is None or self._running(active):
            return {}
        self._child = None
        run = RunFolder(self.folder / active.run)
        # The folder may have been deleted by hand: then there is nothing to take back.
        ended = {run.id: _hand_back(run, active.attempt)} if run.path.is_dir() else {}
        self._write(active=None)
        return ended

    def _start(self, run: RunFolder) -> None:
        attempt = run.state.attempts + 1
        (run.path / "control.json").unlink(missing_ok=True)  # old wishes were for the worker before
        self._child = self._launcher(run)
        self._write(active=Active(run=run.id, process=ProcessId.of(self._child.pid), attempt=attempt))

    def _running(self, active: Active) -> bool:
        if self._child is not None and self._child.pid == active.process.pid:
            return self._child.poll() is None
        return active.process.alive is not False

    def _read(self) -> QueueState:
        try:
            return QueueState.model_validate(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return QueueState()
        except (ValueError, ValidationError):
            # The order alone is lost; the runs keep their own states.
            return QueueState()
        except OSError as error:
            raise from_os_error(error, self.path, "read the queue") from error

    def _write(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
        write_atomic(self.path, self.state.model_dump_json(indent=2) + "\n", "write the queue", durable=False)


def _hand_back(run: RunFolder, attempt: int) -> Status:
    """Take back the state of a run whose worker is gone; one that did not say how it ended was interrupted."""
    state = run.state
    if state.attempts < attempt:  # the worker ended before its first word
        error = MosaicError("run.not_started", "The worker ended before it began.", f"See {run.log_path}.", run=run.id)
        changes = {"status": "failed", "process": None, "remark": error.message, "error": error.as_dict()}
    elif state.status == "running":
        remark = f"the worker ended without a word during {state.phase or 'its start'}"
        changes = {"status": "interrupted", "process": None, "remark": remark}
    else:
        return state.status
    run.write_state(state.model_copy(update=changes))
    return run.status
