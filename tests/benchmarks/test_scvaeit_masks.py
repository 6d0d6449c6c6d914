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


@pytest.mark.benchmark
def test_masks_make_the_curve_flat(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    mosaic = planted()
    training, test = only(mosaic, np.arange(400, mosaic.n_cells)), only(mosaic, np.arange(400))
    masked = curve(training, test, tmp_path / "masked", p_feat=0.6)
    plain = curve(training, test, tmp_path / "plain", p_feat=0.0, visible_sets="all")
    print("\nhidden  with masks  without")
    for proportion, a, b in zip(PROPORTIONS, masked, plain, strict=True):
        print(f"{proportion:>6.0%}  {a:10.3f}  {b:7.3f}")
    lost, lost_plain = masked[0] - masked[-1], plain[0] - plain[-1]
    print(f"lost from 10 to 80 %: {lost:.3f} with masks, {lost_plain:.3f} without")
    assert lost < lost_plain
    assert masked[-1] > plain[-1]
