"""The queue: one after the other, and right again whenever it is taken up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headless import project as projects
from headless.errors import MosaicError
from headless.jobs.launch import environment
from headless.jobs.queue import Launcher, Queue
from headless.jobs.runfolder import RunFolder
from headless.lock import ProcessId
from headless.project import Experiment

#: A worker that writes the states of a real one and obeys a file instead of a model.
WORKER = """
import sys, time, pathlib
from headless.jobs.runfolder import RunFolder
from headless.lock import ProcessId
run = RunFolder(sys.argv[1])
state = run.state
state = state.model_copy(update=dict(status='running', process=ProcessId.of(), attempts=state.attempts + 1))
run.write_state(state)
while not (run.path / 'end').exists():
    time.sleep(0.02)
run.write_state(state.model_copy(update=dict(status=(run.path / 'end').read_text(), process=None)))
"""


def fake(script: str = WORKER) -> Launcher:
    def start(run: RunFolder) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(run.path)], env=environment())

    return start


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    projects.new(path)
    return path


def make(study: Path, name: str) -> RunFolder:
    return RunFolder.create(study, projects.load(study), Experiment(name=name))


def until(condition: Callable[[], object], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def end(run: RunFolder, status: str = "done") -> None:
    (run.path / "end.part").write_text(status)
    (run.path / "end.part").rename(run.path / "end")


def test_one_run_after_the_other(study: Path) -> None:
    first, second = make(study, "first"), make(study, "second")
    with Queue(study, fake()) as queue:
        queue.add(first)
        queue.add(second)
        queue.add(first)  # stands there already
        assert queue.tick() == {}
        assert until(lambda: first.status == "running")
        assert queue.tick() == {}
        assert second.status == "queued"
        end(first)
        assert until(lambda: queue.tick() == {"first-1": "done"})
        assert until(lambda: second.status == "running")
        end(second, "failed")
        assert until(lambda: queue.tick() == {"second-1": "failed"})
        assert queue.idle


def test_a_queue_that_was_left_finds_its_worker_again(study: Path) -> None:
    run = make(study, "first")
    with Queue(study, fake()) as queue:
        queue.add(run)
        queue.tick()
    assert until(lambda: run.status == "running")
    with Queue(study, fake("raise SystemExit('never started twice')")) as queue:
        queue.add(run)
        assert queue.tick() == {}
        assert queue.active is not None
        assert queue.active.id == run.id
        end(run)
        assert until(lambda: queue.tick() == {"first-1": "done"})


def test_a_killed_worker_is_interrupted_and_goes_on_when_asked(study: Path) -> None:
    run = make(study, "first")
    with Queue(study, fake()) as queue:
        queue.add(run)
        queue.tick()
        assert until(lambda: run.status == "running")
        process = run.state.process
        assert process is not None
        os.kill(process.pid, 9)
        assert until(lambda: queue.tick() == {"first-1": "interrupted"})
        assert json.loads((run.path / "state.json").read_text())["status"] == "interrupted"
        run.ask("pause")
        queue.add(run)
        queue.tick()
        assert run.wish() is None  # the wish was for the worker before
        assert until(lambda: run.state.attempts == 2)
        end(run)
        assert until(lambda: queue.tick() == {"first-1": "done"})


def test_a_run_that_ended_while_nobody_looked_can_be_added_again(study: Path) -> None:
    run = make(study, "first")
    with Queue(study, fake()) as queue:
        queue.add(run)
        queue.tick()
    assert until(lambda: run.status == "running")
    end(run, "paused")
    assert until(lambda: run.status == "paused")
    (run.path / "end").unlink()
    process = json.loads((run.path.parent / "queue.json").read_text())["active"]["process"]
    assert until(lambda: not ProcessId(**process).alive)
    with Queue(study, fake()) as queue:
        assert queue.active is None
        queue.add(run)
        queue.tick()
        assert until(lambda: run.status == "running")
        end(run)
        assert until(lambda: queue.tick() == {"first-1": "done"})


def test_a_run_folder_deleted_by_hand_does_not_block_the_queue(study: Path) -> None:
    first, second = make(study, "first"), make(study, "second")
    with Queue(study, fake()) as queue:
        queue.add(first)
        queue.tick()
        assert until(lambda: first.status == "running")
        end(first)
        assert until(lambda: first.status == "done")
        shutil.rmtree(first.path)
        queue.add(second)
        assert until(lambda: second.status == "running" or queue.tick())
        end(second)
        assert until(lambda: queue.tick() == {"second-1": "done"})


def test_a_worker_that_never_began_is_a_failure_and_not_a_circle(study: Path) -> None:
    run = make(study, "first")
    with Queue(study, fake("raise SystemExit(1)")) as queue:
        queue.add(run)
        queue.tick()
        assert until(lambda: queue.tick() == {"first-1": "failed"})
        assert queue.idle
    assert run.state.error is not None
    assert run.state.error["code"] == "run.not_started"


def test_of_two_queues_one_watches_and_takes_over_when_the_other_has_gone(study: Path) -> None:
    first, second = make(study, "first"), make(study, "second")
    with Queue(study, fake()) as queue:
        queue.add(first)
        queue.tick()
        with Queue(study, fake()) as watcher:
            assert queue.scheduler
            assert not watcher.scheduler
            assert watcher.in_the_way is not None
            assert str(os.getpid()) in watcher.in_the_way.message
            watcher.add(second)
            watcher.hold(second.id)
            assert watcher.state.waiting == (second.id,)  # as it will be
            assert queue.state.waiting == ()
            watcher.tick()
            assert second.status == "queued"  # a watcher starts nothing
            queue.tick()
            assert (queue.state.waiting, queue.state.held) == ((second.id,), (second.id,))
            assert watcher.settle(5)
            with pytest.raises(MosaicError, match="does not wait"):
                watcher.hold("third-1")
            assert until(lambda: first.status == "running")
            end(first)
            assert until(lambda: queue.tick() == {first.id: "done"})
            assert watcher.tick() == {first.id: "done"}
            queue.__exit__()
            watcher.release(second.id)
            watcher.tick()
            assert watcher.scheduler
            assert until(lambda: second.status == "running")
            end(second)
            assert until(lambda: watcher.tick() == {second.id: "done"})


def test_a_scheduler_carries_out_what_others_ask_for_and_is_not_kept_by_it(study: Path) -> None:
    first, second, old = make(study, "first"), make(study, "second"), make(study, "old")
    with Queue(study, fake()) as queue, Queue(study, fake()) as watcher:
        queue.add(old)
        queue.add(first)
        queue.serve = {first.id}
        watcher.add(second)
        watcher.serve = {second.id}
        queue.tick()
        assert not watcher.idle
        assert until(lambda: first.status == "running")
        end(first)
        assert until(lambda: queue.tick() == {first.id: "done"})
        assert queue.active is not None
        assert queue.active.id == second.id
        assert queue.idle
        queue.__exit__()
        watcher.tick()
        assert not watcher.idle
        assert until(lambda: second.status == "running")
        end(second)
        assert until(lambda: watcher.tick() == {second.id: "done"})
        assert watcher.idle
        assert watcher.state.waiting == (old.id,)


def test_a_watcher_is_refused_what_makes_no_sense_at_once(study: Path) -> None:
    run = make(study, "first")
    with Queue(study, fake()) as queue, Queue(study) as watcher:
        queue.add(run)
        queue.tick()
        assert until(lambda: run.status == "running")
        watcher.tick()
        for call, code in (
            (lambda: watcher.remove("first-1"), "run.active"),
            (lambda: watcher.remove("frist-1"), "usage.unknown_run"),
            (lambda: watcher.undo("frist-1"), "usage.not_in_trash"),
            (lambda: watcher.move("first-1", 0), "run.not_waiting"),
        ):
            with pytest.raises(MosaicError) as caught:
                call()
            assert caught.value.code == code
        assert not list(study.parent.glob("runs/.orders/*"))
        end(run)
        assert until(lambda: queue.tick())


@pytest.mark.parametrize(("serve", "paused"), [(None, True), ({"first-1"}, True), ({"second-1"}, False)])
def test_ctrl_c_pauses_only_what_was_asked_for_here(study: Path, serve: set[str] | None, paused: bool) -> None:
    from headless.commands.follow import _pause

    first, second = make(study, "first"), make(study, "second")
    with Queue(study, fake()) as queue:
        queue.add(first)
        queue.add(second)
        queue.tick()
        assert until(lambda: first.status == "running")
        queue.serve = serve
        _pause(queue)
        assert (first.wish() is not None) == paused
        assert queue.idle == (not paused)
        end(first, "paused")
        assert until(lambda: queue.tick())
        assert queue.idle
        assert queue.state.waiting == (second.id,)  # it keeps its place
        assert second.status == "queued"


def test_a_damaged_queue_file_loses_the_order_alone(study: Path) -> None:
    run = make(study, "first")
    (run.path.parent / "queue.json").write_text('{"waiting": ["fir', encoding="utf-8")
    with Queue(study) as queue:
        assert queue.idle
    assert run.status == "queued"


def test_workers_inherit_nothing_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QT_PLUGIN_PATH", "PYTHONSTARTUP", "_MEIPASS2"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    values = environment()
    assert not {"QT_PLUGIN_PATH", "PYTHONSTARTUP", "_MEIPASS2"} & set(values)
    assert values["CUDA_VISIBLE_DEVICES"] == "1"
