"""Run by an interpreter that has scVAEIT 1.1.1 (TensorFlow): train on an h5mu, print seconds a step and peak memory.

usage: python scvaeit_step.py DATA.h5mu MINIBATCH STEPS_TO_SKIP EPOCHS
"""

import contextlib
import io
import json
import os
import resource
import sys
import time
import warnings

warnings.filterwarnings("ignore")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import mudata  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from scVAEIT.VAEIT import VAEIT  # noqa: E402


def matrices(path: str) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """Log-normalised dense values of all modalities, masks of the batches (-1 = missing), sizes, batch codes."""
    data = mudata.read_h5mu(path)
    batch = np.asarray(data.obs["batch"].astype(str))
    names, codes = np.unique(batch, return_inverse=True)
    blocks, sizes, masks = [], [], []
    for m in ("rna", "adt"):
        part = data[m]
        x = np.zeros((data.n_obs, part.n_vars), dtype=np.float32)
        rows = data.obs_names.get_indexer(part.obs_names)
        counts = np.asarray(part.X.todense() if hasattr(part.X, "todense") else part.X)
        x[rows] = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
        here = np.zeros(data.n_obs, dtype=bool)
        here[rows] = True
        blocks.append(x)
        sizes.append(part.n_vars)
        measured = [here[codes == code].any() for code in range(len(names))]
        masks.append(np.stack([np.full(part.n_vars, 0.0 if found else -1.0) for found in measured]))
    return np.concatenate(blocks, 1), np.concatenate(masks, 1).astype(np.float32), sizes, codes


def main() -> None:
    path = sys.argv[1]
    size, epochs = int(sys.argv[2]), int(sys.argv[4])
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    x, masks, sizes, codes = matrices(path)
    config = {
        "dim_input_arr": sizes, "dimensions": [256], "dim_latent": 32, "dim_block_enc": [256, 128],
        "dim_block_dec": [256, 128], "dim_block_embed": [32, 16], "dist_block": ["NB", "NB"], "beta_unobs": 2 / 3,
        "uni_block_names": ["rna", "adt"], "block_names": ["rna", "adt"], "beta_modal": np.array([0.15, 0.85]),
    }  # fmt: skip
    times = []
    with contextlib.redirect_stdout(io.StringIO()):
        model = VAEIT(config, x, masks, id_dataset=codes)
        for rounds in (1, 1 + epochs):
            start = time.perf_counter()
            model.train(valid=False, num_epoch=rounds, batch_size=size, save_every_epoch=None, verbose=False)
            times.append(time.perf_counter() - start)
    steps = -(-len(x) // size)
    # Every call traces the graph anew: the difference of a long and a short one is the time of the epochs alone.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": (times[1] - times[0]) / (steps * epochs), "steps": steps * epochs, "peak": peak}))


if __name__ == "__main__":
    main()
