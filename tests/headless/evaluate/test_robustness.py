"""Panels with gaps: constants, places and scales worked out by hand; one that fills in must beat one that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from headless.data.minibatch import Minibatch, MinibatchMaker
from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.evaluate.robustness import (
    harmonised,
    on_panel,
    panel,
    score_gaps,
    score_transfer,
    without_features,
)
from headless.models.base import Posterior
from headless.models.likelihoods import Likelihood, Poisson


def mosaic_of(names: dict[str, list[str]], counts: dict[str, np.ndarray], batch: str = "b") -> Mosaic:
    n = len(next(iter(counts.values())))
    names_of_cells = [f"c{i}" for i in range(n)]
    cells = pd.DataFrame({"batch": [batch] * n, "barcode": names_of_cells}, index=names_of_cells)
    tiles = {
        (batch, m): Tile(batch, m, MemoryRows(sp.csr_matrix(x.astype(np.float32))), np.arange(n))
        for m, x in counts.items()
    }
    return Mosaic(cells, (batch,), {m: pd.DataFrame(index=found) for m, found in names.items()}, tiles)


def ranks(n: int, seed: int, d: int = 12) -> dict[str, np.ndarray]:
    """RNA and protein that follow one number per cell."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 1))
    slopes = np.linspace(-1, 1, d)
    return {
        "rna": rng.poisson(np.exp(3 + z * slopes)),
        "adt": rng.poisson(np.exp(4 + z * slopes[:6])),
    }


NAMES = {"rna": [f"g{i}" for i in range(12)], "adt": [f"CD{i}_1" for i in range(6)]}


@pytest.fixture(scope="module")
def training() -> Mosaic:
    return mosaic_of(NAMES, ranks(300, 0), "train")


