"""Seconds a training step and peak memory of MIDAS against scmidas 0.3.0: same data, minibatch and threads, one run.

The original lives in an environment of its own: ``MOSAIC_PEERS`` names a folder that holds it as ``scmidas`` (made
with ``python -m venv $MOSAIC_PEERS/scmidas`` and ``pip install scmidas==0.3.0`` there). Both train in a process of
their own, one after the other, ours and theirs in turn; skipped where the peer or the real data are absent.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PEER = Path(__file__).parent / "peers" / "scmidas_step.py"
SKIP, EPOCHS = 5, 2


def ours(path: Path) -> dict[str, float]:
    """What the peer's script prints, of our MIDAS with the paper's settings, loop and all."""
    import resource
    import tempfile

    import torch

    from headless.data.build import build_mosaic
    from headless.data.mosaic import Layout
    from headless.data.preparation import Preparation
    from headless.data.propose import propose
    from headless.data.read import peek
    from headless.models import create
    from headless.models.midas.config import MidasConfig
    from headless.train.loop import fit

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dataset = propose(peek(path), path.parent, "batch")
    mosaic = build_mosaic([dataset], Preparation(), path.parent, lambda text: None)
    config = MidasConfig(max_epochs=EPOCHS)
    module = create("midas", config, Layout.of(mosaic))
    times: list[float] = []

    def clock() -> None:
        times.append(time.perf_counter())

    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        fit(module, mosaic, config, seed=0, device="cpu", checkpoints=Path(folder),
            emit=lambda kind, **fields: None, control=clock)  # fmt: skip
        steps = np.diff(times)[SKIP:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        profile.enable()
        fit(module, mosaic, config.model_copy(update={"max_epochs": 1}), seed=0, device="cpu",
            checkpoints=Path(folder) / "again", emit=lambda kind, **fields: None)  # fmt: skip
        profile.disable()
    stats = pstats.Stats(profile)
    total = sum(values[2] for values in stats.stats.values())  # type: ignore[attr-defined]
    loading = sum(
        values[3]
        for (file, _, name), values in stats.stats.items()  # type: ignore[attr-defined]
        if (Path(file).name, name) in {("minibatch.py", "make"), ("loop.py", "_look"), ("loop.py", "_obey")}
    )
    shapes = {m: len(table) for m, table in mosaic.features.items()}
    return {"seconds": float(np.median(steps)), "steps": len(steps), "peak": peak, "other": loading / total, **shapes}


def _run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.benchmark
def test_step_against_scmidas(shared_data: Path) -> None:
    peers = os.environ.get("MOSAIC_PEERS")
    python = Path(peers or "") / "scmidas" / "bin" / "python"
    if not peers or not python.exists():
        pytest.skip("MOSAIC_PEERS names no folder with an environment 'scmidas'; the module says how to make it")
    data = shared_data / "tasks" / "pbmc_mosaic.h5mu"
    rounds = [
        (_run([sys.executable, __file__, str(data)]), _run([str(python), str(PEER), str(data), str(SKIP), str(EPOCHS)]))
        for _ in range(2)
    ]
    mine, theirs = (min((pair[side] for pair in rounds), key=lambda r: r["seconds"]) for side in (0, 1))
    assert mine["steps"] > 10
    assert theirs["steps"] > 10
    print(
        f"\nMIDAS, {data.stem}, 256 cells, one thread: {mine['seconds'] * 1e3:.0f} ms a step and "
        f"{mine['peak'] / 2**30:.2f} GiB at most; scmidas {theirs['seconds'] * 1e3:.0f} ms and "
        f"{theirs['peak'] / 2**30:.2f} GiB; ratios {mine['seconds'] / theirs['seconds']:.2f} and "
        f"{mine['peak'] / theirs['peak']:.2f}; loading and reporting take {mine['other']:.1%} of our time"
    )


if __name__ == "__main__":
    print(json.dumps(ours(Path(sys.argv[1]))))
