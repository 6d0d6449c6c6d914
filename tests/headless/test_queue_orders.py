"""What can be asked of the queue: order, holds, dependencies, the switches, the trash; and that it stays quick."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headless import project as projects
from headless.errors import MosaicError
from headless.jobs.orders import Order, QueueState, changed
from headless.jobs.queue import Queue
from headless.jobs.runfolder import RunFolder, State, list_runs
from headless.project import Experiment


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    projects.new(path)
    return path


@pytest.fixture
def make(study: Path) -> Callable[..., RunFolder]:
    project = projects.load(study)
    return lambda name, **more: RunFolder.create(study, project, Experiment(name=name), **more)


class Machine:
    """Workers that run until they are told how they end; the order in which they were started."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(self, run: RunFolder) -> subprocess.Popen[bytes]:
        self.started.append(run.id)
        worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        self._workers[run.id] = worker
        return worker

    def end(self, run: RunFolder, status: str = "done", error: dict[str, Any] | None = None) -> None:
        attempts = run.state.attempts + 1
        run.write_state(State(status=status, updated="", attempts=attempts, error=error))  # type: ignore[arg-type]
        worker = self._workers.pop(run.id)
        worker.kill()
        worker.wait()

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.wait()


@pytest.fixture
def machine() -> Any:
    made = Machine()
    yield made
    made.stop()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(MosaicError) as caught:
        call()
    return caught.value.code


def drain(queue: Queue, machine: Machine, status: str = "done") -> list[str]:
    """Run the queue to its end, every worker ending in the same way; the order of the starts."""
    queue.tick()
    while not queue.idle:
        assert queue.active is not None
        machine.end(queue.active, status)
        queue.tick()
    return machine.started


def test_the_order_can_be_changed_and_is_kept(study: Path, make: Any, machine: Machine) -> None:
    runs = [make("e") for _ in range(4)]
    with Queue(study, machine) as queue:
        for run in runs:
            queue.add(run)
        queue.move("e-4", 0)
        queue.move("e-1", -1)
        queue.move("e-3", 1)
    with Queue(study, machine) as queue:
        assert queue.state.waiting == ("e-4", "e-3", "e-2", "e-1")
        assert refused(lambda: queue.move("e-5", 0)) == "run.not_waiting"
        assert drain(queue, machine) == ["e-4", "e-3", "e-2", "e-1"]


def test_a_run_that_is_held_waits_and_blocks_nobody(study: Path, make: Any, machine: Machine) -> None:
    first, second = make("e"), make("e")
    with Queue(study, machine) as queue:
        queue.add(first)
        queue.add(second)
        queue.hold(first.id)
        assert drain(queue, machine) == ["e-2"]
        assert queue.idle
        assert queue.obstacles() == {"e-1": "held"}
        queue.release(first.id)
        assert not queue.idle
        assert drain(queue, machine) == ["e-2", "e-1"]


def test_a_run_waits_until_the_others_are_done(study: Path, make: Any, machine: Machine) -> None:
    runs = [make("e") for _ in range(4)]
    with Queue(study, machine) as queue:
        for run in runs:
            queue.add(run)
        queue.after("e-1", "e-3")
        queue.after("e-2", "e-1", "e-4")
        assert refused(lambda: queue.after("e-3", "e-2")) == "usage.circle"
        assert refused(lambda: queue.after("e-3", "e-3")) == "usage.circle"
        assert queue.obstacles()["e-1"] == "after e-3"
        assert drain(queue, machine) == ["e-3", "e-1", "e-4", "e-2"]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_what_can_never_be_started_is_said_and_does_not_keep_the_queue(
    study: Path, make: Any, machine: Machine, status: str
) -> None:
    first, second = make("e"), make("e")
    with Queue(study, machine) as queue:
        queue.add(first)
        queue.add(second)
        queue.after(second.id, first.id)
        assert drain(queue, machine, status) == ["e-1"]
        assert queue.obstacles() == {"e-2": f"after e-1, which is {status}"}
        queue.after(second.id)
        assert drain(queue, machine) == ["e-1", "e-2"]


def test_a_paused_queue_starts_nothing(study: Path, make: Any, machine: Machine) -> None:
    first, second = make("e"), make("e")
    with Queue(study, machine) as queue:
        queue.add(first)
        queue.add(second)
        queue.tick()
        queue.pause()
        assert not queue.idle  # what runs goes on
        machine.end(first)
        queue.tick()
        assert queue.idle
    with Queue(study, machine) as queue:
        assert queue.state.paused
        queue.resume()
        assert drain(queue, machine) == ["e-1", "e-2"]


