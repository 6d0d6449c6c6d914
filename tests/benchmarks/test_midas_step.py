"""Seconds a training step of MIDAS: sparse minibatches against the same cells from a dense matrix and a DataLoader.

Prints a ratio measured in this run; run by ``make bench``. The dense side trains the same network on the same cells,
but holds every cell dense, makes dense minibatches and gives the first layer dense input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from headless.data.minibatch import Minibatch, MinibatchMaker, TileRows
from headless.data.mosaic import Layout, Mosaic
from headless.data.samplers import OneBatchSampler
from headless.data.simulate import simulate
from headless.models.blocks import SparseLinear
from headless.models.midas.config import MidasConfig
from headless.models.midas.module import Midas

STEPS, SIZE = 24, 256


def dense_minibatches(mosaic: Mosaic) -> Iterator[Minibatch]:
    """Dense rows through one DataLoader a batch, as a notebook would do it."""
    loaders = []
    for code, batch in enumerate(mosaic.batches):
        held = {
            m: torch.from_numpy(t.source.all_rows().to_scipy().toarray())
            for (b, m), t in mosaic.tiles.items()
            if b == batch
        }
        loader = DataLoader(TensorDataset(*held.values()), batch_size=SIZE, shuffle=True, drop_last=True)
        loaders.append((code, list(held), loader))
    while True:
        for code, names, loader in loaders:
            rows = next(iter(loader))
            x = {}
            for name, dense in zip(names, rows, strict=True):
                sparse = dense.to_sparse_csr()
                columns = sparse.col_indices().to(torch.int32)
                x[name] = TileRows(None, sparse.crow_indices(), columns, sparse.values(), dense.shape[1], None)
            yield Minibatch(torch.arange(SIZE), torch.full((SIZE,), code), x, code)


def sparse_minibatches(mosaic: Mosaic) -> Iterator[Minibatch]:
    codes = mosaic.batch_codes
    sampler = OneBatchSampler([np.flatnonzero(codes == c) for c in range(len(mosaic.batches))], SIZE, 0)
    maker, epoch = MinibatchMaker(mosaic), 0
    while True:
        yield from maker.stream(sampler.plan(epoch))
        epoch += 1


def seconds_per_step(mosaic: Mosaic, stream: Iterator[Minibatch]) -> tuple[float, float]:
    """Median seconds of a step, and the share of it that made the minibatch."""
    torch.manual_seed(0)
    module = Midas(MidasConfig(), Layout.of(mosaic)).train()
    made = {n: AdamW(list(s.parameters), lr=s.lr, fused=True) for n, s in module.optimizers().items()}
    times, loading = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = next(stream)
        loading.append(time.perf_counter() - start)
        for update in module.training_step(batch):
            made[update.optimizer].zero_grad(set_to_none=True)
            torch.stack(list(update.terms.values())).sum().backward()
            made[update.optimizer].step()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), float(np.median(loading) / np.median(times))


@pytest.mark.benchmark
def test_sparse_against_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    mosaic = simulate(1600, n_genes=2000, n_proteins=60, n_peaks=3000).to_mosaic()
    sparse, share = seconds_per_step(mosaic, sparse_minibatches(mosaic))
    monkeypatch.setattr(SparseLinear, "sparse_below", 0.0)
    dense, dense_share = seconds_per_step(mosaic, dense_minibatches(mosaic))
    # Loading may never be what a step waits for; the ratio itself is printed, not asserted.
    assert share < 0.5
    print(f"\nMIDAS step, {SIZE} cells: sparse {sparse * 1e3:.0f} ms ({share:.1%} loading), "
          f"dense {dense * 1e3:.0f} ms ({dense_share:.1%} loading), ratio {sparse / dense:.2f}")  # fmt: skip
