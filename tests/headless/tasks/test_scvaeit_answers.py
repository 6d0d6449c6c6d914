"""The tasks on scVAEIT (untrained, small): every output is answered, and nothing of a hidden modality leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headless import models
from headless.data.minibatch import MinibatchMaker
from headless.data.mosaic import Layout, Mosaic
from headless.data.simulate import simulate
from headless.models.base import Module


def scvaeit(mosaic: Mosaic, **settings: Any) -> Module:
    torch.manual_seed(0)
    config = models.get("scvaeit").config.make(
        n_latent=5, hidden=(16,), rna_width=12, adt_width=8, chunk_width=3, rna_mask=4, adt_mask=3, **settings
    )
    module = models.create("scvaeit", config, Layout.of(mosaic))
    module.prepare(MinibatchMaker(mosaic).in_order(100))
    return module


@pytest.mark.parametrize("skip", [True, False])
def test_every_output_is_answered(answered: Any, skip: bool) -> None:
    mosaic = simulate(240, n_genes=50, n_proteins=9, n_peaks=60).to_mosaic()
    results = answered(scvaeit(mosaic, skip=skip), mosaic, size=100)
    # With the skip on, a latent state alone says too little to be decoded.
    assert set(results.cannot) <= ({"programs"} if skip else set())
    embedding = results.latents("joint.z")
    assert embedding.shape == (240, 5)
    assert bool(np.isfinite(embedding).all())
    for modality in mosaic.modalities:
        for kind in ("imputed", "corrected"):
            values = results.rows(kind, modality, slice(0, 240))
            assert bool(np.isfinite(values).all())
            assert bool((values >= 0).all())


def test_translation_knows_nothing_of_its_target(answered: Any) -> None:
    """Protein predicted from RNA is the same whether or not the protein of these cells was measured."""
    mosaic = simulate(120, {"a": ("rna", "adt")}, n_genes=40, n_proteins=8).to_mosaic()
    module = scvaeit(mosaic)
    whole = answered(module, mosaic)
    first = np.array(whole.rows("translated", "rna_to_adt", slice(0, 120)))
    hidden = mosaic.without({"adt": np.arange(60)})
    again = np.array(answered(module, hidden).rows("translated", "rna_to_adt", slice(0, 120)))
    np.testing.assert_array_equal(first, again)


def test_one_type_left_out_on_a_trained_network() -> None:
    from headless.evaluate.leave_out import leave_out_type, score_left_out

    mosaic = simulate(200, {"a": ("rna", "adt")}, n_genes=40, n_proteins=8, seed=3).to_mosaic()
    training, cells = leave_out_type(mosaic, str(mosaic.cells["label"].iloc[0]))
    scores = score_left_out(scvaeit(training), mosaic, cells)
    assert set(scores) == {"rna -> adt", "adt -> rna"}
    assert all(metrics["pearson_flat"].value is not None for metrics in scores.values())
