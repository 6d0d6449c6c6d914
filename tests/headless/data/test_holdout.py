"""What is hidden for scoring: right share, never two modalities of a cell, never reachable from the training mosaic."""

from __future__ import annotations

import numpy as np
import pytest

from headless.data.holdout import Holdout, choose
from headless.data.mosaic import Mosaic
from headless.data.simulate import PATTERN, simulate
from headless.errors import MosaicError


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    return simulate(400, n_genes=60, n_proteins=10, n_peaks=80).to_mosaic()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_every_cell_loses_at_most_one_modality_and_keeps_one(mosaic: Mosaic, fraction: float) -> None:
    hidden = choose(mosaic, Holdout(fraction=fraction))
    every = np.concatenate(list(hidden.values()))
    assert len(np.unique(every)) == len(every)
    training = mosaic.without(hidden)
    left = sum(training.measured(m).astype(int) for m in mosaic.modalities)
    assert left.min() >= 1
    for modality, cells in hidden.items():
        assert mosaic.measured(modality)[cells].all()
        assert not training.measured(modality)[cells].any()
        assert (training.measured(modality).sum() + len(cells)) == mosaic.measured(modality).sum()
        assert (np.diff(cells) > 0).all()


def test_the_share_holds_in_every_batch_and_modality(mosaic: Mosaic) -> None:
    hidden = choose(mosaic, Holdout(fraction=0.2))
    for batch, modalities in PATTERN.items():
        for modality in mosaic.modalities:
            here = np.isin(hidden[modality], np.flatnonzero(mosaic.cells["batch"] == batch)).sum()
            assert here == (20 if modality in modalities else 0), (batch, modality)


def test_a_high_fraction_is_shared_equally_between_three_modalities(mosaic: Mosaic) -> None:
    hidden = choose(mosaic, Holdout(fraction=0.5))
    tea = np.flatnonzero(mosaic.cells["batch"] == "tea")
    assert [int(np.isin(hidden[m], tea).sum()) for m in mosaic.modalities] == [33, 33, 33]


def test_named_modalities_only_and_the_seed_decides(mosaic: Mosaic) -> None:
    first = choose(mosaic, Holdout(fraction=0.2, modalities=("adt",), seed=1))
    assert set(first) == {"adt"}
    again = choose(mosaic, Holdout(fraction=0.2, modalities=("adt",), seed=1))
    other = choose(mosaic, Holdout(fraction=0.2, modalities=("adt",), seed=2))
    np.testing.assert_array_equal(first["adt"], again["adt"])
    assert not np.array_equal(first["adt"], other["adt"])


def test_zero_hides_nothing(mosaic: Mosaic) -> None:
    assert choose(mosaic, Holdout()) == {}


def test_what_cannot_be_hidden_is_said() -> None:
    diagonal = simulate(60, {"a": ("rna",), "b": ("adt",)}, n_genes=20, n_proteins=10, n_peaks=0).to_mosaic()
    with pytest.raises(MosaicError, match="two modalities") as caught:
        choose(diagonal, Holdout(fraction=0.1))
    assert caught.value.code == "model.bad_holdout"
    assert caught.value.field == "holdout.fraction"
    with pytest.raises(MosaicError, match="atac cannot be hidden"):
        choose(diagonal, Holdout(fraction=0.1, modalities=("atac",)))
