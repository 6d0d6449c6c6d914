"""What a queue meets in the field: kills in the worst moments, left-over locks, wrong clocks, damaged files."""

from __future__ import annotations

import errno
import json
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
from headless.files import now
from headless.jobs import queue as queues
from headless.jobs.launch import environment
from headless.jobs.orders import Active, QueueState
from headless.jobs.queue import Queue
from headless.jobs.runfolder import RunFolder, State
from headless.lock import Holder, ProcessId
from headless.project import Experiment

#: A worker that writes the states of a real one, notes that it was here, and lasts for half a second.
WORKER = """
import sys, time
from headless.jobs.runfolder import RunFolder
from headless.jobs.worker import worker_lock
from headless.lock import ProcessId
run = RunFolder(sys.argv[1])
with worker_lock(run):
    state = run.state
    state = state.model_copy(update=dict(status='running', process=ProcessId.of(), attempts=state.attempts + 1))
    run.write_state(state)
    with open(run.path / 'here.txt', 'a') as file:
        file.write('x')
    time.sleep(0.5)
    run.write_state(state.model_copy(update=dict(status='done', process=None)))
"""

SCHEDULER = f"""
import subprocess, sys, time
from headless.jobs.queue import Queue
def start(run):
    return subprocess.Popen([sys.executable, '-c', {WORKER!r}, str(run.path)])
with Queue(sys.argv[1], start) as queue:
    while True:
        queue.tick()
        if queue.idle:
            break
        time.sleep(0.01)
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    projects.new(path)
    return path


@pytest.fixture
def make(study: Path) -> Callable[[], RunFolder]:
    project = projects.load(study)
    return lambda: RunFolder.create(study, project, Experiment(name="e"))


def start(run: RunFolder) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(run.path)], env=environment())


def never(run: RunFolder) -> subprocess.Popen[bytes]:
    raise AssertionError(f"{run.id} was started a second time")


def drain(queue: Queue, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    queue.tick()
    while not queue.idle:
        assert time.monotonic() < end, queue.obstacles()
        time.sleep(0.02)
        queue.tick()


def times_here(run: RunFolder) -> int:
    file = run.path / "here.txt"
    return len(file.read_text()) if file.exists() else 0


def write_queue(study: Path, state: QueueState) -> None:
    (study.parent / "runs" / "queue.json").write_text(state.model_dump_json())


def dead() -> ProcessId:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    found = ProcessId.of(process.pid)
    process.wait()
    return found


def living() -> tuple[subprocess.Popen[bytes], ProcessId]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    return process, ProcessId.of(process.pid)


# -- schedulers ------------------------------------------------------------------------------------------------------


def test_schedulers_that_start_at_once_over_a_stale_lock_start_every_run_once(study: Path, make: Any) -> None:
    runs = [make() for _ in range(4)]
    write_queue(study, QueueState(waiting=tuple(run.id for run in runs)))
    lock = study.parent / "runs" / "queue.lock"
    lock.write_text(Holder(process=dead(), user="somebody", since=now()).model_dump_json())
    schedulers = [
        subprocess.Popen([sys.executable, "-c", SCHEDULER, str(study)], env=environment()) for _ in range(3)
    ]
    assert [item.wait(90) for item in schedulers] == [0, 0, 0]
    assert [times_here(run) for run in runs] == [1, 1, 1, 1]
    assert {run.status for run in runs} == {"done"}
    assert not lock.exists()


class Killed(BaseException):
    """A kill of the scheduler in that very moment, as far as the files can tell."""


def test_killed_before_the_worker_was_started(study: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(run: RunFolder) -> Any:
        raise Killed

    run = make()
    with Queue(study, too_early) as queue:
        queue.add(run)
        with pytest.raises(Killed):
            queue.tick()
    with Queue(study, never) as queue:  # it may still be on its way
        queue.tick()
        assert queue.active is not None
    monkeypatch.setattr(queues, "START_SECONDS", 0.0)
    with Queue(study, start) as queue:
        drain(queue)
    assert (times_here(run), run.status, run.state.attempts) == (1, "done", 1)


def test_killed_after_the_worker_was_started(study: Path, make: Any) -> None:
    def too_late(run: RunFolder) -> Any:
        start(run)
        raise Killed

    run = make()
    with Queue(study, too_late) as queue:
        queue.add(run)
        with pytest.raises(Killed):
            queue.tick()
    with Queue(study, never) as queue:
        drain(queue)
    assert (times_here(run), run.status) == (1, "done")


def test_a_scheduler_whose_lock_was_deleted_by_hand_steps_back(study: Path, make: Any) -> None:
    with Queue(study, never) as first:
        (study.parent / "runs" / "queue.lock").unlink()
        with Queue(study, start) as second:
            assert second.scheduler
            second.add(make())
            second.tick()
            first.tick()
            assert not first.scheduler
            drain(second)


def test_the_lock_of_another_computer_makes_a_watcher_and_says_what_to_do(study: Path, make: Any) -> None:
    run = make()
    lock = study.parent / "runs" / "queue.lock"
    elsewhere = ProcessId(pid=1, started=0.0, host="another-computer")
    lock.write_text(Holder(process=elsewhere, user="somebody", since=now()).model_dump_json())
    with Queue(study, start) as queue:
        queue.add(run)
        for _ in range(3):
            queue.tick()
        assert not queue.scheduler
        assert not queue.idle
        assert run.status == "queued"
        assert queue.in_the_way is not None
        assert "another-computer" in queue.in_the_way.message
        assert "delete queue.lock" in queue.in_the_way.hint
        lock.unlink()
        drain(queue)  # the order that was left is not lost
    assert times_here(run) == 1


# -- processes and clocks --------------------------------------------------------------------------------------------


def test_a_foreign_pid_in_state_json_is_no_worker(study: Path, make: Any) -> None:
    process, known = living()
    try:
        for other in (
            known.model_copy(update={"token": "another-boot:1"}),
            known.model_copy(update={"token": "", "started": known.started - 1000}),
        ):
            run = make()
            run.write_state(State(status="running", updated="", process=other, attempts=1))
            assert run.status == "interrupted"
            write_queue(study, QueueState(active=Active(run=run.id, process=other, attempt=1)))
            with Queue(study, start) as queue:
                assert queue.active is None
                assert run.state.status == "interrupted"
                queue.add(run)
                drain(queue)
            assert run.status == "done"
        assert process.poll() is None  # and it was left alone
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell the start by the clock alone")
@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_worker_is_known_again_after_the_clock_was_set(study: Path, make: Any, jump: int) -> None:
    run = make()
    process, known = living()
    try:
        moved = known.model_copy(update={"started": known.started + jump})
        run.write_state(State(status="running", updated="", process=moved, attempts=1))
        write_queue(study, QueueState(active=Active(run=run.id, process=moved, attempt=1, launched=time.time() + jump)))
        with Queue(study, never) as queue:
            queue.tick()
            assert queue.active is not None
            assert run.status == "running"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_start_that_a_wrong_clock_dates_elsewhere_is_not_waited_for(study: Path, make: Any, jump: int) -> None:
    run = make()
    write_queue(study, QueueState(active=Active(run=run.id, attempt=1, launched=time.time() + jump)))
    with Queue(study, start) as queue:
        drain(queue)
    assert times_here(run) == 1


def test_a_run_that_was_started_by_hand_is_adopted(study: Path, make: Any) -> None:
    run = make()
    process, known = living()
    run.write_state(State(status="running", updated="", process=known, attempts=1))
    with Queue(study, never) as queue:
        queue.add(run)
        queue.tick()
        assert queue.active is not None
        process.kill()
        process.wait()
        assert queue.tick() == {run.id: "interrupted"}


# -- files -----------------------------------------------------------------------------------------------------------


def test_half_a_line_in_the_events_hides_nothing_that_follows(study: Path, make: Any) -> None:
    run = make()
    run.events_path.write_text('{"time": 1, "kind": "epoch", "epoch": 7}\n{"time": 2, "kind": "ep')
    assert (run.last("epoch") or {})["epoch"] == 7
    with Queue(study, lambda _run: subprocess.Popen([sys.executable, "-S", "-c", ""])) as queue:
        queue.add(run)
        drain(queue)
    error = run.last("error") or {}
    assert (error["code"], error["where"]["log"]) == ("run.not_started", "log.txt")
    assert [event["kind"] for event in run.events()[0]] == ["epoch", "error", "state"]
    assert "run.not_started" in run.log_path.read_text()


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"status": "dancing", "updated": ""}', "\x00" * 64],
    ids=["empty", "half", "unknown", "zeros"],
)
def test_a_damaged_state_costs_neither_the_run_nor_the_queue(study: Path, make: Any, text: str) -> None:
    first, second = make(), make()
    with Queue(study, start) as queue:
        queue.add(first)
        queue.add(second)
        (first.path / "state.json").write_text(text)
        drain(queue)
        assert second.status == "done"
    # Of a run that was active: its worker is gone, and what it said last cannot be read.
    write_queue(study, QueueState(active=Active(run=first.id, process=dead(), attempt=3)))
    with Queue(study, start) as queue:
        assert (first.status, first.state.attempts) == ("interrupted", 3)
        queue.add(first)
        drain(queue)
    assert first.status == "done"


def test_left_overs_of_writes_and_orders_that_are_none_do_no_harm(study: Path, make: Any) -> None:
    run = make()
    orders = study.parent / "runs" / ".orders"
    orders.mkdir()
    (orders / "1.json").write_text('{"do": "add", "run": ')
    (orders / "2.json").write_text('{"do": "dance"}')
    (orders / "3.json").write_text('{"do": "hold", "run": "nobody"}')
    (orders / ".4.json.77.tmp").write_text('{"do": "ad')
    (study.parent / "runs" / ".queue.json.77.tmp").write_text('{"wait')
    (orders / "5.json").write_text(json.dumps({"do": "add", "run": run.id}))
    with Queue(study, start) as queue:
        assert queue.state.waiting == (run.id,)
        assert not list(orders.glob("*.json"))
        drain(queue)
    assert run.status == "done"


def test_a_full_disk_starts_nothing_that_is_not_written_down(
    study: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    with Queue(study, start) as queue:
        queue.add(run)
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr("headless.files.os.replace", full)
            for _ in range(2):
                with pytest.raises(MosaicError) as caught:
                    queue.tick()
                assert caught.value.code == "disk.full"
        assert run.status == "queued"
        assert queue.state.waiting == (run.id,)
        drain(queue)
    assert times_here(run) == 1


def test_a_folder_that_can_only_be_read_can_be_watched(
    study: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    write_queue(study, QueueState(waiting=(run.id,), held=(run.id,)))

    def refused(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("headless.lock.os.open", refused)
    with Queue(study, never) as queue:
        queue.tick()
        assert queue.obstacles() == {run.id: "held"}
        assert not queue.scheduler
