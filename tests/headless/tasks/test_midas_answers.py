"""The tasks on MIDAS itself (untrained, small): what its sheet promises of outputs, sections 6 and 8."""

from __future__ import annotations

from typing import Any

import mudata
import numpy as np
import pytest
import torch

from headless import models
from headless.data.mosaic import Layout, Mosaic
from headless.data.simulate import simulate
from headless.export import export
from headless.models.base import Module
from headless.models.store import save_model
from headless.results import Results
from headless.tasks.translate import translations


def midas(mosaic: Mosaic) -> Module:
    torch.manual_seed(0)
    config = models.get("midas").config.make(
        data_hidden=32, trunk_hidden=(16,), chunk_hidden=(8,), chunk_out=4, dim_c=5
    )
    return models.create("midas", config, Layout.of(mosaic))


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    return simulate(240, n_genes=50, n_proteins=9, n_peaks=60).to_mosaic()


@pytest.fixture
def results(mosaic: Mosaic, answered: Any) -> Results:
    found: Results = answered(midas(mosaic), mosaic, size=100)
    return found


def test_everything_is_answered(results: Results, mosaic: Mosaic) -> None:
    assert {entry["state"] for entry in results.index["outputs"].values()} == {"done"}
    assert results.cannot == {}
    assert len([name for name in results.layers if name.startswith("translated/")]) == 9
    assert results.latents("joint.c").shape == (mosaic.n_cells, 5)
    assert results.latents("rna.u").shape == (mosaic.n_cells, 2)
    for name in results.layers:
        values = results.rows(*name.split("/"), slice(None))
        complete = np.isfinite(values).all(axis=1)
        if name.startswith("translated/"):
            inputs = translations(mosaic.modalities)[name.split("/")[1]][0]
            np.testing.assert_array_equal(complete, np.all([mosaic.measured(m) for m in inputs], axis=0))
        else:
            assert complete.all()
        assert np.nanmin(values) >= 0
        if name.endswith("atac"):
            assert np.nanmax(values) <= 1


def test_imputation_is_the_decoded_joint_mean(results: Results, mosaic: Mosaic) -> None:
    module = midas(mosaic).eval()
    with torch.no_grad():
        joint = torch.from_numpy(results.latents("joint"))
        for m in mosaic.modalities:
            expected = module.decode(joint, m, torch.from_numpy(mosaic.batch_codes)).mean
            np.testing.assert_allclose(results.layer("imputed", m)[:], expected, rtol=1e-4, atol=1e-6)


def test_correction_is_the_standard_noise(results: Results, mosaic: Mosaic) -> None:
    module = midas(mosaic).eval()
    joint, codes = results.latents("joint").copy(), mosaic.batch_codes
    u = joint[:, module.parts["u"]]
    means = np.stack([u[codes == b].mean(axis=0) for b in range(len(mosaic.batches))])
    joint[:, module.parts["u"]] = means[((means - u.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    with torch.no_grad():
        expected = module.decode(torch.from_numpy(joint), "adt", torch.zeros(len(joint), dtype=torch.long)).mean
    np.testing.assert_allclose(results.layer("corrected", "adt")[:], expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:var_names are not unique:UserWarning")
def test_layers_are_computed_from_the_saved_model_at_export(
    results: Results, mosaic: Mosaic, answered: Any, tmp_path: Any
) -> None:
    stored = {name: results.rows(*name.split("/"), slice(None)) for name in results.layers}
    module = midas(mosaic)
    bare = answered(module, mosaic, ["embedding"])
    save_model(bare.folder / "model", module, "midas", {})
    wanted = ["imputed", "corrected/adt", "translated/adt_rna_to_atac"]
    with mudata.set_options(pull_on_update=False):
        data = mudata.read_h5mu(export(bare, tmp_path / "out.h5mu", wanted, mosaic=mosaic))
    np.testing.assert_allclose(data["rna"].layers["imputed"], stored["imputed/rna"], rtol=1e-4)
    np.testing.assert_allclose(data["adt"].layers["corrected"], stored["corrected/adt"], rtol=1e-4)
    np.testing.assert_allclose(data["atac"].layers["adt_rna_to_atac"], stored["translated/adt_rna_to_atac"], rtol=1e-4)
