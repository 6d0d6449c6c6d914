"""Training: repeatable, resumable to the bit, stoppable, and honest about divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.models import create
from headless.models.base import Module
from headless.models.midas.config import MidasConfig
from headless.models.store import load_model, save_model
from headless.train import loop
from headless.train.devices import resolve
from headless.train.loop import FitResult, fit, seed_all, split
from headless.train.schedule import rate_factor

SMALL = {"data_hidden": 16, "trunk_hidden": (8,), "chunk_hidden": (8,), "chunk_out": 4, "dim_c": 4, "batch_size": 16}


def train(
    mosaic: Mosaic,
    folder: Path,
    control: Callable[[], str | None] = lambda: None,
    resume: bool = False,
    seed: int = 1,
    **settings: Any,
) -> tuple[Module, FitResult, list[tuple[str, dict[str, Any]]]]:
    config = MidasConfig.make(None, **(SMALL | {"max_epochs": 4, "lr": 1e-3} | settings))
    seed_all(seed)
    module = create("midas", config, Layout.of(mosaic))
    events: list[tuple[str, dict[str, Any]]] = []
    result = fit(module, mosaic, config, seed=seed, device="cpu", checkpoints=folder, control=control, resume=resume,
                 emit=lambda kind, **fields: events.append((kind, fields)))  # fmt: skip
    return module, result, events


def equal(one: Module, two: Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def at_step(n: int, wish: str) -> Callable[[], str | None]:
    asked = 0

    def control() -> str | None:
        nonlocal asked
        asked += 1
        return wish if asked == n else None

    return control


def test_the_loss_falls_and_runs_repeat(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    one, result, events = train(tiny_mosaic, tmp_path / "a", max_epochs=8)
    two, _, _ = train(tiny_mosaic, tmp_path / "b", max_epochs=8)
    other, _, _ = train(tiny_mosaic, tmp_path / "c", max_epochs=8, seed=2)
    assert result.outcome == "finished"
    assert equal(one, two)
    assert not equal(one, other)
    epochs = [fields for kind, fields in events if kind == "epoch"]
    assert len(epochs) == 8
    assert epochs[-1]["train"]["reconstruction_rna"] < epochs[0]["train"]["reconstruction_rna"]


# Steps in the middle of an epoch, at its end, and late: with averaged weights and a schedule.
@pytest.mark.parametrize("step", [3, 17, 40])
def test_resume_is_bit_identical(tiny_mosaic: Mosaic, tmp_path: Path, step: int) -> None:
    settings = {"average_weights": 0.9, "lr_schedule": "cosine", "warmup_steps": 5, "validation_fraction": 0.1}
    whole, _, _ = train(tiny_mosaic, tmp_path / "whole", **settings)
    _, paused, events = train(tiny_mosaic, tmp_path / "parts", at_step(step, "pause"), **settings)
    assert paused.outcome == "paused"
    assert ("control", {"wish": "pause", "step": step - 1}) in events
    resumed, result, _ = train(tiny_mosaic, tmp_path / "parts", resume=True, **settings)
    assert result.outcome == "finished"
    assert equal(whole, resumed)


def test_a_damaged_newest_checkpoint_falls_back_to_the_older(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    whole, _, _ = train(tiny_mosaic, tmp_path / "whole")
    train(tiny_mosaic, tmp_path / "p", at_step(9, "pause"), checkpoint_every=1)
    folders = sorted((tmp_path / "p").iterdir())
    assert len(folders) >= 1
    train(tiny_mosaic, tmp_path / "p", at_step(6, "pause"), resume=True, checkpoint_every=1)
    folders = sorted((tmp_path / "p").iterdir())
    assert len(folders) == 2
    (folders[-1] / "weights.safetensors").write_bytes(b"half")
    resumed, _, _ = train(tiny_mosaic, tmp_path / "p", resume=True)
    assert equal(whole, resumed)
    for folder in sorted((tmp_path / "p").iterdir()):
        (folder / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(MosaicError) as caught:
        train(tiny_mosaic, tmp_path / "p", resume=True)
    assert caught.value.code == "run.damaged"


def test_stop_early_keeps_and_cancel_leaves(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    _, stopped, _ = train(tiny_mosaic, tmp_path / "a", at_step(5, "stop"))
    assert (stopped.outcome, stopped.steps) == ("stopped early", 4)
    _, result, _ = train(tiny_mosaic, tmp_path / "a", resume=True)
    assert (result.outcome, result.steps) == ("stopped early", 4)
    _, cancelled, _ = train(tiny_mosaic, tmp_path / "b", at_step(5, "cancel"))
    assert cancelled.outcome == "cancelled"
    assert not (tmp_path / "b").exists()
    _, going, events = train(tiny_mosaic, tmp_path / "c", at_step(5, "checkpoint"))
    assert going.outcome == "finished"
    assert ("artifact", {"path": "checkpoints/step-000000004", "epoch": 0, "step": 4}) in events


def test_divergence_is_named(tiny_mosaic: Mosaic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headless.models.midas.module import Midas

    genuine = Midas._objective

    def broken(self: Midas, batch: Any) -> Any:
        terms, c = genuine(self, batch)
        terms["kl_c"] = terms["kl_c"] * float("nan")
        return terms, c

    monkeypatch.setattr(Midas, "_objective", broken)
    with pytest.raises(MosaicError) as caught:
        train(tiny_mosaic, tmp_path)
    assert caught.value.code == "diverged.loss"
    assert "kl_c" in caught.value.message
    assert "lr=" in caught.value.hint


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory.device"),
        (MemoryError(), "memory.ram"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory.ram"),
    ],
)
def test_out_of_memory_says_what_to_do(
    tiny_mosaic: Mosaic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    def full(self: Any) -> str:
        raise fault

    monkeypatch.setattr(loop._Trainer, "_epoch", full)
    with pytest.raises(MosaicError) as caught:
        train(tiny_mosaic, tmp_path)
    assert caught.value.code == code
    assert "batch_size=8" in caught.value.hint


def test_plateau_stops_and_keeps_the_best(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    module, result, events = train(
        tiny_mosaic, tmp_path, validation_fraction=0.2, patience=3, max_epochs=200, lr=0.05
    )
    assert result.outcome == "plateau"
    assert result.epochs == result.best_epoch + 3
    scores = [module.monitor(f["validation"]) for k, f in events if k == "epoch"]
    assert int(np.argmin(scores)) + 1 == result.best_epoch


def test_validation_cells_are_not_trained_on(tiny_mosaic: Mosaic) -> None:
    train_cells, kept = split(tiny_mosaic, 0.2, 5)
    joined = np.concatenate([*train_cells, kept])
    assert sorted(joined) == list(range(tiny_mosaic.n_cells))
    assert len(kept) == 40


def test_max_steps_and_schedule(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    _, result, _ = train(tiny_mosaic, tmp_path, max_steps=7)
    assert result.steps == 7
    config = MidasConfig(lr_schedule="cosine", warmup_steps=10)
    assert rate_factor(config, 0, 100) == pytest.approx(0.1)
    assert rate_factor(config, 9, 100) == 1.0
    assert rate_factor(config, 100, 100) == pytest.approx(0.01)
    assert rate_factor(MidasConfig(), 50, 100) == 1.0


def test_models_load_again_and_refuse_damage(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    module, _, _ = train(tiny_mosaic, tmp_path / "run", max_epochs=1)
    save_model(tmp_path / "model", module, "midas", {"seed": 1})
    loaded = load_model(tmp_path / "model")
    assert equal(module, loaded)
    assert loaded.layout == module.layout
    assert not loaded.training
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(MosaicError) as caught:
        load_model(tmp_path / "model")
    assert caught.value.code == "run.damaged"
    with pytest.raises(MosaicError) as caught:
        load_model(tmp_path / "nowhere")
    assert caught.value.code == "run.no_result"


def test_a_wish_for_a_missing_gpu_is_an_error() -> None:
    assert resolve("cpu") == "cpu"
    with pytest.raises(MosaicError) as caught:
        resolve("cuda:97")
    assert caught.value.code == "device.unusable"
    with pytest.raises(MosaicError) as caught:
        resolve("tpu")
    assert caught.value.code == "device.unknown"


def planted(n: int = 240) -> Mosaic:
    """Three types by ten marker features each, RNA and protein; batches RNA + protein, RNA, protein, each shifted."""
    random = np.random.default_rng(0)
    types, batches = np.arange(n) % 3, np.repeat(["both", "rna", "adt"], n // 3)
    cells = pd.DataFrame({"batch": batches, "barcode": np.arange(n).astype(str), "label": types.astype(str)})
    tiles = {}
    for modality in ("rna", "adt"):
        rates = 0.3 + 5.0 * (np.arange(30)[None] // 10 == types[:, None])
        for batch in ("both", "rna", "adt"):
            if batch in ("both", modality):
                here = np.flatnonzero(batches == batch)
                x = random.poisson(rates[here] * random.lognormal(0, 0.5, 30))
                tiles[batch, modality] = Tile(batch, modality, MemoryRows(x), here)
    features = {m: pd.DataFrame(index=[f"{m}{i}" for i in range(30)]) for m in ("rna", "adt")}
    return Mosaic(cells, ("both", "rna", "adt"), features, tiles)


def test_recovery_of_planted_types(tmp_path: Path) -> None:
    """c keeps types across batches that share no modality, and mixes batches; u tells batches."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from headless.data.minibatch import MinibatchMaker

    mosaic = planted()
    module, _, _ = train(mosaic, tmp_path, max_epochs=10_000, max_steps=240, batch_size=80, data_hidden=64,
                         trunk_hidden=(32,), lr=3e-3, lr_schedule="cosine", dropout=0.1)  # fmt: skip
    with torch.no_grad():
        posterior = module.encode(MinibatchMaker(mosaic).make(np.arange(mosaic.n_cells)))
    c, u = posterior.part("c").numpy(), posterior.part("u").numpy()
    labels, batches = mosaic.cells["label"].to_numpy(), mosaic.cells["batch"].to_numpy()
    # Labels go from the cells with RNA alone to those with protein alone: the mosaic is bridged by "both" only.
    rna, adt = batches == "rna", batches == "adt"
    assert KNeighborsClassifier(9).fit(c[rna], labels[rna]).score(c[adt], labels[adt]) > 0.9
    half = np.arange(len(c)) % 2 == 0
    score = {
        name: LogisticRegression(max_iter=2000).fit(x[half], batches[half]).score(x[~half], batches[~half])
        for name, x in (("c", c), ("u", u))
    }
    assert score["u"] > 0.9
    assert score["c"] < 0.75


def test_cells_with_nothing_measured_are_refused(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    empty = {
        key: Tile(t.batch, t.modality, MemoryRows(np.zeros((0, t.source.n_columns))), t.cells[:0], t.mask)
        for key, t in tiny_mosaic.tiles.items()
    }
    with pytest.raises(MosaicError) as caught:
        train(replace(tiny_mosaic, tiles=empty), tmp_path)
    assert caught.value.code == "data.no_cells"
