from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data import features
from headless.data.features import GeneTile
from headless.data.preparation import Preparation
from headless.data.sources import MemoryRows


def counts(n_cells: int, n_genes: int, seed: int, variable: int = 0) -> np.ndarray:
    """Poisson counts; the first ``variable`` genes differ between two halves of the cells, the others do not."""
    random = np.random.default_rng(seed)
    rate = np.tile(random.gamma(2.0, 1.5, n_genes), (n_cells, 1))
    rate[: n_cells // 2, :variable] *= 6
    return random.poisson(rate).astype(np.float32)


def tile(name: str, values: np.ndarray, mask: np.ndarray | None = None) -> GeneTile:
    mask = np.ones(values.shape[1], dtype=bool) if mask is None else mask
    return GeneTile(name, MemoryRows(sp.csr_matrix(values * mask)), mask)


def test_with_equal_panels_the_choice_is_that_of_scanpy() -> None:
    import anndata as ad
    import scanpy as sc

    batches = [counts(150, 200, seed, variable=30) for seed in (1, 2, 3)]
    mine, _ = features.variable_genes([tile(str(i), b) for i, b in enumerate(batches)], np.arange(200), 40)
    obs = pd.DataFrame({"b": np.repeat(list("xyz"), 150)}, index=[str(i) for i in range(450)])
    together = ad.AnnData(sp.csr_matrix(np.vstack(batches)), obs=obs)
    theirs = sc.pp.highly_variable_genes(
        together, flavor="seurat_v3_paper", n_top_genes=40, batch_key="b", inplace=False
    )
    # Where several genes tie at the last place, either may be taken.
    assert len(set(mine) & set(np.flatnonzero(theirs["highly_variable"]))) >= 39


@pytest.mark.parametrize("flavor", ["seurat_v3", "polynomial"])
def test_genes_that_differ_between_cells_are_found(flavor: str) -> None:
    tiles = [tile("a", counts(200, 300, 1, variable=40)), tile("b", counts(160, 300, 2, variable=40))]
    chosen, notes = features.variable_genes(tiles, np.arange(300), 40, flavor)
    assert (chosen < 40).sum() >= 38
    assert notes == []


def test_a_parabola_stands_in_where_loess_fails_and_it_is_told() -> None:
    tiny = tile("tiny", counts(2, 60, 0))
    chosen, notes = features.variable_genes([tiny], np.arange(60), 10)
    assert len(chosen) == 10
    assert "tiny" in notes[0]


def test_a_batch_ranks_only_what_it_measured() -> None:
    values = counts(200, 100, 3, variable=20)
    mask = np.arange(100) >= 10
    masked, _ = features.variable_genes([tile("a", values, mask)], np.arange(100), 20)
    alone, _ = features.variable_genes([tile("a", values[:, 10:])], np.arange(90), 20)
    assert masked.tolist() == (alone + 10).tolist()


def test_genes_that_are_variable_in_most_batches_come_first() -> None:
    tiles = [tile(str(seed), counts(400, 100, seed, variable=10)) for seed in (3, 4)]
    tiles.append(tile("c", counts(400, 100, 5, variable=40)))
    chosen, _ = features.variable_genes(tiles, np.arange(100), 10)
    assert chosen.tolist() == list(range(10))


def test_a_small_panel_stays_whole_but_for_genes_never_seen() -> None:
    values = counts(50, 30, 0)
    values[:, 3] = 0
    keep, _ = features.choose([tile("a", values)], pd.Index([f"G{i}" for i in range(30)]), Preparation())
    assert keep.sum() == 29
    assert not keep[3]


def test_genes_of_measured_proteins_and_wished_ones_are_kept_and_others_left_out() -> None:
    names = pd.Index([f"G{i}" for i in range(300)])
    preparation = Preparation(n_top_genes=20, keep_genes=("g250",), drop_genes=("G0",))
    tiles = [tile("a", counts(200, 300, 1, variable=20))]
    keep, notes = features.choose(tiles, names, preparation, ["G200", "absent"])
    assert keep[[200, 250]].all()
    assert not keep[0]
    assert keep.sum() == 22
    assert "2 more" in notes[-1]
    unkept, _ = features.choose(tiles, names, preparation.model_copy(update={"keep_protein_genes": False}), ["G200"])
    assert not unkept[200]


def test_rare_genes_cannot_become_variable_genes() -> None:
    values = counts(400, 120, 5)
    values[:, :10] = 0
    values[np.arange(10) % 3, np.arange(10)] = 500  # in one cell each: huge variance, no use
    keep, _ = features.choose([tile("a", values)], pd.Index([f"G{i}" for i in range(120)]), Preparation(n_top_genes=50))
    assert not keep[:10].any()
    assert keep.sum() == 50


def test_the_standardised_variance_of_poisson_counts_is_even() -> None:
    scores = features.standardised_variance(sp.csc_matrix(counts(2000, 100, 7)))
    assert scores == pytest.approx(np.ones(100), abs=0.25)


@pytest.mark.parametrize("n_genes", [1, 2, 3, 10])
def test_too_few_genes_for_loess_never_reach_it(n_genes: int) -> None:
    # The Fortran behind loess ends the process on two or three points.
    chosen, notes = features.variable_genes([tile("few", counts(50, n_genes, 0))], np.arange(n_genes), 1)
    assert len(chosen) == 1
    assert "parabola" in notes[0]


def test_constant_genes_have_no_variance() -> None:
    values = counts(50, 20, 1)
    values[:, 4] = 3
    assert features.standardised_variance(sp.csc_matrix(values))[4] == 0
