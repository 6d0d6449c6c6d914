"""Imputation metrics against scipy and scikit-learn, and what is undefined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from headless.data.simulate import simulate
from headless.evaluate.imputation import auroc, average_precision, blocks_by_feature, compare, pearson, spearman
from headless.evaluate.views import gather, predicted_on_scale


@pytest.fixture(scope="module")
def values() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.poisson(1.0, (60, 12)).astype(np.float32)
    prediction = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    return truth, prediction


def everything(truth: np.ndarray) -> dict[str, np.ndarray]:
    return {"group": np.zeros(len(truth), np.int64), "measured": np.ones((1, truth.shape[1]), dtype=bool)}


def test_correlations_are_those_of_scipy(values: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = values
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        want = [theirs(truth[:, j], prediction[:, j])[0] for j in range(truth.shape[1])]
        np.testing.assert_allclose(ours(truth, prediction), want, atol=1e-7)


def test_ranking_scores_are_those_of_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((80, 20)) < 0.2).astype(np.float32)
    score = np.round(truth * 0.3 + rng.random(truth.shape), 1).astype(np.float32)  # many ties
    columns = range(truth.shape[1])
    np.testing.assert_allclose(auroc(truth, score), [roc_auc_score(truth[:, j], score[:, j]) for j in columns])
    np.testing.assert_allclose(
        average_precision(truth, score), [average_precision_score(truth[:, j], score[:, j]) for j in columns]
    )


def test_undefined_values_are_counted_and_left_out_never_zero(values: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = (x.copy() for x in values)
    prediction[:, 3] = 7.0  # constant prediction
    truth[:, 5] = 2.0  # constant truth
    metric = compare("adt", truth, prediction, **everything(truth))["pearson_feature"]
    want = np.delete([stats.pearsonr(truth[:, j], prediction[:, j])[0] for j in range(12) if j not in (3, 5)], [])
    assert metric.parameters["features_used"] == 10
    assert metric.parameters["features_undefined"] == 2
    assert metric.value == pytest.approx(np.median(want), abs=1e-6)
    assert metric.parameters["quartiles"] == pytest.approx(np.quantile(want, [0.25, 0.75]), abs=1e-6)
    assert metric.parameters["mean"] == pytest.approx(np.mean(want), abs=1e-6)


def test_a_constant_prediction_has_no_correlation_per_feature_but_one_per_cell() -> None:
    truth = np.random.default_rng(2).poisson([1, 5, 9], (40, 3)).astype(np.float32)
    row = compare("adt", truth, np.tile(truth.mean(axis=0), (40, 1)).astype(np.float32), **everything(truth))
    assert row["pearson_feature"].value is None
    assert "constant" in row["pearson_feature"].reason
    assert row["pearson_cell"].value is not None
    assert row["pearson_cell"].value > 0.8


def test_a_perfect_and_an_inverted_prediction() -> None:
    truth = (np.random.default_rng(3).random((50, 30)) < 0.3).astype(np.float32)
    perfect = compare("atac", truth, truth, **everything(truth))
    for how in ("feature", "cell", "flat"):
        assert (perfect[f"auroc_{how}"].value, perfect[f"auprc_{how}"].value) == (1, 1)
    assert perfect["rmse_flat"].value == 0
    inverted = compare("atac", truth, 1 - truth, **everything(truth))
    assert inverted["auroc_flat"].value == 0
    chance = inverted["auprc_flat"].parameters["chance"]
    assert chance == pytest.approx(truth.mean())
    assert chance > (inverted["auprc_flat"].value or 0)


def test_unmeasured_features_do_not_count(values: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = values
    group = np.repeat([0, 1], 30)
    measured = np.ones((2, 12), dtype=bool)
    measured[0, :4], measured[1, 3:6] = False, False
    first = compare("adt", truth, prediction, group, measured)
    noise = prediction.copy()
    noise[~measured[group]] = 1e6
    assert compare("adt", truth, noise, group, measured) == first
    seen = {j: rows for rows, columns in blocks_by_feature(group, measured) for j in columns}
    assert 3 not in seen  # measured nowhere
    np.testing.assert_array_equal(seen[0], np.arange(30, 60))
    np.testing.assert_array_equal(seen[4], np.arange(30))
    np.testing.assert_array_equal(seen[8], np.arange(60))


def test_the_order_of_cells_does_not_matter(values: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = values
    order = np.random.default_rng(5).permutation(len(truth))
    for name, metric in compare("adt", truth[order], prediction[order], **everything(truth)).items():
        same = compare("adt", truth, prediction, **everything(truth))[name]
        assert metric.value == pytest.approx(same.value, abs=1e-6), name


def test_rare_genes_and_peaks_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(6)
    truth = (rng.random((300, 10)) < 0.3).astype(np.float32)
    truth[:, 0], truth[:, 1] = 0, 1
    truth[0, 0], truth[0, 1] = 1, 0  # open in one cell, closed in one cell
    metric = compare("atac", truth, rng.random(truth.shape).astype(np.float32), **everything(truth))["auroc_feature"]
    assert metric.parameters["features_used"] == 8
    assert metric.parameters["rarely_detected"] == 2


def test_scales_of_truth_and_prediction_agree() -> None:
    mosaic = simulate(80, n_genes=60, n_proteins=12, n_peaks=50).to_mosaic()
    for modality in mosaic.modalities:
        view = gather(mosaic, modality, np.flatnonzero(mosaic.measured(modality))[::3])
        ours = view.on_scale().x.toarray()
        # Counts as a prediction of themselves, with values where nothing was measured.
        counts = view.x.toarray()
        counts[~view.measured[view.group]] = 50
        there = predicted_on_scale(modality, counts, view.group, view.measured)
        able = view.measured[view.group]
        np.testing.assert_allclose(there[able], ours[able], rtol=2e-5)
    # By hand: CLR and log-normalisation of one cell.
    view = gather(mosaic, "adt", np.flatnonzero(mosaic.measured("adt"))[:1])
    able = view.measured[view.group[0]]
    x = view.x.toarray()[0, able]
    want = np.log1p(x / np.exp(np.log1p(x).mean()))
    np.testing.assert_allclose(view.on_scale().x.toarray()[0, able], want, rtol=1e-5)


def test_gathered_rows_stand_in_the_order_asked_for() -> None:
    mosaic = simulate(60, n_genes=30, n_proteins=8, n_peaks=0, pattern={"a": ("rna",), "b": ("rna", "adt")}).to_mosaic()
    cells = np.random.default_rng(0).permutation(60)[:25]
    rows = gather(mosaic, "rna", cells).x.toarray()
    for row, cell in zip(rows, cells, strict=True):
        np.testing.assert_array_equal(row, gather(mosaic, "rna", np.array([cell])).x.toarray()[0])
    with pytest.raises(ValueError, match="do not have adt"):
        gather(mosaic, "adt", np.arange(60))
