"""Leave-one-type-out: what is left out never reaches training, and scores are those of known predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headless.data.minibatch import MinibatchMaker
from headless.data.mosaic import Layout, Mosaic
from headless.data.simulate import simulate
from headless.errors import MosaicError
from headless.evaluate.leave_out import leave_out_type, score_left_out
from headless.evaluate.predict import on_log, only, predict
from headless.models.likelihoods import Likelihood, Poisson


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    return simulate(300, {"a": ("rna", "adt"), "b": ("rna", "adt", "atac"), "c": ("adt",)}, n_genes=60, n_proteins=12,
                    n_peaks=80, seed=2).to_mosaic()  # fmt: skip


def test_no_cell_of_the_type_is_left_for_training(mosaic: Mosaic) -> None:
    label = str(mosaic.cells["label"].iloc[0])
    training, cells = leave_out_type(mosaic, label)
    assert set(mosaic.cells["label"].iloc[cells]) == {label}
    assert label not in set(training.cells["label"])
    assert training.n_cells + len(cells) == mosaic.n_cells
    assert training.batches == mosaic.batches
    kept = np.setdiff1d(np.arange(mosaic.n_cells), cells)
    assert list(training.cells.index) == list(mosaic.cells.index[kept])
    for modality in mosaic.modalities:
        assert np.array_equal(training.measured(modality), mosaic.measured(modality)[kept])
    whole, part = (MinibatchMaker(m) for m in (mosaic, training))
    a, b = whole.make(kept[:50]), part.make(np.arange(50))
    assert torch.equal(a.x["adt"].dense, b.x["adt"].dense)
    assert torch.equal(a.batch, b.batch)


def test_faults_are_said(mosaic: Mosaic) -> None:
    label = str(mosaic.cells["label"].iloc[0])
    for cells, name, code in (
        (mosaic, label + "x", "data.unknown_label"),
        (only(mosaic, np.flatnonzero(mosaic.cells["label"] == label)), label, "data.nothing_left"),
    ):
        with pytest.raises(MosaicError) as caught:
            leave_out_type(cells, name)
        assert caught.value.code == code
    with pytest.raises(MosaicError) as caught:
        leave_out_type(mosaic, label + "x")
    assert label in caught.value.hint
    from dataclasses import replace

    with pytest.raises(MosaicError) as caught:
        leave_out_type(replace(mosaic, cells=mosaic.cells.drop(columns="label")), label)
    assert caught.value.code == "data.no_labels"


class Oracle(torch.nn.Module):
    """Answers with the truth, cell by cell (the latent state is the number of the cell)."""

    def __init__(self, mosaic: Mosaic, cannot: str = "") -> None:
        super().__init__()
        self.layout = Layout.of(mosaic)
        self.needs_context = False
        self.truth: dict[str, Tensor] = {}
        whole = MinibatchMaker(mosaic).make(np.arange(mosaic.n_cells))
        for m, x in whole.x.items():
            values = torch.zeros(mosaic.n_cells, x.n_columns)
            values[torch.arange(mosaic.n_cells) if x.rows is None else x.rows] = x.dense
            self.truth[m] = values
        self.cannot = cannot
        self.asked: list[Any] = []

    def encode(self, batch: Any, modalities: Any = None) -> Any:
        from headless.models.base import Posterior

        self.asked.append(tuple(modalities))
        if self.cannot in modalities:
            raise MosaicError("model.cannot", "no such encoder")
        z = batch.cells[:, None].float()
        return Posterior(z, z)

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        return Poisson(torch.log(self.truth[modality][latent[:, 0].long()] * 3 + 1e-9))


def test_truth_scores_one_and_directions_are_separate(mosaic: Mosaic) -> None:
    label = str(mosaic.cells["label"].iloc[0])
    _, cells = leave_out_type(mosaic, label)
    oracle: Any = Oracle(mosaic, cannot="atac")
    scores = score_left_out(oracle, mosaic, cells)
    assert set(scores) == {f"{a} -> {b}" for a in mosaic.modalities for b in mosaic.modalities if a != b}
    for name in ("rna -> adt", "adt -> rna"):
        # Three times the truth is the truth once both sides are normalised.
        assert scores[name]["pearson_flat"].value == pytest.approx(1.0, abs=1e-5)
        assert scores[name]["pearson_feature"].value == pytest.approx(1.0, abs=1e-5)
        assert scores[name]["rmse_flat"].value == pytest.approx(0.0, abs=1e-3)
        assert "log1p" in scores[name]["pearson_flat"].parameters["scale"]
    able = mosaic.measured("rna")[cells] & mosaic.measured("adt")[cells]
    assert scores["rna -> adt"]["pearson_flat"].parameters["cells"] == able.sum()
    assert scores["atac -> rna"]["imputation"].value is None
    assert "no such encoder" in scores["atac -> rna"]["imputation"].reason
    assert ("rna",) in oracle.asked


def test_predictions_come_in_the_order_of_the_cells(mosaic: Mosaic) -> None:
    oracle: Any = Oracle(mosaic)
    cells = np.flatnonzero(mosaic.measured("rna"))[:30]
    found = predict(oracle, mosaic, cells, ["rna"], "rna")
    np.testing.assert_allclose(found, 3 * oracle.truth["rna"][cells].numpy(), rtol=1e-4, atol=1e-4)


def test_log_scale_is_over_the_compared_features() -> None:
    x = np.array([[1, 1, 2], [5, 0, 5]], dtype=np.float32)
    measured = np.array([[True, True, False], [True, True, True]])
    found = on_log("rna", x, np.array([0, 1]), measured)
    np.testing.assert_allclose(found[0], [np.log1p(5000), np.log1p(5000), 0])
    np.testing.assert_allclose(found[1], [np.log1p(5000), 0, np.log1p(5000)])
