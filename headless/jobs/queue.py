"""The queue: which run is next. No thread, no daemon: somebody calls :meth:`Queue.tick` now and then.

All it knows is in ``runs/queue.json`` and in the run folders, and is taken from there at every look. Of several
programs with the same project one is the scheduler, by a lock file: it alone writes ``queue.json`` and starts workers,
one at a time. The others are watchers: what is asked of them they leave as files in ``runs/.orders/``, and when the
scheduler is gone one of them takes its place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headless.errors import MosaicError, from_os_error
from headless.files import now, write_atomic
from headless.jobs import inbox, retry, trash
from headless.jobs.ended import hand_back, write_failure
from headless.jobs.launch import launch
from headless.jobs.orders import Active, OnError, Order, QueueState, changed, dropped, obstacles, replaced, taken
from headless.jobs.runfolder import RESUMABLE, RunFolder, State, Status, runs_of
from headless.lock import Lock, ProcessId
from headless.project import nearest

Launcher = Callable[[RunFolder], "subprocess.Popen[bytes]"]

_log = logging.getLogger(__name__)

#: A worker that was started by a scheduler that was killed in that moment is given so many seconds to appear.
START_SECONDS = 20.0


class Queue:
    """The queue of a project, used inside ``with``.

    Attributes
    ----------
    state
        Order, holds, dependencies, the switches: as the files say it, with the orders that are still to be carried out.
    scheduler
        Is it this program that starts workers? If not, it watches.
    serve
        The runs that this program wants carried out (what they wait for included); ``None`` = all. A scheduler starts
        those that others have asked for meanwhile, too, but is not kept by them.
    starts
        Whether a scheduler starts runs at all; one that is about to leave does not.
    in_the_way
        For a watcher: who the scheduler is, as an error in words.
    """

    def __init__(self, project_path: str | Path, launcher: Launcher = launch) -> None:
        self.folder = runs_of(project_path)
        self.path = self.folder / "queue.json"
        self.state = QueueState()
        self.scheduler = False
        self.serve: set[str] | None = None
        self.starts = True
        self.in_the_way: MosaicError | None = None
        self._launcher = launcher
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock(self.folder / "queue.lock", "run.queue_in_use", f"The queue of {Path(project_path).name}")
        self._file_state = QueueState()
        self._file_seen: tuple[int, ...] | None = None
        self._statuses: dict[str, tuple[tuple[int, ...], State]] = {}
        self._left: set[Path] = set()
        self._asked: set[str] = set()

    def __enter__(self) -> Queue:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, self.folder, "make the folder of the runs") from error
        try:
            self.look()
            if self.scheduler:
                self._reap()  # a worker that ended while nobody looked must not pass for one at work
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self.scheduler = False

    # -- orders --------------------------------------------------------------------------------------------------

    def add(self, run: RunFolder, to: int | None = None, after: tuple[str, ...] = ()) -> None:
        """Put a run at the end (or at a place); one that waits or runs already stays where it is."""
        self._order(Order(do="add", run=run.id, to=to, others=after))

    def move(self, run: str, to: int) -> None:
        """Put a waiting run at a place: 0 = next, negative ones count from the end. Raises ``run.not_waiting``."""
        self._order(Order(do="move", run=run, to=to))

    def hold(self, run: str) -> None:
        """Do not start a waiting run until it is released. Raises ``run.not_waiting``."""
        self._order(Order(do="hold", run=run))

    def release(self, run: str) -> None:
        """Let a run that is held be started again. Raises ``run.not_waiting``."""
        self._order(Order(do="release", run=run))

    def after(self, run: str, *others: str) -> None:
        """Start a waiting run only when others are done; with no others it waits for none.

        Raises ``run.not_waiting``; ``usage.circle`` when the others wait for it.
        """
        self._order(Order(do="after", run=run, others=others))

    def pause(self) -> None:
        """Start nothing more; the active run goes on."""
        self._order(Order(do="pause"))

    def resume(self) -> None:
        """Start runs again."""
        self._order(Order(do="resume"))

    def on_error(self, mode: OnError) -> None:
        """``continue`` with the next run after one that failed, or ``stop`` the queue. Raises ``usage.on_error``."""
        self._order(Order(do="on_error", mode=mode))

    def remove(self, run: str) -> None:
        """Put a run into the trash. Raises ``run.active`` while it runs, ``usage.unknown_run``; ``disk.*``."""
        self._order(Order(do="remove", run=run, time=now()))

    def undo(self, run: str | None = None) -> str:
        """Take a run (the last one, if none is named) out of the trash, to where it was; its id.

        Raises ``usage.not_in_trash``; ``disk.*``.
        """
        name = run if run is not None else self._last_thrown()
        self._order(Order(do="undo", run=name))
        return name

    def empty_trash(self) -> None:
        """Delete what is in the trash for good. Raises ``disk.*``."""
        self._order(Order(do="empty"))

    def retry(self, run: RunFolder, changes: Mapping[str, Any] | None = None) -> RunFolder:
        """Carry a run out again: the same one from its last checkpoint, or (changed, cancelled, done) a new one.

        Raises ``run.active`` while it runs; ``model.*`` and ``usage.*`` for wrong changes; ``disk.*``.
        """
        status = run.status
        if status == "running":
            raise MosaicError("run.active", f"{run.id} is running.", "Wait for it, or cancel it first.", run=run.id)
        if changes or status not in RESUMABLE:
            words = ", ".join(f"{name} = {value}" for name, value in (changes or {}).items())
            run = retry.duplicate(run, changes or {}, f"retry of {run.id}{' with ' + words if words else ''}")
        self.add(run)
        return run

    def duplicate(self, run: RunFolder, changes: Mapping[str, Any]) -> RunFolder:
        """A new run with the request of another one and changed fields, at the end of the queue.

        Raises ``model.*`` and ``usage.*`` for wrong changes; ``disk.*``.
        """
        made = retry.duplicate(run, changes)
        self.add(made)
        return made

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> RunFolder | None:
        """The run that a worker is at."""
        return RunFolder(self.folder / self.state.active.run) if self.state.active else None

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing that is served here waits for its turn (held and hopeless runs do not)."""
        if any(path.exists() for path in self._left):
            return False
        served = self._with_needs(self.serve)
        active = self.state.active
        if active is not None and (served is None or active.run in served):
            return False
        return not any(
            (obstacle is None or not obstacle.lasting) and (served is None or run in served)
            for run, obstacle in obstacles(self.state, self.status_of)
        )

    def obstacles(self) -> dict[str, str]:
        """The waiting runs in order, each with what keeps it from being started (empty: its turn will come)."""
        return {run: found.words if found else "" for run, found in obstacles(self.state, self.status_of)}

    def status_of(self, run: str) -> str | None:
        """The status of a run; ``damaged`` when it cannot be read, ``None`` when there is no such run."""
        path = os.path.join(self.folder, run)  # the queue may be long: no Path is made for every look
        seen = _signature(os.path.join(path, "state.json"))
        if seen is None and not os.path.isdir(path):
            return None
        found = self._statuses.get(run)
        try:
            if seen is None or found is None or found[0] != seen:
                found = (seen or (), RunFolder(path).state)
                self._statuses[run] = found
        except MosaicError:
            return "damaged"
        return found[1].seen

    def look(self) -> None:
        """Take in what the files say; as the scheduler also carry out what watchers asked for. Starts nothing."""
        if self.scheduler and not self._lock.held:
            self.scheduler = False  # the lock was deleted by hand, and maybe taken by somebody else
        if not self.scheduler:
            try:
                self._lock.acquire()
                self.scheduler, self.in_the_way, self._file_seen = True, None, None
            except MosaicError as error:
                if error.code not in ("run.queue_in_use", "disk.read_only"):
                    raise
                self.in_the_way = error
        seen = _signature(self.path)
        if seen != self._file_seen:
            self._file_state, self._file_seen = self._read(), seen
        self.state = self._file_state
        for path in inbox.left(self.folder):
            self._take(path)

    def settle(self, seconds: float = 3.0) -> bool:
        """Wait until the scheduler has carried out what was asked for here; ``False`` if it has not in that time."""
        end = time.monotonic() + seconds
        while any(path.exists() for path in self._left):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
            self.look()
        self.look()
        return True

    def tick(self) -> dict[str, Status]:
        """Look after the active run and start the next one if there is none.

        Returns the runs whose worker has ended since the last tick, and how. Never waits. A watcher only looks.
        """
        before = self.state.active
        self.look()
        if not self.scheduler:
            return self._watched(before)
        ended = self._reap()
        while self.starts and self.state.active is None and (run := self._next()) is not None:
            ended.update(self._start(run))
        return ended

    # -- the scheduler -------------------------------------------------------------------------------------------

    def _next(self) -> RunFolder | None:
        """The first run that may be started; what is found to be over or gone waits no longer."""
        served = self._with_needs(None if self.serve is None else self.serve | self._asked)
        over = []
        found = None
        for name, obstacle in obstacles(self.state, self.status_of):
            if obstacle is not None or (served is not None and name not in served):
                continue
            status = self.status_of(name)
            if status in (None, "done", "cancelled", "damaged"):
                over.append(name)
            else:
                found = RunFolder(self.folder / name)
                break
        if over:
            self._write(dropped(self.state, over))
        return found

    def _start(self, run: RunFolder) -> dict[str, Status]:
        """Start a worker, or adopt the one that is at the run already; how it ended if it could not be started."""
        state = run.state
        if run.status == "running":  # started by hand, or by a scheduler whose queue.json was lost
            self._write(taken(self.state, Active(run=run.id, process=state.process, attempt=state.attempts)))
            return {}
        (run.path / "control.json").unlink(missing_ok=True)  # old wishes were for the worker before
        active = Active(run=run.id, attempt=state.attempts + 1, launched=time.time())
        self._write(taken(self.state, active))
        try:
            self._child = self._launcher(run)
        except MosaicError as error:
            write_failure(run, error)
            return self._let_go(run, "failed")
        active = active.model_copy(update={"process": ProcessId.of(self._child.pid)})
        self._write(self.state.model_copy(update={"active": active}))
        return {}

    def _reap(self) -> dict[str, Status]:
        """Let go of the active run if its worker is gone; how it ended."""
        active = self.state.active
        if active is None or self._at_work(active):
            return {}
        self._child = None
        run = RunFolder(self.folder / active.run)
        if not run.path.is_dir():  # deleted by hand: then there is nothing to take back
            self._write(self.state.model_copy(update={"active": None}))
            return {}
        if active.process is None and self._attempts(active.run) < active.attempt:
            # The scheduler before was killed before it could start the worker.
            self._write(self.state.model_copy(update={"active": None, "waiting": (run.id, *self.state.waiting)}))
            return {}
        return self._let_go(run, hand_back(run, active.attempt))

    def _let_go(self, run: RunFolder, status: Status) -> dict[str, Status]:
        state = self.state.model_copy(update={"active": None})
        if status == "failed":
            again = self._try_again(run)
            if again is not None:
                state = replaced(state, run.id, again.id)
                if self.serve is not None:
                    (self.serve if run.id in self.serve else self._asked).add(again.id)
            elif state.on_error == "stop":
                state = state.model_copy(update={"paused": True, "remark": f"{run.id} failed"})
        self._write(state)
        return {run.id: status}

    def _try_again(self, run: RunFolder) -> RunFolder | None:
        try:
            return retry.advised(run) if retry.wants_retry(run) else None
        except MosaicError as error:  # nothing to be done, or no room for another run: the failure stands
            _log.warning("%s is not tried again: %s", run.id, error)
            return None

    def _at_work(self, active: Active) -> bool:
        child, process = self._child, active.process
        if child is not None and process is not None and child.pid == process.pid and child.poll() is None:
            return True
        self.status_of(active.run)  # reads state.json if it has changed
        state = self._statuses[active.run][1] if active.run in self._statuses else None
        if state is not None and state.attempts >= active.attempt:
            if state.status == "running":
                return state.seen == "running"
            return process is not None and process.alive is True  # it has said its last word and is about to end
        if process is not None and process.alive is not False:
            return True
        worker = Lock(self.folder / active.run / "worker.lock", "run.already_running", active.run)
        if worker.holder() is not None:
            return True
        return process is None and abs(time.time() - active.launched) < START_SECONDS

    def _attempts(self, run: str) -> int:
        return self._statuses[run][1].attempts if run in self._statuses else 0

    def _after_order(self, order: Order) -> QueueState:
        """The state after an order; what makes no sense is refused."""
        there = self.status_of(order.run) if order.run else None
        if order.do == "remove" and there == "running":
            raise MosaicError("run.active", f"{order.run} is running.", "Cancel it first.", run=order.run)
        thrown = trash.thrown(self.folder) if order.do in ("remove", "undo") and there is None else []
        if order.do == "remove" and there is None and order.run not in thrown:
            raise MosaicError("usage.unknown_run", f"There is no run {order.run!r}.", run=order.run)
        if order.do == "undo" and there is None and order.run not in thrown:
            hint = nearest(order.run, thrown)
            raise MosaicError("usage.not_in_trash", f"{order.run} is not in the trash.", hint, run=order.run)
        return changed(self.state, order)

    def _carry_out(self, order: Order) -> None:
        state = self._after_order(order)
        if order.do == "remove":
            trash.throw(self.folder, order.run)
        elif order.do == "undo":
            trash.bring_back(self.folder, order.run)
        elif order.do == "empty":
            trash.empty(self.folder)
        self._write(state)

    # -- watchers ------------------------------------------------------------------------------------------------

    def _watched(self, before: Active | None) -> dict[str, Status]:
        if before is None or (self.state.active is not None and self.state.active.run == before.run):
            return {}
        run = RunFolder(self.folder / before.run)
        if not run.path.is_dir():
            return {}
        if self.serve is not None and run.id in self.serve:
            self.serve.add(retry.last_retry(run).id)
        return {run.id: run.status}

    def _order(self, order: Order) -> None:
        if self.scheduler:
            self._carry_out(order)
            return
        self.state = self._after_order(order)  # what makes no sense is refused here and now
        self._left.add(inbox.leave(self.folder, order))

    def _take(self, path: Path) -> None:
        """An order that a watcher left: the scheduler carries it out, a watcher sees what it will do."""
        try:
            order = inbox.read(path)
            if not self.scheduler:
                self.state = changed(self.state, order)
                return
            self._carry_out(order)
            if order.do == "add":
                self._asked.add(order.run)
        except (OSError, ValueError) as error:  # gone meanwhile, or not an order
            _log.warning("%s is no order: %s", path.name, error)
        except MosaicError as error:
            if self.scheduler:
                _log.warning("not done: %s", error)
        if self.scheduler:
            with contextlib.suppress(OSError):
                path.unlink()

    def _with_needs(self, runs: set[str] | None) -> set[str] | None:
        """Runs with those that they wait for; ``None`` = all."""
        if runs is None:
            return None
        found, more = set(runs), list(runs)
        while more:
            new = [run for run in self.state.after.get(more.pop(), ()) if run not in found]
            found.update(new)
            more.extend(new)
        return found

    def _last_thrown(self) -> str:
        names = trash.thrown(self.folder)
        recorded = [item.run for item in self.state.trash if item.run in names]
        if not names:
            raise MosaicError("usage.not_in_trash", "The trash is empty.")
        return recorded[-1] if recorded else names[-1]

    # -- the file ------------------------------------------------------------------------------------------------

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

    def _write(self, state: QueueState) -> None:
        write_atomic(self.path, state.model_dump_json(indent=2) + "\n", "write the queue", durable=False)
        self.state = self._file_state = state
        self._file_seen = _signature(self.path)


def _signature(path: str | Path) -> tuple[int, ...] | None:
    """What changes whenever a file is replaced; ``None`` when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
