"""Failures that the queue answers by itself when asked to, and sweeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headless import cli
from headless import project as projects
from headless.data.mosaic import Mosaic
from headless.errors import MosaicError
from headless.jobs import retry
from headless.jobs.queue import Queue
from headless.jobs.runfolder import RunFolder, State, list_runs
from headless.jobs.sweep import expand
from headless.jobs.worker import execute
from headless.project import Experiment

SMALL = {
    "data_hidden": 8, "trunk_hidden": [8], "chunk_hidden": [8], "chunk_out": 4, "dim_c": 4, "batch_size": 40,
    "max_epochs": 4, "checkpoint_every": 1, "lr": 0.003,
}  # fmt: skip

Make = Callable[..., RunFolder]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    projects.new(path)
    return path


@pytest.fixture
def make(study: Path, tiny_mosaic: Mosaic, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runs on the tiny mosaic, which is given instead of being read; scoring has tests of its own."""
    monkeypatch.setattr("headless.data.build.build_mosaic", lambda *args, **kwargs: tiny_mosaic)
    monkeypatch.setattr("headless.evaluate.score_run", lambda *args: {})
    project = projects.load(study)

    def make_run(settings: dict[str, Any] | None = None, **request: Any) -> RunFolder:
        experiment = Experiment(name="e", device="cpu", outputs=("embedding",), settings={**SMALL, **(settings or {})})
        return RunFolder.create(study, project, experiment, **request)

    return make_run


def here(run: RunFolder) -> subprocess.Popen[bytes]:
    """A worker inside the process of the test; what is given back ends at once."""
    execute(run.path)
    return subprocess.Popen([sys.executable, "-S", "-c", ""])


def carry_out(study: Path, run: RunFolder) -> list[tuple[str, str]]:
    """Run the queue until it is empty; what ended, and how."""
    ended: list[tuple[str, str]] = []
    with Queue(study, here) as queue:
        queue.serve = {run.id}
        queue.add(run)
        while not queue.idle:
            ended.extend(queue.tick().items())
            time.sleep(0.01)
    return ended


def diverges_at(monkeypatch: pytest.MonkeyPatch, step: int, above: float) -> None:
    """The rate is no number from a step on, where the configuration asks for more than ``above``."""
    from headless.train import loop

    before = loop.rate_factor

    def factor(config: Any, at: int, total: int) -> float:
        return float("nan") if at >= step and config.lr > above else before(config, at, total)

    monkeypatch.setattr(loop, "rate_factor", factor)


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    from headless.train import loop

    before = loop._Trainer._epoch

    def epoch(self: Any) -> str | None:
        if self.config.batch_size > cells:
            raise MemoryError
        return before(self)

    monkeypatch.setattr(loop._Trainer, "_epoch", epoch)


