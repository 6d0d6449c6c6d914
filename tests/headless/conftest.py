"""A linear method with answers that can be worked out by hand, and a tiny mosaic for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from headless.data.minibatch import Minibatch
from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.models.base import Module, Posterior
from headless.models.likelihoods import Bernoulli, Likelihood, Poisson
from headless.results import Results
from headless.tasks import OUTPUTS, answer

SIZES = {"rna": 7, "adt": 4, "atac": 5}


class Linear(Module):
    """Experts ``N(log1p(x) W_m, 1/t_m)`` with the prior N(0, I); log rates ``z V_m``; parts c (2) and u (1).

    The posterior mean of a cell is ``sum t_m log1p(x_m) W_m / (1 + sum t_m)`` over its modalities.
    """

    def __init__(self, layout: Layout, cannot: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = None  # type: ignore[assignment]
        self.layout = layout
        self.parts = {"c": slice(0, 2), "u": slice(2, 3)}
        self.biological = "c"
        self.cannot = set(cannot)
        self.encoded: list[tuple[str, ...] | None] = []
        rng = torch.Generator().manual_seed(3)
        for modality in layout.modalities:
            n = layout.n_features(modality)
            self.register_buffer(f"w_{modality}", torch.randn(n, 3, generator=rng) / n)
            self.register_buffer(f"v_{modality}", torch.randn(3, n, generator=rng))

    def precision(self, modality: str) -> float:
        return 1.0 + list(self.layout.modalities).index(modality)

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        assert not self.training
        assert not torch.is_grad_enabled()
        wanted = tuple(self.layout.modalities if modalities is None else modalities)
        self.encoded.append(None if modalities is None else wanted)
        if f"encode {'+'.join(wanted)}" in self.cannot:
            raise MosaicError("model.cannot", f"This method cannot start from {' and '.join(wanted)}.")
        weighted, total = torch.zeros(batch.n, 3), torch.ones(batch.n, 1)
        for modality in wanted:
            tile = batch.x.get(modality)
            if tile is None:
                continue
            rows = torch.arange(batch.n) if tile.rows is None else tile.rows
            t = self.precision(modality)
            weighted[rows] += t * torch.log1p(tile.dense) @ self.get_buffer(f"w_{modality}")
            total[rows] += t
        return Posterior(weighted / total, -total.log().expand(-1, 3), self.parts, self.biological)

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        if f"decode {modality}" in self.cannot:
            raise MosaicError("model.cannot", f"This method has no decoder for {modality}.")
        eta = latent @ self.get_buffer(f"v_{modality}") + 0.1 * batch[:, None]
        return Bernoulli(eta) if modality == "atac" else Poisson(eta)

    def corrected(self, latent: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        if "corrected" in self.cannot:
            raise MosaicError("model.cannot", "This method does not model batches.")
        out = latent.clone()
        out[:, 2] = latent[:, 2].mean()
        return out, torch.zeros_like(batch)


def mosaic_of(
    tiles: dict[str, Sequence[str]], n: int = 6, seed: int = 0, masked: tuple[str, str] | None = None
) -> Mosaic:
    """Batches (name -> modalities) of ``n`` cells each, Poisson counts; ``masked`` tile lacks its first feature."""
    rng = np.random.default_rng(seed)
    batches = tuple(tiles)
    modalities = [m for m in SIZES if any(m in found for found in tiles.values())]
    names = [f"{batch}:cell{i}" for batch in batches for i in range(n)]
    cells = pd.DataFrame(
        {
            "batch": np.repeat(batches, n),
            "barcode": [name.split(":")[1] for name in names],
            "label": [("T cell", "B cell")[i % 2] for i in range(n * len(batches))],
            "age": rng.normal(50, 5, n * len(batches)),
            "donor/site": [["d1", None, "d2"][i % 3] for i in range(n * len(batches))],
        },
        index=names,
    )
    features = {
        m: pd.DataFrame(
            {"chrom": [None] + ["1"] * (SIZES[m] - 1), "start": np.arange(SIZES[m])},
            index=["NA", *(f"{m}{i}" for i in range(1, SIZES[m]))],
        )
        for m in modalities
    }
    if "atac" in features:
        features["atac"]["chrom"] = "1"
    made = {}
    for number, (batch, found) in enumerate(tiles.items()):
        for m in found:
            x = rng.poisson(1.0, (n, SIZES[m])).astype(np.float32)
            mask = None
            if masked == (batch, m):
                mask = np.arange(SIZES[m]) > 0
                x[:, 0] = 0
            made[batch, m] = Tile(batch, m, MemoryRows(sp.csr_matrix(x)), np.arange(n) + number * n, mask)
    return Mosaic(cells, batches, features, made, notes=("made by hand",))


def dense(mosaic: Mosaic, modality: str) -> NDArray[np.float32]:
    """Counts of all cells, zero where the modality is lacking."""
    out = np.zeros((mosaic.n_cells, len(mosaic.features[modality])), dtype=np.float32)
    for tile in mosaic.tiles.values():
        if tile.modality == modality:
            out[tile.cells] = tile.source.all_rows().to_scipy().toarray()
    return out


@pytest.fixture(scope="session")
def linear() -> type[Linear]:
    """The linear method: built from a layout and, if wanted, what it cannot answer."""
    return Linear


@pytest.fixture(scope="session")
def make_mosaic() -> Callable[..., Mosaic]:
    """Makes small mosaics from a pattern."""
    return mosaic_of


@pytest.fixture(scope="session")
def dense_counts() -> Callable[[Mosaic, str], NDArray[np.float32]]:
    """Counts of all cells as one dense matrix, zero where the modality is lacking."""
    return dense


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., Results]:
    """Runs the tasks of a module into a run folder (with its request) and opens the results."""

    def run(module: Module, mosaic: Mosaic, outputs: Sequence[str] = tuple(OUTPUTS), **options: Any) -> Results:
        folder = tmp_path / "study" / "runs" / "first-1"
        folder.mkdir(parents=True, exist_ok=True)
        inputs = tmp_path / "study" / "data.h5mu"
        inputs.write_text("the input file")
        request = {
            "id": "first-1",
            "model": "linear",
            "seed": 3,
            "preset": None,
            "settings": {"lr": 0.1},
            "datasets": [{"id": "data", "path": "data.h5mu", "absolute": str(inputs)}],
        }
        (folder / "run.json").write_text(json.dumps(request))
        answer(module, mosaic, outputs, folder / "results", options.pop("emit", lambda kind, **fields: None), **options)
        return Results(folder)

    return run
