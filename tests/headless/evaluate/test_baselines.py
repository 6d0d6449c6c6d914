"""Baselines on planted data: they see training cells only, and stand in the order that they must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data.holdout import Holdout, choose
from headless.data.mosaic import Mosaic, Tile
from headless.data.simulate import simulate
from headless.data.sources import MemoryRows
from headless.evaluate.baselines import KNN, KNN_COUNTS, MEAN, ORACLE, RIDGE, predict
from headless.evaluate.imputation import compare
from headless.evaluate.views import gather, unintegrated

Hidden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def planted() -> tuple[Mosaic, Hidden]:
    sample = simulate(900, n_genes=250, n_proteins=25, n_peaks=300, seed=1, batch_effect=0.5)
    whole = sample.to_mosaic()
    return whole, choose(whole, Holdout(fraction=0.2))


@pytest.mark.parametrize(
    ("modality", "metric", "least"), [("adt", "pearson", 0.3), ("rna", "pearson", 0.05), ("atac", "auroc", 0.52)]
)
def test_neighbours_and_types_tell_cells_apart_and_the_mean_does_not(
    planted: tuple[Mosaic, Hidden], modality: str, metric: str, least: float
) -> None:
    truth, hidden = planted
    cells = hidden[modality]
    view = gather(truth, modality, cells)
    values = view.on_scale().x.toarray()
    found = predict(truth.without(hidden), modality, cells, truth.cells["label"])
    rows = {n: compare(modality, values, b.values, view.group, view.measured) for n, b in found.items()}
    feature = f"{metric}_feature"
    # One value for all cells: no correlation, and a ranking no better than chance.
    assert rows[MEAN][feature].value == (0.5 if metric == "auroc" else None)
    for name in (KNN, RIDGE, ORACLE):
        assert (rows[name][feature].value or 0) > least, name
    # Per cell the mean is a strong rival: only the types are sure to beat it.
    assert (rows[ORACLE][f"{metric}_cell"].value or 0) > (rows[MEAN][f"{metric}_cell"].value or 0)
    assert found[ORACLE].parameters["oracle"]
    assert found[KNN].parameters["cells_given_the_mean"] == 0


def test_types_that_are_all_the_signal_make_the_oracle_best() -> None:
    # Two types, counts that depend on the type alone: oracle >= kNN >= mean.
    sample = simulate(400, {"a": ("rna", "adt"), "b": ("rna", "adt")}, n_genes=60, n_proteins=12, n_peaks=0, seed=2)
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 400)
    rates = {m: rng.gamma(1.0, 2.0, (2, len(t))) for m, t in sample.features.items()}
    counts = {m: sp.csr_matrix(rng.poisson(rates[m][kind]).astype(np.float32)) for m in rates}
    cells = sample.cells.assign(label=np.array(["x", "y"])[kind])
    truth = replace(sample, counts=counts, cells=cells, masks={}).to_mosaic()
    hidden = choose(truth, Holdout(fraction=0.3, modalities=("adt",)))
    view = gather(truth, "adt", hidden["adt"])
    values = view.on_scale().x.toarray()
    found = predict(truth.without(hidden), "adt", hidden["adt"], truth.cells["label"])
    rows = {n: compare("adt", values, b.values, view.group, view.measured) for n, b in found.items()}
    error = {name: row["rmse_flat"].value or 0.0 for name, row in rows.items()}
    assert error[ORACLE] <= error[KNN] * 1.001
    assert error[KNN] < 0.9 * error[MEAN]
    assert error[RIDGE] < 0.95 * error[MEAN]


def test_hidden_values_are_not_reachable(planted: tuple[Mosaic, Hidden]) -> None:
    truth, hidden = planted
    cells = hidden["adt"]
    first = predict(truth.without(hidden), "adt", cells)
    spoilt = dict(truth.tiles)
    for key, tile in truth.tiles.items():
        if key[1] == "adt":
            x = tile.source.all_rows().to_scipy().tolil()
            x[np.flatnonzero(np.isin(tile.cells, cells))] = 9999
            spoilt[key] = replace(tile, source=MemoryRows(x.tocsr()))
    again = predict(replace(truth, tiles=spoilt).without(hidden), "adt", cells)
    assert KNN_COUNTS in first
    for name, baseline in first.items():
        np.testing.assert_array_equal(baseline.values, again[name].values)
    assert ORACLE not in first


def test_each_group_of_cells_learns_from_what_it_has(planted: tuple[Mosaic, Hidden]) -> None:
    truth, hidden = planted
    sources = predict(truth.without(hidden), "adt", hidden["adt"])[KNN].parameters["sources"]
    assert set(sources) == {"rna", "atac", "rna + atac"}
    assert sum(facts["cells"] for facts in sources.values()) == len(hidden["adt"])


def test_cells_without_any_bridge_get_the_mean_and_are_counted() -> None:
    sample = simulate(90, {"a": ("rna",), "b": ("adt",)}, n_genes=30, n_proteins=8, n_peaks=0).to_mosaic()
    found = predict(sample, "adt", np.arange(10))
    np.testing.assert_allclose(found[KNN].values, found[MEAN].values)
    assert found[KNN].parameters["cells_given_the_mean"] == 10
    with pytest.raises(ValueError, match="no training cell has adt"):
        predict(sample.without({"adt": np.flatnonzero(sample.measured("adt"))}), "adt", np.arange(10))


def test_the_unintegrated_embedding_separates_types_and_shows_what_is_missing(planted: tuple[Mosaic, Hidden]) -> None:
    truth, _ = planted
    z = unintegrated(truth, n=10)
    assert z.shape[0] == truth.n_cells
    assert np.isfinite(z).all()
    rna = z[:, :10]
    assert (rna[~truth.measured("rna")] == 0).all()
    np.testing.assert_allclose(rna[truth.measured("rna")].var(axis=0).sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(unintegrated(truth, n=10), z, atol=1e-4)


def test_baselines_on_real_cells_score_what_the_peers_were_measured_against(shared_data: Path) -> None:
    # The pbmc mosaic: kNN regression .846, ridge .828 (mean Pearson per hidden protein), scored independently.
    with mudata.set_options(pull_on_update=False):
        whole, shown = (mudata.read_h5mu(shared_data / "tasks" / f"pbmc_mosaic{kind}.h5mu") for kind in (".truth", ""))
    obs = whole.obs.sort_values("batch", kind="stable")
    cells = pd.DataFrame({"batch": obs["batch"].astype(str), "barcode": obs.index}, index=obs.index)
    batches = tuple(cells["batch"].unique())

    def mosaic(data: mudata.MuData) -> Mosaic:
        tiles = {}
        for modality in ("rna", "adt"):
            part = data[modality]
            for batch in batches:
                numbers = np.flatnonzero(cells["batch"] == batch)
                names = cells.index[numbers]
                if names.isin(part.obs_names).all():
                    tiles[batch, modality] = Tile(batch, modality, MemoryRows(part[names].X), numbers)
        return Mosaic(cells, batches, {m: whole[m].var for m in ("rna", "adt")}, tiles)

    truth, training = mosaic(whole), mosaic(shown)
    hidden = np.flatnonzero(truth.measured("adt") & ~training.measured("adt"))
    assert len(hidden) == 1806
    view = gather(truth, "adt", hidden)
    values = view.on_scale().x.toarray()
    found = predict(training, "adt", hidden)
    means = {}
    for name in (KNN, RIDGE):
        row = compare("adt", values, found[name].values, view.group, view.measured)
        means[name] = row["pearson_feature"].parameters["mean"]
    assert means[KNN] == pytest.approx(0.846, abs=0.015)
    assert means[RIDGE] == pytest.approx(0.828, abs=0.015)