def test_out_of_memory_is_tried_again_with_half_the_minibatch_until_it_fits(
    study: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(monkeypatch, 10)
    run = make(on_failure=("memory",))
    assert carry_out(study, run) == [("e-1", "failed"), ("e-2", "failed"), ("e-3", "done")]
    last = retry.last_retry(run)
    assert last.id == "e-3"
    assert last.request.settings["batch_size"] == 10
    assert last.request.varied == {"batch_size": 10}
    assert last.request.origin == "e-2"
    assert "effective minibatch is smaller too" in last.request.reason
    # The failure itself is an event in words, with the place of the log.
    error = next(event for event in run.events()[0] if event["kind"] == "error")
    assert error["code"] == "memory.ram"
    assert "batch_size=20" in error["hint"]
    assert error["where"]["log"] == "log.txt"
    assert (run.path / error["where"]["log"]).exists()


@pytest.mark.parametrize("on_failure", [(), ("diverged",)])
def test_nothing_is_tried_again_unasked(
    study: Path, make: Make, monkeypatch: pytest.MonkeyPatch, on_failure: Any
) -> None:
    out_of_memory_above(monkeypatch, 10)
    run = make(on_failure=on_failure)
    assert carry_out(study, run) == [("e-1", "failed")]
    assert [item.id for item in list_runs(study)] == ["e-1"]


def test_there_is_an_end_to_trying(study: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 0)
    run = make({"batch_size": 7}, on_failure=("memory",))
    assert carry_out(study, run) == [("e-1", "failed"), ("e-2", "failed")]  # 7, 3: one cell is no minibatch
    diverges_at(monkeypatch, 0, above=0.0)
    out_of_memory_above(monkeypatch, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(retry, "MOST_RETRIES", 1)
        assert len(carry_out(study, make(on_failure=("diverged", "memory")))) == 2


def test_too_little_memory_for_reading_is_not_answered_by_a_smaller_minibatch(
    study: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("headless.data.build.build_mosaic", full)
    run = make(on_failure=("memory",))
    assert carry_out(study, run) == [("e-1", "failed")]
    with pytest.raises(MosaicError) as caught:
        retry.advised(run)
    assert caught.value.code == "run.no_advice"


def test_divergence_goes_back_to_the_last_good_checkpoint_with_a_smaller_rate(
    study: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = make({"max_epochs": 1})
    execute(probe.path)
    steps = int((probe.last("epoch") or {})["step"])  # of an epoch
    # The weights are spoilt by the last step of the second epoch: its checkpoint is written, but it is no good one.
    diverges_at(monkeypatch, 2 * steps - 1, above=0.002)
    run = make(on_failure=("diverged",))
    assert carry_out(study, run) == [(run.id, "failed"), ("e-3", "done")]
    assert run.state.error is not None
    assert run.state.error["code"] == "diverged.loss"
    again = retry.last_retry(run)
    assert again.request.start == f"{run.id}/step-{steps:09d}"
    assert again.request.settings["lr"] == pytest.approx(0.001)
    assert "diverged" in again.request.reason
    epochs = [event["epoch"] for event in again.events()[0] if event["kind"] == "epoch"]
    assert epochs == [2, 3, 4]
    weights = load_file(again.results / "model" / "weights.safetensors")
    assert all(np.isfinite(values).all() for values in weights.values())
    assert again.request.content != make({"lr": 0.001}).request.content  # another start, another result


def test_a_retry_that_was_made_but_not_queued_is_found_and_not_made_twice(make: Make) -> None:
    run = make(on_failure=("diverged",))
    for step, value in ((3, 1.0), (6, np.nan)):
        folder = run.checkpoints / f"step-{step:09d}"
        folder.mkdir(parents=True)
        save_file({"w": np.array([value], dtype=np.float32)}, folder / "weights.safetensors")
    assert retry.last_good(run) == run.checkpoints / "step-000000003"
    error = MosaicError("diverged.loss", "no number").as_dict()
    run.write_state(State(status="failed", updated="", attempts=1, error=error))
    made = retry.advised(run)
    assert [item.name for item in made.checkpoints.iterdir()] == ["step-000000003"]
    # A kill between the two steps leaves the folder without its checkpoint.
    (made.checkpoints / "step-000000003" / "weights.safetensors").unlink()
    (made.checkpoints / "step-000000003").rmdir()
    made.checkpoints.rmdir()
    assert retry.advised(run).id == made.id
    assert (made.checkpoints / "step-000000003" / "weights.safetensors").exists()


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_every_combination_with_what_tells_them_apart() -> None:
    base = Experiment(name="e", seed=4, settings={"dim_c": 4})
    found = expand(base, {"lr": [1e-3, 2e-3], "preset": ["fast"], "trunk_hidden": [[8], [8, 8]]}, seeds=2)
    assert len(found) == 8
    first, varied = found[0]
    assert varied == {"lr": 1e-3, "preset": "fast", "trunk_hidden": [8], "seed": 4}
    assert (first.seed, first.preset) == (4, "fast")
    assert first.settings == {"dim_c": 4, "lr": 1e-3, "trunk_hidden": [8]}
    assert {item["seed"] for _, item in found} == {4, 5}
    assert len({json.dumps(item) for _, item in found}) == 8
    assert expand(base, {}) == [(base, {})]


@pytest.mark.parametrize(
    ("values", "seeds"), [({"seed": [1]}, 2), ({"lr": []}, 1), ({"lr": list(range(6000))}, 1), ({"seed": ["x"]}, 1)]
)
def test_a_senseless_sweep_is_refused(values: dict[str, list[Any]], seeds: int) -> None:
    with pytest.raises(MosaicError) as caught:
        expand(Experiment(name="e"), values, seeds)
    assert caught.value.code == "usage.sweep"


def test_run_makes_the_runs_of_a_sweep_once(
    study: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headless.data.datasets import DatasetRef
    from headless.data.fingerprint import Fingerprint

    ref = DatasetRef(
        id="x", path="x", absolute="x", format="h5mu", fingerprint=Fingerprint(size=1, sha256="0"), matrices=()
    )
    experiment = Experiment(name="e", device="cpu", outputs=("embedding",), settings={**SMALL, "max_epochs": 1})
    project = projects.load(study).model_copy(update={"datasets": (ref,), "experiments": (experiment,)})
    monkeypatch.setattr(projects, "load", lambda *args, **kwargs: project)
    monkeypatch.setattr(Queue.__init__, "__defaults__", (here,))
    words = ["run", str(study), "--repeat", "2", "--sweep", "lr=1e-3,2e-3"]
    assert cli.main(words) == 0
    runs = list_runs(study)
    expected = [{"lr": lr, "seed": seed} for lr in (1e-3, 2e-3) for seed in (0, 1)]
    assert [run.request.varied for run in runs] == expected
    assert [(run.request.settings["lr"], run.request.seed) for run in runs] == [tuple(v.values()) for v in expected]
    assert {run.status for run in runs} == {"done"}
    assert cli.main(words) == 0
    assert len(list_runs(study)) == 4
    assert cli.main([*words, "--sweep", "lr=1e-3,3e-3"]) == 0  # the last word counts; two of the four are new
    assert len(list_runs(study)) == 6
    capsys.readouterr()
    assert cli.main(["status", str(study)]) == 0
    assert "lr = 0.002, seed = 1; epoch 1 of 1, loss" in capsys.readouterr().out
    assert cli.main(["run", str(study), "--sweep", "lrr=1,2"]) == 5
    assert "Did you mean 'lr'?" in capsys.readouterr().err
