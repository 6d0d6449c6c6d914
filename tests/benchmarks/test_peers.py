"""Seconds a training step and peak memory of our methods against their originals: same data, minibatch and threads.

The originals live in environments of their own: ``MOSAIC_PEERS`` names a folder that holds ``scmidas`` (``python -m
venv $MOSAIC_PEERS/scmidas``, then ``pip install scmidas==0.3.0`` there) and ``scvaeit`` (``scVAEIT==1.1.1`` and mudata,
with a TensorFlow before 2.16). Multigrate 1.0.1 asks for Python 3.12 and scMM was never released: they are not measured
here. Both sides train in processes of their own, in turn; skipped where a peer or the real data are absent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parent / "peers"
SKIP, EPOCHS = 5, 3


def _run(python: str, script: str, *arguments: object) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, str(PEERS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.benchmark
@pytest.mark.parametrize(("method", "peer", "size"), [("midas", "scmidas", 256), ("scvaeit", "scvaeit", 512)])
def test_step_against_the_original(shared_data: Path, method: str, peer: str, size: int) -> None:
    named = os.environ.get("MOSAIC_PEERS")
    python = Path(named or "") / peer / "bin" / "python"
    if not named or not python.exists():
        pytest.skip(f"MOSAIC_PEERS names no folder with an environment {peer!r}; the module says how to make it")
    data = shared_data / "tasks" / "pbmc_mosaic.h5mu"
    rounds = [
        (
            _run(sys.executable, "ours_step.py", method, data, size, SKIP, EPOCHS),
            _run(str(python), f"{peer}_step.py", data, size, SKIP, EPOCHS),
        )
        for _ in range(2)
    ]
    mine, theirs = (min((pair[side] for pair in rounds), key=lambda found: found["seconds"]) for side in (0, 1))
    assert mine["steps"] > 10
    assert theirs["steps"] > 10
    print(
        f"\n{method}, {data.stem}, {size} cells, one thread: {mine['seconds'] * 1e3:.0f} ms a step, "
        f"{mine['peak'] / 2**30:.2f} GiB at most; {peer} {theirs['seconds'] * 1e3:.0f} ms, "
        f"{theirs['peak'] / 2**30:.2f} GiB; ratios {mine['seconds'] / theirs['seconds']:.2f} and "
        f"{mine['peak'] / theirs['peak']:.2f}; {mine['other']:.1%} of our time is not arithmetic"
    )
