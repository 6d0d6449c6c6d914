"""Train one of our methods for a few epochs on an h5mu; print seconds a step, peak memory, and what is not arithmetic.

usage: python ours_step.py METHOD DATA.h5mu MINIBATCH STEPS_TO_SKIP EPOCHS
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from headless import models
from headless.data.build import build_mosaic
from headless.data.mosaic import Layout
from headless.data.preparation import Preparation
from headless.data.propose import propose
from headless.data.read import peek
from headless.train.loop import fit

#: What a step does besides arithmetic: making minibatches, looking at losses, obeying wishes, reporting.
OTHER = {("minibatch.py", "make"), ("loop.py", "_look"), ("loop.py", "_obey"), ("loop.py", "_record")}


def main(method: str, path: Path, size: int, skip: int, epochs: int) -> dict[str, float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dataset = propose(peek(path), path.parent, "batch")
    mosaic = build_mosaic([dataset], Preparation(), path.parent, lambda text: None)
    config = models.get(method).config.make(
        "paper", max_epochs=epochs, batch_size=size, patience=0, validation_fraction=0.0
    )
    module = models.create(method, config, Layout.of(mosaic))
    times: list[float] = []

    def train(epochs: int, folder: str, clock: bool) -> None:
        fit(module, mosaic, config.model_copy(update={"max_epochs": epochs}), seed=0, device="cpu",
            checkpoints=Path(folder), emit=lambda kind, **fields: None,
            control=lambda: times.append(time.perf_counter()) if clock else None)  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        train(epochs, f"{folder}/timed", clock=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        profile = cProfile.Profile()
        profile.runcall(train, 1, f"{folder}/profiled", False)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(values[2] for values in stats.values())
    other = sum(values[3] for (file, _, name), values in stats.items() if (Path(file).name, name) in OTHER)
    steps = np.diff(times)[skip:]
    return {"seconds": float(np.median(steps)), "steps": len(steps), "peak": peak, "other": other / total}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))))
