"""Workers and schedulers killed at random moments: no run is lost, none is done twice, the weights are the same.

``make test`` kills a few times, ``make faults`` two hundred times; ``MOSAIC_KILLS`` says how often, ``MOSAIC_SEED``
repeats a series.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headless import cli
from headless import project as projects
from headless.data.simulate import simulate
from headless.jobs.launch import environment, launch
from headless.jobs.runfolder import RunFolder

KILLS = int(os.environ.get("MOSAIC_KILLS", "3"))
SEED = int(os.environ.get("MOSAIC_SEED", "1"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 30 * KILLS)]

SETTINGS = {
    "max_epochs": 30, "checkpoint_every": 2, "batch_size": 16, "data_hidden": 8, "trunk_hidden": "[8]",
    "chunk_hidden": "[8]", "chunk_out": 4, "dim_c": 4,
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    files = simulate(160, n_genes=60, n_proteins=10, n_peaks=0, pattern={"a": ("rna", "adt"), "b": ("rna",)}).write(
        tmp_path
    )
    path = tmp_path / "study.mosaic"
    data = [word for file in files for word in ("--data", str(file))]
    assert cli.main(["new", str(path), *data, "--batch", "batch", "--label", ""]) == 0
    options = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    assert cli.main(["add", str(path), "--name", "e", "--outputs", "embedding", "--device", "cpu", *options]) == 0
    return path


def new_run(study: Path) -> RunFolder:
    project = projects.load(study)
    return RunFolder.create(study, project, project.experiment("e"))


def scheduler(study: Path) -> subprocess.Popen[bytes]:
    """``resume``: whatever waits, was interrupted or still runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "headless", "resume", str(study)], env=environment(), cwd=study.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def worker_of(run: RunFolder) -> int | None:
    state = run.state
    alive = state.status == "running" and state.process is not None and state.process.alive
    return state.process.pid if alive and state.process is not None else None


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


def weights(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = load_file(run.results / "model" / "weights.safetensors")
    return found


def test_random_kills_cost_nothing_but_time(study: Path) -> None:
    undisturbed = new_run(study)
    start = time.monotonic()
    assert launch(undisturbed).wait(120) == 0
    longest = time.monotonic() - start
    moments = random.Random(SEED)
    killed: Counter[str] = Counter()
    runs = [new_run(study), new_run(study)]
    program = scheduler(study)
    while sum(killed.values()) < KILLS:
        if all(run.status == "done" for run in runs):
            runs += [new_run(study), new_run(study)]
        if program.poll() is not None:  # it went to its end, with what was interrupted left for another time
            program = scheduler(study)
        time.sleep(moments.uniform(0, longest))
        victim = moments.choice(("worker", "scheduler", "both"))
        pids = [pid for run in runs if (pid := worker_of(run)) is not None]
        assert len(pids) <= 1, "two workers at once"
        if victim != "scheduler":
            if not pids:
                continue
            kill(pids[0])
        if victim != "worker":
            program.kill()
            program.wait()
        killed[victim] += 1
    for _ in range(4):  # a worker killed last leaves its run for the next resume
        assert program.wait(60 * len(runs)) in (0, 12, -9)
        if all(run.status == "done" for run in runs):
            break
        program = scheduler(study)
    print(f"\n{dict(killed)} kills over {len(runs)} runs, {sum(run.state.attempts for run in runs)} attempts")
    expected = weights(undisturbed)
    for run in runs:
        assert run.status == "done", run.state
        events = run.events()[0]
        begun = [event for event in events if event["kind"] == "state" and event["status"] == "running"]
        ended = [event for event in events if event["kind"] == "state" and event["status"] == "done"]
        assert len(ended) == 1, "done twice"
        assert [event["attempt"] for event in begun] == list(range(1, run.state.attempts + 1)), "started side by side"
        found = weights(run)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{run.id}: {name}")