class Regression(torch.nn.Module):
    """Finds the number of a cell by least squares on the features that are there; answers with planted rates."""

    needs_context = False

    def __init__(self, mosaic: Mosaic, blind: bool = False) -> None:
        super().__init__()
        self.layout = Layout.of(mosaic)
        self.blind = blind
        self.seen: list[Minibatch] = []

    def encode(self, batch: Minibatch, modalities: Any = None) -> Posterior:
        self.seen.append(batch)
        (m,) = modalities
        x = batch.x[m]
        slopes = torch.linspace(-1, 1, 12)[: x.n_columns]
        mask = torch.ones(x.n_rows, x.n_columns) if x.mask is None else x.mask.expand(x.n_rows, -1)
        y = torch.log1p(x.dense) * mask
        centre = y.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        level = (slopes * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        z = ((y - centre) * (slopes - level) * mask).sum(1) / ((slopes - level).square() * mask).sum(1)
        if self.blind:
            z = torch.randn(len(z), generator=torch.Generator().manual_seed(0))
        return Posterior(z[:, None], z[:, None])

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        d = self.layout.n_features(modality)
        return Poisson(3 + latent * torch.linspace(-1, 1, 12)[:d])


def test_names_are_harmonised() -> None:
    assert harmonised("Cd3_epsilon.1") == "CD3-EPSILON-1"


def test_constants_of_a_panel() -> None:
    x = np.array([[1, 1, 2], [2, 0, 2], [0, 3, 7]])
    mosaic = mosaic_of({"rna": ["a", "b", "c"]}, {"rna": x})
    found = panel(mosaic, "rna", np.array([True, True, False]))
    assert found.median == pytest.approx(5000.0)
    assert found.library == pytest.approx(4.0)


def test_shared_features_stand_in_their_places_and_are_scaled(training: Mosaic) -> None:
    counts = ranks(40, 1)
    order = [5, 2, 9]
    external = mosaic_of({"rna": ["G5", "g2", "g9", "other"], "adt": ["cd0-1", "CD3.1"]},
                         {"rna": np.c_[counts["rna"][:, order], np.full(40, 1000)], "adt": counts["adt"][:, [0, 3]]},
                         "elsewhere")  # fmt: skip
    placed = on_panel(training, external)
    assert placed.batches == training.batches
    assert set(placed.cells["batch"]) == {"train"}
    tile = placed.tiles["train", "rna"]
    assert np.flatnonzero(tile.mask).tolist() == [2, 5, 9]
    values = tile.source.all_rows().to_scipy().toarray()
    mask = np.zeros(12, bool)
    mask[order] = True
    constants = panel(training, "rna", mask)
    # The total of every cell is the training cells' median; the feature without a counterpart has no say.
    np.testing.assert_allclose(values.sum(1), constants.median * constants.library / 1e4, rtol=1e-5)
    expected = counts["rna"][:, order] / counts["rna"][:, order].sum(1, keepdims=True)
    np.testing.assert_allclose(values[:, order] / values.sum(1, keepdims=True), expected, rtol=1e-5)
    assert np.flatnonzero(placed.tiles["train", "adt"].mask).tolist() == [0, 3]
    made = MinibatchMaker(placed).make(np.arange(5))
    assert made.x["rna"].mask.sum().item() in (3.0, 15.0)


def test_no_shared_feature_is_an_error(training: Mosaic) -> None:
    with pytest.raises(MosaicError) as caught:
        on_panel(training, mosaic_of({"rna": ["x", "y"]}, {"rna": np.ones((3, 2))}))
    assert caught.value.code == "data.no_shared_features"
    rna_only = mosaic_of({"rna": ["g1", "g2", "g3"]}, {"rna": ranks(9, 1)["rna"][:, 1:4]})
    with pytest.raises(MosaicError) as caught:
        score_transfer(Regression(training), training, rna_only, "rna", "adt")  # type: ignore[arg-type]
    assert caught.value.field == "adt"


def test_transfer_scores_what_is_shared(training: Mosaic) -> None:
    counts = ranks(200, 2)
    external = mosaic_of({"rna": [f"g{i}" for i in range(2, 11)], "adt": [f"cd{i}.1" for i in (0, 2, 4, 5)]},
                         {"rna": counts["rna"][:, 2:11] * 7, "adt": counts["adt"][:, [0, 2, 4, 5]]})  # fmt: skip
    good: Any = Regression(training)
    found = score_transfer(good, training, external, "rna", "adt")
    poor: Any = Regression(training, blind=True)
    bad = score_transfer(poor, training, external, "rna", "adt")
    assert found["pearson_feature"].value > 0.8 > 0.3 > abs(bad["pearson_feature"].value)
    assert found["pearson_flat"].parameters["shared_adt"] == 4
    assert found["pearson_flat"].parameters["shared_rna"] == 9
    assert found["pearson_flat"].parameters["cells"] == 200
    # Only the source is in the minibatches' encoding; missing features are under the mask.
    assert all(batch.x["rna"].mask is not None for batch in good.seen)


def test_hidden_features_are_gone_and_scored(training: Mosaic) -> None:
    hidden = np.arange(12) % 3 == 0
    asked = without_features(training, training, "rna", hidden)
    tile = asked.tiles["train", "rna"]
    assert np.array_equal(tile.mask, ~hidden)
    assert tile.source.all_rows().to_scipy().toarray()[:, hidden].sum() == 0
    assert asked.tiles["train", "adt"] is training.tiles["train", "adt"]


def test_curve_over_proportions(training: Mosaic) -> None:
    test = mosaic_of(NAMES, ranks(120, 3), "train")
    cells = np.arange(20, 120)
    module: Any = Regression(training)
    table = score_gaps(module, training, test, cells, "rna", proportions=(0.25, 0.75), repeats=3)
    assert table["proportion"].tolist() == [0.25] * 3 + [0.75] * 3
    assert table["hidden"].tolist() == [3] * 3 + [9] * 3
    assert bool(np.isfinite(table["pearson_flat"]).all())
    again = score_gaps(module, training, test, cells, "rna", proportions=(0.25, 0.75), repeats=3)
    pd.testing.assert_frame_equal(table, again)
    blind: Any = Regression(training, blind=True)
    poor = score_gaps(blind, training, test, cells, "rna", proportions=(0.25,), repeats=3)
    good = table[table["proportion"] == 0.25]
    assert good["pearson_feature"].mean() > poor["pearson_feature"].mean() + 0.3
