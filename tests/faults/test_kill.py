"""A kill at any moment costs nothing but time: the run goes on and ends with the same numbers."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headless import cli
from headless import project as projects
from headless.data.simulate import simulate
from headless.jobs.launch import environment, launch
from headless.jobs.runfolder import RunFolder, find_run
from headless.lock import ProcessId

pytestmark = pytest.mark.slow

EPOCHS = 25
SETTINGS = {
    "max_epochs": EPOCHS, "checkpoint_every": 3, "batch_size": 16, "data_hidden": 8, "trunk_hidden": "[8]",
    "chunk_hidden": "[8]", "chunk_out": 4, "dim_c": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with simulated files and an experiment without labels or holdout, so that scoring is quick."""
    folder = tmp_path_factory.mktemp("kill")
    files = simulate(160, n_genes=60, n_proteins=10, n_peaks=60, pattern={"a": ("rna", "adt"), "b": ("rna",)}).write(
        folder
    )
    path = folder / "study.mosaic"
    data = [word for file in files for word in ("--data", str(file))]
    assert cli.main(["new", str(path), *data, "--batch", "batch", "--label", ""]) == 0
    return path


def add(study: Path, name: str) -> None:
    options = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    arguments = ["--name", name, "--outputs", "embedding", "--device", "cpu", "--seed", "3"]
    assert cli.main(["add", str(study), *arguments, *options]) == 0


def new_run(study: Path, name: str) -> RunFolder:
    add(study, name)
    project = projects.load(study)
    return RunFolder.create(study, project, project.experiment(name))


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened for too long"
        time.sleep(0.005)


def epoch(run: RunFolder) -> int:
    event = run.last("epoch")
    return int(event["epoch"]) if event else 0


def finish(run: RunFolder) -> None:
    assert launch(run).wait(120) == 0
    assert run.status == "done"


def weights(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = load_file(run.results / "model" / "weights.safetensors")
    return found


def test_killed_twice_and_resumed_the_weights_are_those_of_an_undisturbed_run(study: Path) -> None:
    undisturbed, run = new_run(study, "undisturbed"), new_run(study, "disturbed")
    finish(undisturbed)
    # Kill -9 at some step in the middle.
    worker = launch(run)
    until(lambda: epoch(run) >= 5 or worker.poll() is not None)
    time.sleep(random.uniform(0, 0.1))
    worker.send_signal(signal.SIGKILL)
    assert worker.wait(60) == -signal.SIGKILL
    assert run.status == "interrupted"
    reached = epoch(run)
    assert 5 <= reached < EPOCHS
    # Go on, and be asked to end: a checkpoint is written and nothing at all is lost.
    worker = launch(run)
    until(lambda: epoch(run) > reached + 2 or worker.poll() is not None)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 12
    assert run.status == "interrupted"
    assert "SIGTERM" in run.state.remark
    assert epoch(run) < EPOCHS
    # Go on to the end.
    finish(run)
    assert run.state.attempts == 3
    expected, found = weights(undisturbed), weights(run)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    latents = "latents/joint.c.npy"
    np.testing.assert_array_equal(np.load(run.results / latents), np.load(undisturbed.results / latents))


def command(study: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "headless", *arguments], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=study.parent,
    )  # fmt: skip


def test_the_run_outlives_the_program_that_started_it_and_is_found_again(study: Path) -> None:
    add(study, "orphan")
    starter = command(study, "run", str(study), "--only", "orphan")
    until(lambda: starter.poll() is not None or _running(study, "orphan"))
    run = find_run(study, "orphan")
    process = run.state.process
    assert process is not None
    starter.kill()
    starter.communicate(timeout=30)
    assert process.alive
    again = command(study, "run", str(study), "--only", "orphan")
    said, faults = again.communicate(timeout=120)
    assert again.returncode == 0, faults
    assert "[orphan-1]" in said
    assert run.status == "done"
    assert run.state.attempts == 1  # followed to its end, not started a second time


def test_ctrl_c_saves_and_pauses_and_says_how_to_go_on(study: Path) -> None:
    add(study, "interrupted")
    program = command(study, "run", str(study), "--only", "interrupted")
    until(lambda: program.poll() is not None or (_running(study, "interrupted") and epoch(_run(study)) >= 2))
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 12
    run = _run(study)
    assert run.status == "paused"
    assert "mosaic-headless resume" in said
    reached = epoch(run)
    assert reached < EPOCHS
    assert cli.main(["resume", str(study), "--run", "interrupted"]) == 0
    assert run.status == "done"
    first_after = next(event for event in run.events()[0] if event["kind"] == "epoch" and event["epoch"] > reached)
    assert first_after["epoch"] == reached + 1  # nothing was trained twice


def test_a_second_program_puts_its_runs_into_the_queue_of_the_first_and_goes_on_alone(study: Path) -> None:
    add(study, "mine")
    add(study, "yours")
    first = command(study, "run", str(study), "--only", "mine")
    until(lambda: first.poll() is not None or _running(study, "mine"))
    second = command(study, "run", str(study), "--only", "yours")
    said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    watched = second.communicate(timeout=120)
    assert second.returncode == 0, watched
    assert "put into its queue and watched" in watched[1]
    assert "[yours-1] done" in watched[0]
    for name in ("mine", "yours"):
        run = find_run(study, name)
        assert (run.status, run.state.attempts) == ("done", 1)


def _run(study: Path) -> RunFolder:
    return find_run(study, "interrupted")


def _running(study: Path, name: str) -> bool:
    if not (study.parent / "runs" / f"{name}-1" / "run.json").exists():
        return False
    run = find_run(study, name)
    state = run.state
    return run.status == "running" and state.process is not None and state.process != ProcessId.of()