@pytest.mark.parametrize(("mode", "started"), [("continue", ["e-1", "e-2"]), ("stop", ["e-1"])])
def test_after_an_error_the_queue_goes_on_or_stops(
    study: Path, make: Any, machine: Machine, mode: Any, started: list[str]
) -> None:
    with Queue(study, machine) as queue:
        queue.add(make("e"))
        queue.add(make("e"))
        queue.on_error(mode)
        assert drain(queue, machine, "failed") == started
        assert queue.state.paused == (mode == "stop")
        if mode == "stop":
            assert queue.state.remark == "e-1 failed"
        assert refused(lambda: queue.on_error("never")) == "usage.on_error"  # type: ignore[arg-type]


def test_the_trash_gives_back_the_run_and_its_place(study: Path, make: Any, machine: Machine) -> None:
    runs = [make("e") for _ in range(3)]
    (runs[1].path / "results").mkdir()
    (runs[1].path / "results" / "x").write_text("kept")
    with Queue(study, machine) as queue:
        for run in runs:
            queue.add(run)
        queue.after("e-2", "e-1")
        queue.hold("e-2")
        queue.remove("e-2")
        queue.remove("e-3")
        assert not runs[1].path.exists()
        assert [run.id for run in list_runs(study)] == ["e-1"]
        assert make("e").id == "e-4"  # a number is given once
    with Queue(study, machine) as queue:
        assert queue.undo() == "e-3"
        assert queue.undo("e-2") == "e-2"
        assert queue.state.waiting == ("e-1", "e-2", "e-3")
        assert queue.state.after == {"e-2": ("e-1",)}
        assert queue.state.held == ("e-2",)
        assert (runs[1].path / "results" / "x").read_text() == "kept"
        assert refused(queue.undo) == "usage.not_in_trash"
        queue.tick()
        assert refused(lambda: queue.remove("e-1")) == "run.active"
        machine.end(runs[0])
        queue.tick()
        queue.remove("e-1")
        queue.path.unlink()  # the order is lost, the trash is not
        assert queue.undo() == "e-1"
        queue.remove("e-1")
        queue.empty_trash()
        assert refused(lambda: queue.undo("e-1")) == "usage.not_in_trash"


def test_retry_goes_on_or_begins_a_changed_run(study: Path, make: Any, machine: Machine) -> None:
    run = make("e")
    with Queue(study, machine) as queue:
        queue.add(run)
        drain(queue, machine, "failed")
        assert queue.retry(run).id == run.id
        drain(queue, machine, "cancelled")
        again = queue.retry(run)  # nothing to go on from: the same request, anew
        assert again.id == "e-2"
        assert again.request.content == run.request.content
        other = queue.retry(run, {"lr": 0.004, "seed": 7})
        assert (other.request.settings["lr"], other.request.seed) == (0.004, 7)
        assert other.request.origin == "e-1"
        assert "lr = 0.004" in other.request.reason
        assert refused(lambda: queue.duplicate(run, {"lrr": 1})) == "model.unknown_setting"
        assert queue.duplicate(other, {"batch_size": 64}).request.settings["lr"] == 0.004
        assert queue.state.waiting == ("e-2", "e-3", "e-4")


def test_only_what_is_served_is_started(study: Path, make: Any, machine: Machine) -> None:
    with Queue(study, machine) as queue:
        for _ in range(4):
            queue.add(make("e"))
        queue.after("e-4", "e-2")
        queue.serve = {"e-4"}
        assert drain(queue, machine) == ["e-2", "e-4"]  # with what it waits for
        assert queue.state.waiting == ("e-1", "e-3")


def test_an_order_for_an_unknown_thing_changes_nothing() -> None:
    state = QueueState(waiting=("a", "b"))
    for order in (Order(do="hold", run="c"), Order(do="move", run="c", to=0), Order(do="after", run="c")):
        assert refused(lambda order=order: changed(state, order)) == "run.not_waiting"


def test_five_hundred_runs_are_looked_through_quickly(study: Path, make: Any, machine: Machine) -> None:
    folder = study.parent / "runs"
    first = make("e")
    text = (first.path / "run.json").read_text()
    for number in range(2, 501):
        path = folder / f"e-{number}"
        path.mkdir()
        (path / "run.json").write_text(text.replace('"e-1"', f'"e-{number}"'))
        (path / "state.json").write_text((first.path / "state.json").read_text())
    with Queue(study, machine) as queue:
        for number in range(1, 501):
            queue.add(RunFolder(folder / f"e-{number}"))
            if number % 2:
                queue.hold(f"e-{number}")
            elif number > 2:
                queue.after(f"e-{number}", f"e-{number - 2}")
        queue.pause()
        taken = []
        for _ in range(15):
            start = time.process_time()
            queue.tick()
            taken.append(time.process_time() - start)
        assert sorted(taken)[7] < 0.02
        assert queue.idle
        queue.resume()
        start = time.process_time()
        queue.tick()
        assert time.process_time() - start < 0.1  # with the start of a worker
        assert machine.started == ["e-2"]
        queue.serve = set()
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "headless", "status", str(study)], check=True, stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    after = os.times()
    # Seconds of the processor, as the machine of a test may be busy with other things.
    assert after.children_user - before.children_user < 0.5
