"""Run by an interpreter that has scmidas 0.3.0: train a few epochs on an h5mu, print seconds a step and peak memory.

usage: python scmidas_step.py DATA.h5mu MINIBATCH STEPS_TO_SKIP EPOCHS
"""

import json
import os
import resource
import sys
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")
import lightning as L  # noqa: E402
import mudata  # noqa: E402
import torch  # noqa: E402
from scmidas.config import load_config  # noqa: E402
from scmidas.model import MIDAS  # noqa: E402


class Clock(L.Callback):
    """Seconds between the ends of steps: loading and training."""

    def __init__(self) -> None:
        self.times = []

    def on_train_batch_end(self, *args: object) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    path = sys.argv[1]
    size, skip, epochs = map(int, sys.argv[2:5])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data = mudata.read_h5mu(path)
    dims = {m: [data[m].n_vars] for m in data.mod}
    os.chdir(tempfile.mkdtemp())
    model = MIDAS.configure_data_from_mdata(
        load_config(), data, dims, batch_key="batch", batch_size=size, n_save=10_000
    )
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model)
    steps = sorted(b - a for a, b in zip(clock.times[skip:-1], clock.times[skip + 1 :], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": steps[len(steps) // 2], "steps": len(steps), "peak": peak}))


if __name__ == "__main__":
    main()
