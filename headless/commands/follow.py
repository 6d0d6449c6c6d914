"""Show runs while they run: a bar on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from headless.commands.common import note, print_error, print_json, say
from headless.commands.words import ended_words, epoch_words, progress_words, total
from headless.errors import EXIT_CODES, MosaicError
from headless.jobs.queue import Queue
from headless.jobs.retry import last_retry
from headless.jobs.runfolder import RunFolder

#: Seconds between two looks at the queue and the events.
TICK = 0.2
#: Signals within so many seconds are one wish: schedulers and ``timeout`` send them to a program and to its group.
ONE_WISH = 1.0
#: Plain output tells of an epoch or of progress at most this often.
PLAIN_EVERY = 5.0


class Plain:
    """A line for each thing worth knowing."""

    def __init__(self) -> None:
        self._told = 0.0

    def show(self, run: RunFolder, event: Mapping[str, Any]) -> None:
        """One event."""
        kind = event.get("kind")
        if kind == "phase" and event.get("event") == "begin":
            self._line(run, str(event.get("name")))
        elif kind == "log":
            self._line(run, f"  {event.get('text')}")
        elif kind == "epoch" and (self._due() or event.get("step") == event.get("steps")):
            self._line(run, "  " + epoch_words(event))
        elif kind == "progress" and self._due():
            self._line(run, f"  {progress_words(event)}")
        elif kind == "state" and event.get("status") != "running":
            self._line(run, ended_words(event))

    def close(self) -> None:
        """Nothing to tidy."""

    def _line(self, run: RunFolder, text: str) -> None:
        say(f"[{run.id}] {text}")

    def _due(self) -> bool:
        if time.monotonic() - self._told < PLAIN_EVERY:
            return False
        self._told = time.monotonic()
        return True


class Bar(Plain):
    """A bar of the steps of training; other lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    def show(self, run: RunFolder, event: Mapping[str, Any]) -> None:
        """One event."""
        kind = event.get("kind")
        if kind in ("step", "epoch") and event.get("steps"):
            self._advance(run, event, "train")
        elif kind == "progress" and event.get("total"):
            self._advance(run, {"step": event["done"], "steps": event["total"]}, str(event.get("task", "")))
        else:
            if kind == "phase" or (kind == "state" and event.get("status") != "running"):
                self.close()
            super().show(run, event)

    def close(self) -> None:
        """End the bar with its line kept."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _advance(self, run: RunFolder, event: Mapping[str, Any], what: str) -> None:
        from tqdm import tqdm

        title = f"[{run.id}] {what}"
        if self._bar is None or self._bar.desc.rstrip(": ") != title:
            self.close()
            self._bar = tqdm(total=int(event["steps"]), desc=title, unit="step" if what == "train" else "cell")
        self._bar.n = int(event["step"])
        losses = event.get("train") or {}
        if losses:
            self._bar.set_postfix_str(f"epoch {event.get('epoch')}, loss {total(losses):.4g}", refresh=False)
        self._bar.refresh()

    def _line(self, run: RunFolder, text: str) -> None:
        if self._bar is None:
            super()._line(run, text)
        else:
            self._bar.write(f"[{run.id}] {text}")


class Json:
    """Every event as it is, with the run it belongs to."""

    def show(self, run: RunFolder, event: Mapping[str, Any]) -> None:
        """One event."""
        print_json({"run": run.id, **event})

    def close(self) -> None:
        """Nothing to tidy."""


def follow(queue: Queue, runs: Sequence[RunFolder], as_json: bool) -> int:
    """Tick the queue until nothing that it serves is left, showing what happens; the exit code over ``runs``.

    Ctrl-C (or SIGTERM) asks the worker to save and pause, and waits for it; a second one leaves at once, while the
    worker goes on saving by itself. While another program runs the queue this one only watches: then Ctrl-C ends the
    watching alone.
    """
    screen = Json() if as_json else Bar() if sys.stdout.isatty() else Plain()
    ours = {run.id for run in runs}
    read = {run.id: _size(run) for run in runs}
    if queue.in_the_way is not None:
        note(f"{queue.in_the_way.message} The runs are put into its queue and watched.")
        if queue.in_the_way.hint.startswith("If"):
            note(queue.in_the_way.hint)
    if queue.active is not None:
        read.setdefault(queue.active.id, _size(queue.active))
        if queue.active.id not in ours and not as_json:
            say(f"waiting for {queue.active.id}, which is running")
        process = queue.active.state.process
        if process is not None and not process.here:
            note(
                f"{queue.active.id} is said to run on {process.host}; if that computer has stopped, press Ctrl-C and "
                f"delete {queue.path}"
            )
    with _interrupts() as asked:
        pausing = False
        while True:
            active = queue.active
            ended = queue.tick()
            for run in {run.id: run for run in (active, queue.active) if run is not None}.values():
                events, read[run.id] = run.events(read.get(run.id, 0))
                for event in events:
                    screen.show(run, event)
            _tell_silent(queue, ended, screen)
            if queue.idle or any(moment - asked[0] > ONE_WISH for moment in asked):
                break
            if asked and not queue.scheduler:
                note("no longer watched; the queue goes on")
                break
            if asked and not pausing:
                pausing = True
                _pause(queue)
            time.sleep(TICK)
        screen.close()
    _tell_waiting(queue, runs)
    return _exit_code([last_retry(run) for run in runs], as_json)


def _pause(queue: Queue) -> None:
    active, ours = queue.active, queue.serve
    queue.serve, queue.starts = set(), False  # what waits keeps its place for another time
    if active is not None and (ours is None or active.id in ours):
        queue.serve = {active.id}
        active.ask("pause")
        note(f"{active.id} saves and pauses; Ctrl-C again leaves without waiting for it")


def _tell_waiting(queue: Queue, runs: Sequence[RunFolder]) -> None:
    """Say why runs that were asked for were not started."""
    found = queue.obstacles()
    for run in runs:
        if words := found.get(run.id):
            note(f"{run.id} was not started: {words}")
    if queue.state.paused and found:
        note(f"the queue is paused ({queue.state.remark}); mosaic-headless queue resume {_study(queue.folder.parent)}")


def _tell_silent(queue: Queue, ended: Mapping[str, str], screen: Plain | Json) -> None:
    """A worker that died wrote no last event; the queue noticed it."""
    for name, status in ended.items():
        run = RunFolder(queue.folder / name)
        last = run.last("state") or {}
        if last.get("status") != status:
            screen.show(run, {"time": time.time(), "kind": "state", "status": status, "remark": run.state.remark})


def _exit_code(runs: Sequence[RunFolder], as_json: bool) -> int:
    """0, or the code of the first run that did not end well; failures are told, and how to go on."""
    code = EXIT_CODES["ok"]
    unfinished = False
    for run in runs:
        state, status = run.state, run.status
        if status == "failed" and state.error:
            given = state.error
            error = MosaicError(
                given["code"], given["message"], given["hint"], given["field"], **{"run": run.id, **given["where"]}
            )
            print_error(error, as_json)
            code = code or error.exit_code
        elif status != "done":
            unfinished = unfinished or status != "cancelled"
            code = code or EXIT_CODES["stopped"]
    if unfinished and not as_json:
        note(f"go on later with: mosaic-headless resume {_study(runs[0].base)}")
    return code


def _study(base: Path) -> str:
    found = sorted(base.glob("*.mosaic"))
    return str(found[0]) if len(found) == 1 else "STUDY"


@contextmanager
def _interrupts() -> Iterator[list[float]]:
    """The moments at which a signal came, instead of its usual effect."""
    asked: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def remember(_number: int, _frame: FrameType | None) -> None:
        asked.append(time.monotonic())

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _size(run: RunFolder) -> int:
    try:
        return run.events_path.stat().st_size
    except OSError:
        return 0
