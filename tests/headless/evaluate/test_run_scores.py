"""The scores of a whole run, on results that were planted: what is written, beside what, and what is absent."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headless.data.holdout import Holdout, choose
from headless.data.mosaic import Mosaic
from headless.data.simulate import Simulated, simulate
from headless.errors import MosaicError
from headless.evaluate import score_run
from headless.evaluate.baselines import KNN, KNN_COUNTS, MEAN, ORACLE, RIDGE
from headless.evaluate.run_scores import MODEL, PCA
from headless.evaluate.scib import Settings
from headless.evaluate.table import as_csv, text
from headless.results import Results
from headless.tasks.store import Store

QUICK = Settings(resolutions=(0.4, 1.0, 1.6))
PATTERN = {"a": ("rna", "adt"), "b": ("rna", "adt", "atac"), "c": ("rna",)}
Hidden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def planted() -> tuple[Simulated, Mosaic, Hidden]:
    sample = simulate(450, PATTERN, n_genes=120, n_proteins=20, n_peaks=150, seed=5)
    truth = sample.to_mosaic()
    return sample, truth, choose(truth, Holdout(fraction=0.2))


def plant(folder: Path, sample: Simulated, truth: Mosaic, hidden: Hidden, layers: tuple[str, ...] = ()) -> Path:
    """Results of a method that knows the programs: ``c`` is the latent programs, layers are the expected counts."""
    training = truth.without(hidden)
    rng = np.random.default_rng(0)
    store = Store(folder)
    store.write_mosaic(training)
    width = sample.truth.programs.shape[1]
    for name in ("joint", *training.modalities):
        z = sample.truth.programs + rng.normal(0, 0.02, sample.truth.programs.shape).astype(np.float32)
        if name != "joint":
            z[~training.measured(name)] = np.nan
        store.latent(name, "c", width)[0 : truth.n_cells] = z
        store.latent(name, "u", 1)[0 : truth.n_cells] = z[:, :1]
    for modality in layers:
        array = store.layer(f"imputed/{modality}", modality)
        array[:] = sample.expected(modality, np.arange(truth.n_cells))
    store.close_latents()
    store.index |= {"parts": {"c": [0, width], "u": [width, width + 1]}, "biological": "c"}
    store.write_index()
    return folder


@pytest.fixture(scope="module")
def scores(planted: tuple[Simulated, Mosaic, Hidden], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sample, truth, hidden = planted
    folder = plant(tmp_path_factory.mktemp("run") / "results", sample, truth, hidden, ("rna", "adt"))
    found = score_run(folder, truth, hidden, QUICK)
    assert json.loads((folder / "metrics.json").read_text()) == Results(folder).metrics
    assert Results(folder).metrics["imputation"]["adt"].keys() == found["imputation"]["adt"].keys()
    return found


def value(row: dict[str, Any], name: str) -> float:
    assert row[name]["value"] is not None, row[name]
    return float(row[name]["value"])


def test_a_method_that_knows_the_programs_beats_the_unintegrated_components(scores: dict[str, Any]) -> None:
    model, pca = scores["scib"][MODEL], scores["baselines"]["scib"][PCA]
    for name in ("ilisi", "nmi", "overall"):
        assert value(model, name) > value(pca, name), name
    assert value(model, "ilisi") > 0.6
    assert value(pca, "ilisi") < 0.45
    assert model["nmi"]["parameters"]["cells"] == 450


def test_expected_counts_beat_every_fair_baseline(scores: dict[str, Any]) -> None:
    for modality in ("rna", "adt"):
        model = scores["imputation"][modality][MODEL]
        beside = scores["baselines"]["imputation"][modality]
        assert set(beside) == {MEAN, KNN, KNN_COUNTS, RIDGE, ORACLE}
        for name in (KNN, KNN_COUNTS, RIDGE):
            assert value(model, "pearson_feature") > value(beside[name], "pearson_feature"), (modality, name)
        # Answers of the same kind: expected counts, put on the scale afterwards.
        for name in ("pearson_cell", "pearson_flat", "spearman_cell"):
            assert value(model, name) > value(beside[KNN_COUNTS], name), (modality, name)
        assert value(model, "rmse_flat") < value(beside[KNN_COUNTS], "rmse_flat"), modality
        assert beside[MEAN]["pearson_feature"]["value"] is None
        cells = {name: row["rmse_flat"]["parameters"]["cells"] for name, row in {MODEL: model, **beside}.items()}
        assert len(set(cells.values())) == 1
        assert "oracle" in beside[ORACLE]["pearson_cell"]["parameters"]


def test_what_was_not_asked_for_is_absent_with_its_reason(scores: dict[str, Any]) -> None:
    row = scores["imputation"]["atac"][MODEL]
    assert row["imputation"]["value"] is None
    assert "was not asked for" in row["imputation"]["reason"]
    assert value(scores["baselines"]["imputation"]["atac"][KNN], "auroc_cell") > 0.5


def test_unimodal_embeddings_that_agree_are_aligned(
    planted: tuple[Simulated, Mosaic, Hidden], scores: dict[str, Any]
) -> None:
    _, truth, hidden = planted
    assert set(scores["alignment"]) == {"rna ~ adt", "rna ~ atac", "adt ~ atac"}
    for pair, row in scores["alignment"].items():
        assert value(row, "foscttm") < 0.02
        assert value(row, "label_transfer") > 0.9
        both = np.all([truth.without(hidden).measured(name) for name in pair.split(" ~ ")], axis=0)
        assert row["foscttm"]["parameters"]["cells"] == both.sum()


def test_tables_hold_the_model_above_its_baselines(scores: dict[str, Any]) -> None:
    shown = text(scores)
    assert shown.index("model") < shown.index(PCA)
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Hidden adt"))
    assert [line.split("  ")[0] for line in lines[start + 2 : start + 8]] == [
        MODEL, MEAN, KNN, KNN_COUNTS, RIDGE, ORACLE,
    ]  # fmt: skip
    assert f"{value(scores['imputation']['adt'][MODEL], 'pearson_feature'):.3f}" in lines[start + 2]
    assert "-" in lines[start + 3].split()  # the mean has no correlation per feature
    assert "was not asked for" in shown
    assert "imputation of adt, feature mean: pearson_feature, spearman_feature: constant" in shown
    table = list(csv.DictReader(io.StringIO(as_csv(scores))))
    [row] = [r for r in table if (r["part"], r["row"], r["metric"]) == ("imputation of adt", KNN, "rmse_flat")]
    assert float(row["value"]) == scores["baselines"]["imputation"]["adt"][KNN]["rmse_flat"]["value"]


def test_no_labels_and_nothing_hidden_is_said(
    planted: tuple[Simulated, Mosaic, Hidden], tmp_path: Path
) -> None:
    sample, truth, _ = planted
    bare = replace(truth, cells=truth.cells.drop(columns="label"))
    folder = plant(tmp_path / "results", sample, bare, {})
    found = score_run(folder, bare, {}, QUICK)
    assert "no label column" in found["absent"]["labels"]
    assert "nothing was hidden" in found["absent"]["imputation"]
    assert found["labels"] is None
    assert found["scib"][MODEL]["nmi"]["reason"] == "there are no labels"
    assert found["scib"][MODEL]["ilisi"]["value"] is not None
    assert "label_transfer" not in found["alignment"]["rna ~ adt"]
    assert "nothing was hidden" in text(found)


def test_results_of_other_cells_are_refused(planted: tuple[Simulated, Mosaic, Hidden], tmp_path: Path) -> None:
    sample, truth, _ = planted
    folder = plant(tmp_path / "results", sample, truth, {})
    other = simulate(450, PATTERN, n_genes=120, n_proteins=20, n_peaks=150, seed=6).to_mosaic()
    with pytest.raises(MosaicError, match="not the 450 cells of the data") as caught:
        score_run(folder, other, {}, QUICK)
    assert caught.value.code == "run.damaged"
    assert not (folder / "metrics.json").exists()


def test_a_collapsed_embedding_is_not_called_aligned(
    planted: tuple[Simulated, Mosaic, Hidden], tmp_path: Path
) -> None:
    sample, truth, _ = planted
    still = replace(sample, truth=replace(sample.truth, programs=np.zeros_like(sample.truth.programs)))
    folder = plant(tmp_path / "results", still, truth, {})
    for path in (folder / "latents").glob("*.c.npy"):
        z = np.load(path)
        z[np.isfinite(z)] = 0
        np.save(path, z)
    found = score_run(folder, truth, {}, QUICK)
    for row in found["alignment"].values():
        assert row["foscttm"]["value"] is None
        assert "same for all cells" in row["foscttm"]["reason"]


def test_a_damaged_layer_is_an_error_not_a_missing_score(
    planted: tuple[Simulated, Mosaic, Hidden], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, truth, hidden = planted
    folder = plant(tmp_path / "results", sample, truth, hidden, ("adt",))
    monkeypatch.setattr("headless.evaluate.run_scores.scib", _nothing)
    for path in (folder / "layers.zarr" / "imputed" / "adt").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.write_bytes(b"torn")
    with pytest.raises(MosaicError) as caught:
        score_run(folder, truth, hidden, QUICK)
    assert caught.value.code == "run.damaged"


def _nothing(*args: object) -> dict[str, Any]:
    return {}


