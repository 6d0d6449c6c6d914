"""What masks in training buy: accuracy when 10 to 80 % of the features are missing at test time.

Two networks of scVAEIT that differ in nothing but the masks of training are asked for hidden genes. Prints both
curves; the one trained with masks must fall less and end higher. Run by ``make bench``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.evaluate.predict import only
from headless.evaluate.robustness import PROPORTIONS, score_gaps
from headless.models import create
from headless.models.scvaeit.config import ScVaeitConfig
from headless.train.loop import fit, seed_all

STEPS = 700


def planted(n: int = 1600, n_genes: int = 150, n_proteins: int = 15, rank: int = 5) -> Mosaic:
    """One batch of low-rank counts of RNA and protein."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, rank))
    names = [f"c{i}" for i in range(n)]
    cells = pd.DataFrame({"batch": "a", "barcode": names}, index=names)
    features, tiles = {}, {}
    for m, d, level in (("rna", n_genes, 0.0), ("adt", n_proteins, 2.0)):
        x = rng.poisson(np.exp(z @ rng.normal(0, 0.4, (rank, d)) + level)).astype(np.float32)
        features[m] = pd.DataFrame(index=[f"{m}{j}" for j in range(d)])
        tiles["a", m] = Tile("a", m, MemoryRows(sp.csr_matrix(x)), np.arange(n))
    return Mosaic(cells, ("a",), features, tiles)


def curve(training: Mosaic, test: Mosaic, folder: Path, **settings: Any) -> np.ndarray:
    """Pearson correlation over hidden genes and cells for each proportion of hidden genes."""
    config = ScVaeitConfig.make("fast", max_steps=STEPS, batch_size=256, **settings)
    seed_all(0)
    module = create("scvaeit", config, Layout.of(training))
    fit(module, training, config, seed=0, device="cpu", checkpoints=folder, emit=lambda kind, **fields: None)
    table = score_gaps(module, training, test, np.arange(test.n_cells), "rna", repeats=3)
    found = table.groupby("proportion")["pearson_feature"].mean()
    return found.reindex(PROPORTIONS).to_numpy()


def compare(mosaic: Mosaic, held: int, folder: Path, p_feat: float) -> tuple[np.ndarray, np.ndarray]:
    """Print the curves of both networks on the cells held back; with masks, then without."""
    order = np.random.default_rng(1).permutation(mosaic.n_cells)
    training, test = only(mosaic, np.sort(order[held:])), only(mosaic, np.sort(order[:held]))
    masked = curve(training, test, folder / "masked", p_feat=p_feat)
    plain = curve(training, test, folder / "plain", p_feat=0.0, visible_sets="all")
    print("\nhidden  with masks  without")
    for proportion, a, b in zip(PROPORTIONS, masked, plain, strict=True):
        print(f"{proportion:>6.0%}  {a:10.3f}  {b:7.3f}")
    print(f"lost from 10 to 80 %: {masked[0] - masked[-1]:.3f} with masks, {plain[0] - plain[-1]:.3f} without")
    return masked, plain


@pytest.mark.benchmark
def test_masks_make_the_curve_flat(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    masked, plain = compare(planted(), 400, tmp_path, p_feat=0.6)
    assert masked[0] - masked[-1] < plain[0] - plain[-1]
    assert masked[-1] > plain[-1]


@pytest.mark.benchmark
def test_masks_on_real_blood(shared_data: Path, tmp_path: Path) -> None:
    """RNA and protein of 10x PBMC: the network trained with masks predicts hidden genes better, however many are."""
    from headless.data.build import build_mosaic
    from headless.data.preparation import Preparation
    from headless.data.propose import propose
    from headless.data.read import peek

    torch.set_num_threads(1)
    file = shared_data / "pbmc10k_cite.h5mu"
    mosaic = build_mosaic([propose(peek(file), file.parent)], Preparation(n_top_genes=1000), file.parent, print)
    masked, plain = compare(mosaic, 1000, tmp_path, p_feat=0.5)
    assert masked[-1] > plain[-1]
