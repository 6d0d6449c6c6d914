"""The worker: phases in order, wishes obeyed, failures written down, nothing done twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headless import project as projects
from headless.data.holdout import Holdout
from headless.data.mosaic import Mosaic
from headless.errors import MosaicError
from headless.jobs.runfolder import RunFolder
from headless.jobs.worker import execute
from headless.project import Experiment
from headless.results import Results

SMALL = {"data_hidden": 8, "trunk_hidden": [8], "chunk_hidden": [8], "chunk_out": 4, "dim_c": 4, "batch_size": 25}

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Scoring is tested elsewhere and takes its time: here it only notes what it was given."""
    calls: list[dict[str, Any]] = []

    def note(folder: Path, truth: Mosaic, hidden: dict[str, Any]) -> dict[str, Any]:
        calls.append({"folder": folder, "truth": truth, "hidden": hidden})
        return {}

    monkeypatch.setattr("headless.evaluate.score_run", note)
    return calls


@pytest.fixture
def make(tmp_path: Path, tiny_mosaic: Mosaic, scored: list[Any], monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """A run on the tiny mosaic, which is given instead of being read from files."""
    monkeypatch.setattr("headless.data.build.build_mosaic", lambda *args, **kwargs: tiny_mosaic)
    project = projects.new(tmp_path / "study.mosaic")

    def make_run(epochs: int = 2, **changes: Any) -> RunFolder:
        settings = {**SMALL, "max_epochs": epochs, **changes.pop("settings", {})}
        changes = {"name": "e", "device": "cpu", "outputs": ("embedding",), **changes}
        return RunFolder.create(tmp_path / "study.mosaic", project, Experiment(settings=settings, **changes))

    return make_run


def kinds(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events()[0] if event["kind"] == kind]


def phases(run: RunFolder) -> list[str]:
    return [event["name"] for event in kinds(run, "phase") if event["event"] == "begin"]


def weights(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = load_file(run.results / "model" / "weights.safetensors")
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def wish_at(monkeypatch: pytest.MonkeyPatch, run: RunFolder, step: int, wish: Any) -> None:
    """Leave a wish while the worker is at a step of training, and let it look at once."""
    from headless.jobs import worker

    before = worker.Worker._control
    calls = 0

    def control(self: Any) -> str | None:
        nonlocal calls
        calls += 1
        if calls == step:
            run.ask(wish)
            self._looked = 0.0
        return before(self)

    monkeypatch.setattr(worker.Worker, "_control", control)


def test_the_phases_in_order_and_the_results_at_the_end(make: MakeRun, scored: list[Any]) -> None:
    run = make(holdout=Holdout(fraction=0.2, seed=1))
    assert execute(run.path) == 0
    assert run.status == "done"
    assert phases(run) == ["load", "build", "train", "decode", "score"]
    assert [event["status"] for event in kinds(run, "state")] == ["running", "done"]
    assert [event["epoch"] for event in kinds(run, "epoch")] == [1, 2]
    results = Results(run.path)
    assert results.n_cells == 200
    # Training and results never saw what was hidden; scoring gets the truth.
    hidden, truth = scored[0]["hidden"], scored[0]["truth"]
    assert set(hidden) == {"rna", "adt", "atac"}
    for modality, cells in hidden.items():
        assert truth.measured(modality)[cells].all()
        assert not results.measured(modality)[cells].any()
    assert "phase train" in run.log_path.read_text(encoding="utf-8")
    assert not (run.path / "worker.lock").exists()


def test_a_run_that_is_done_is_not_done_again(make: MakeRun) -> None:
    run = make()
    assert execute(run.path) == 0
    before = weights(run)
    assert execute(run.path) == 0
    assert run.state.attempts == 1
    assert same(weights(run), before)


def test_the_same_request_gives_the_same_weights(make: MakeRun) -> None:
    first, second, other = make(), make(), make(seed=1)
    for run in (first, second, other):
        assert execute(run.path) == 0
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_pause_and_resume_end_like_an_undisturbed_run(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    undisturbed, run = make(), make()
    assert execute(undisturbed.path) == 0
    with monkeypatch.context() as patch:
        wish_at(patch, run, step, "pause")
        assert execute(run.path) == 12
    assert run.status == "paused"
    assert not (run.results / "index.json").exists()
    assert execute(run.path) == 0
    assert run.status == "done"
    assert run.state.attempts == 2
    assert same(weights(run), weights(undisturbed))


def test_stopping_early_keeps_what_was_learnt(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(epochs=50)
    wish_at(monkeypatch, run, 10, "stop")
    assert execute(run.path) == 0
    assert run.status == "done"
    assert "stopped early" in run.state.remark
    assert len(kinds(run, "epoch")) < 10
    assert Results(run.path).n_cells == 200


def test_a_cancelled_run_has_no_results(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(epochs=50)
    wish_at(monkeypatch, run, 3, "cancel")
    assert execute(run.path) == 12
    assert run.status == "cancelled"
    assert not run.results.exists()


def test_a_wish_outside_training_is_obeyed_too(make: MakeRun) -> None:
    run = make()
    run.ask("pause")
    assert execute(run.path) == 12
    assert run.status == "paused"
    assert phases(run) in ([], ["load"])
    assert execute(run.path) == 0  # the wish was granted once and is not granted again


def test_a_failure_after_training_does_not_train_again(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()

    def damaged(*args: Any) -> None:
        raise MosaicError("disk.full", "Could not write the scores: the disk is full.", "Free some space.")

    with monkeypatch.context() as patch:
        patch.setattr("headless.evaluate.score_run", damaged)
        assert execute(run.path) == 9
    assert run.status == "failed"
    trained = weights(run)
    offset = run.events()[1]
    assert execute(run.path) == 0
    later = [event["name"] for event in run.events(offset)[0] if event["kind"] == "phase" and event["event"] == "begin"]
    assert later == ["load", "build", "decode", "score"]
    assert same(weights(run), trained)


def test_a_known_failure_is_written_down_with_its_hint(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*args: Any, **kwargs: Any) -> None:
        raise MosaicError("data.not_counts", "The values are no counts.", "Export raw counts.", file="a.h5mu")

    monkeypatch.setattr("headless.data.build.build_mosaic", bad)
    run = make()
    assert execute(run.path) == 3
    assert run.status == "failed"
    error = run.state.error
    assert error is not None
    assert (error["code"], error["hint"]) == ("data.not_counts", "Export raw counts.")
    assert error["where"] == {"file": "a.h5mu", "phase": "load", "log": "log.txt"}
    assert [event["code"] for event in kinds(run, "error")] == ["data.not_counts"]
    assert "error [data.not_counts]" in run.log_path.read_text(encoding="utf-8")


def test_a_bug_is_told_with_its_trace_in_the_log(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by an unlucky thing")

    monkeypatch.setattr("headless.data.build.build_mosaic", bug)
    run = make()
    assert execute(run.path) == 70
    assert run.state.error is not None
    assert run.state.error["code"] == "internal.bug"
    log = run.log_path.read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "ZeroDivisionError: by an unlucky thing" in log


def test_memory_errors_have_a_code_of_their_own(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("headless.data.build.build_mosaic", out_of_memory)
    assert execute(make().path) == 7


def test_a_method_that_cannot_train_says_why(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from headless.data.pattern import Verdict
    from headless.models.midas.config import MidasConfig

    verdict = Verdict(level="cannot", reasons=("no bridge",))
    monkeypatch.setattr(MidasConfig, "supports", classmethod(lambda cls, pattern: verdict))
    run = make()
    assert execute(run.path) == 5
    assert run.state.error is not None
    assert "no bridge" in run.state.error["message"]


def test_a_wish_for_a_gpu_is_never_answered_by_the_cpu(make: MakeRun) -> None:
    import torch

    missing = torch.cuda.device_count()
    run = make(device=f"cuda:{missing}")
    assert execute(run.path) == 6
    assert run.status == "failed"


def test_two_workers_never_share_a_run(make: MakeRun, monkeypatch: pytest.MonkeyPatch, tiny_mosaic: Mosaic) -> None:
    run = make()
    inside, release = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Mosaic:
        inside.set()
        release.wait(30)
        return tiny_mosaic

    monkeypatch.setattr("headless.data.build.build_mosaic", slow)
    codes: list[int] = []
    first = threading.Thread(target=lambda: codes.append(execute(run.path)))
    first.start()
    assert inside.wait(30)
    with pytest.raises(MosaicError) as caught:
        execute(run.path)
    release.set()
    first.join(60)
    assert caught.value.code == "run.already_running"
    assert codes == [0]


def test_a_full_disk_ends_the_run_in_words(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from headless.jobs.events import EventWriter

    run = make()
    before, count = EventWriter.emit, 0

    def full(self: EventWriter, kind: str, **fields: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise MosaicError("disk.full", "Could not write the events: the disk is full.", "Free some space.")
        before(self, kind, **fields)

    monkeypatch.setattr(EventWriter, "emit", full)
    assert execute(run.path) == 9
    assert run.status == "failed"


def test_asking_for_wishes_at_every_step_is_cheap(make: MakeRun) -> None:
    from headless.jobs.worker import Worker

    run = make()
    worker = Worker(run, run.writer())
    start = time.perf_counter()
    for _ in range(10_000):
        worker._control()
    assert time.perf_counter() - start < 0.5
