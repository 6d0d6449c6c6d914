"""What every method of the table must do alike: train, answer the tasks, resume, repeat, be saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headless import models
from headless.data.minibatch import MinibatchMaker
from headless.data.mosaic import Layout, Mosaic
from headless.data.simulate import simulate
from headless.models.base import Module
from headless.models.store import load_model, save_model
from headless.results import Results
from headless.schema import describe
from headless.tasks import OUTPUTS
from headless.tasks.base import inference
from headless.tasks.translate import translations
from headless.train.loop import fit, seed_all

#: Small networks, so that a test takes a second; a method that is not named here is taken as it comes.
SMALL: dict[str, dict[str, Any]] = {
    "midas": {"data_hidden": 32, "trunk_hidden": (16,), "chunk_hidden": (8,), "chunk_out": 4, "dim_c": 6},
    "multigrate": {"hidden": 24, "dim_z": 8},
    "scmm": {"hidden_rna": 24, "dim": 8},
    "scvaeit": {"rna_width": 24, "adt_width": 12, "chunk_width": 6, "hidden": (24,), "n_latent": 8},
}
METHODS = pytest.mark.parametrize("name", models.names())
STEPS = 7


@pytest.fixture(scope="module")
def mosaic() -> Mosaic:
    """Three modalities, batches that lack one or two of them, features missing in places."""
    return simulate(240, n_genes=50, n_proteins=9, n_peaks=60).to_mosaic()


def new(name: str, mosaic: Mosaic, **settings: Any) -> Module:
    config = models.get(name).config.make(
        None, **{**SMALL.get(name, {}), "batch_size": 48, "patience": 0, "max_steps": STEPS, **settings}
    )
    seed_all(4)
    return models.create(name, config, Layout.of(mosaic))


def train(
    module: Module, mosaic: Mosaic, folder: Path, control: Callable[[], str | None] = lambda: None, resume: bool = False
) -> dict[str, torch.Tensor]:
    fit(module, mosaic, module.config, seed=4, device="cpu", checkpoints=folder, control=control, resume=resume,
        emit=lambda kind, **fields: None)  # fmt: skip
    return {name: value.clone() for name, value in module.state_dict().items()}


def after(steps: int, wish: str) -> Callable[[], str | None]:
    calls = iter(range(10_000))
    return lambda: wish if next(calls) == steps else None


@METHODS
def test_every_task_is_answered_or_refused_in_words(name: str, mosaic: Mosaic, answered: Any, tmp_path: Path) -> None:
    module = new(name, mosaic)
    train(module, mosaic, tmp_path)
    results: Results = answered(module, mosaic, size=100)
    outputs = results.index["outputs"]
    assert set(outputs) == set(OUTPUTS)
    for entry in outputs.values():
        assert entry["state"] == "done" or len(entry["reason"]) > 20
    for task in ("embedding", "imputed", "corrected", "translated", "contribution"):
        assert outputs[task]["state"] == "done", outputs[task]
    assert np.isfinite(results.latents(f"joint.{module.biological}")).all()
    for m in mosaic.modalities:
        alone = np.isfinite(results.latents(f"{m}.{module.biological}")).all(axis=1)
        np.testing.assert_array_equal(alone, mosaic.measured(m))
    assert {n for n in results.layers if n.startswith("translated/")} == {
        f"translated/{n}" for n in translations(mosaic.modalities)
    }
    for layer in results.layers:
        values = results.rows(*layer.split("/"), slice(None))
        complete = np.isfinite(values).all(axis=1)
        inputs = translations(mosaic.modalities)[layer.split("/")[1]][0] if layer.startswith("translated/") else ()
        expected = np.all([mosaic.measured(m) for m in inputs], axis=0) if inputs else np.ones(mosaic.n_cells, bool)
        np.testing.assert_array_equal(complete, expected)
        assert np.nanmin(values) >= 0


@METHODS
def test_hidden_values_never_reach_an_answer(name: str, mosaic: Mosaic, tmp_path: Path) -> None:
    """Translation from RNA gives the same whatever was measured of protein, or if it was measured at all."""
    module = new(name, mosaic)
    train(module, mosaic, tmp_path)
    cells = np.flatnonzero(mosaic.measured("rna") & mosaic.measured("adt"))[:20]
    found = []
    for source in (mosaic, mosaic.without({"adt": cells})):
        for scale in (1.0, 5.0):
            batch = MinibatchMaker(source, covariates=module.layout.covariates).make(cells)
            if "adt" in batch.x:
                batch.x["adt"] = batch.x["adt"].with_values(batch.x["adt"].values * scale)
            with inference(module, "cpu"):
                posterior = module.encode(batch, ["rna"])
                likelihood = module.decode(posterior.mean, "adt", batch.batch, posterior.context)
                found.append((posterior.mean, likelihood.mean))
    for mean, values in found[1:]:
        torch.testing.assert_close(mean, found[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(values, found[0][1], rtol=1e-6, atol=1e-7)


@METHODS
def test_order_and_size_of_minibatches_do_not_matter(name: str, mosaic: Mosaic, tmp_path: Path) -> None:
    module = new(name, mosaic)
    train(module, mosaic, tmp_path)
    maker = MinibatchMaker(mosaic, covariates=module.layout.covariates)
    with inference(module, "cpu"):
        whole = module.encode(next(maker.in_order(1000))).mean
        again = module.encode(next(maker.in_order(1000))).mean
        pieces = torch.cat([module.encode(batch).mean for batch in maker.in_order(31)])
        order = np.random.default_rng(0).permutation(mosaic.n_cells)
        turned = module.encode(maker.make(order)).mean
    assert torch.equal(whole, again)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned, whole[torch.from_numpy(order)], rtol=1e-4, atol=1e-5)


@METHODS
def test_a_run_repeats_and_resumes_bit_by_bit(name: str, mosaic: Mosaic, tmp_path: Path) -> None:
    settings = {"validation_fraction": 0.1}
    once = train(new(name, mosaic, **settings), mosaic, tmp_path / "once")
    twice = train(new(name, mosaic, **settings), mosaic, tmp_path / "twice")
    train(new(name, mosaic, **settings), mosaic, tmp_path / "halves", after(3, "pause"))
    resumed = train(new(name, mosaic, **settings), mosaic, tmp_path / "halves", resume=True)
    for key, value in once.items():
        assert torch.equal(twice[key], value), key
        assert torch.equal(resumed[key], value), key


@METHODS
def test_training_lowers_the_loss(name: str, mosaic: Mosaic, tmp_path: Path) -> None:
    module = new(name, mosaic, max_steps=80, lr=2e-3, sampler="mixed")
    curve: list[float] = []
    fit(module, mosaic, module.config, seed=4, device="cpu", checkpoints=tmp_path,
        emit=lambda kind, **f: curve.append(sum(v for k, v in f["train"].items() if k.startswith(("reconstruction",
        "recon", "hidden", "visible")))) if kind == "epoch" else None)  # fmt: skip
    assert curve[-1] < 0.98 * curve[0]


@METHODS
def test_saved_and_loaded_it_answers_the_same(name: str, mosaic: Mosaic, tmp_path: Path) -> None:
    module = new(name, mosaic)
    train(module, mosaic, tmp_path / "run")
    save_model(tmp_path / "model", module, name)
    loaded = load_model(tmp_path / "model")
    batch = MinibatchMaker(mosaic, covariates=module.layout.covariates).make(np.arange(50))
    with inference(module, "cpu"), inference(loaded, "cpu"):
        one, other = module.encode(batch), loaded.encode(MinibatchMaker(mosaic).make(np.arange(50)))
        assert torch.equal(one.mean, other.mean)
        for m in mosaic.modalities:
            mine = module.decode(one.mean, m, batch.batch, one.context).mean
            assert torch.equal(loaded.decode(other.mean, m, batch.batch, other.context).mean, mine)


@METHODS
def test_settings_describe_themselves_and_presets_hold(name: str, mosaic: Mosaic) -> None:
    config = models.get(name).config
    for row in describe(config):
        assert row["title"], row["name"]
        assert row["help"], row["name"]
    assert {"paper", "fast"} <= set(config.presets())
    for preset in config.presets():
        config.make(preset)
    assert config.supports(mosaic.pattern()).level != "cannot"
    assert len(models.get(name).citation) > 20
    text = models.page(name)
    assert text.startswith("# ")
    assert "when" in text.lower()
    assert "knob" in text.lower() or "setting" in text.lower()
    assert "cite" in text.lower()
