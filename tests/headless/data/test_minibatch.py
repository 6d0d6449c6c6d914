"""Minibatches equal the dense matrix, from memory and from disk; samplers cover what they promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from headless.data.minibatch import MinibatchMaker, prefetch
from headless.data.mosaic import Mosaic
from headless.data.samplers import MixedSampler, OneBatchSampler, StratifiedSampler
from headless.data.sources import MemoryRows, ZarrRows


def dense_of(mosaic: Mosaic, modality: str) -> np.ndarray:
    out = np.full((mosaic.n_cells, len(mosaic.features[modality])), np.nan, dtype=np.float32)
    for (_, m), tile in mosaic.tiles.items():
        if m == modality:
            out[tile.cells] = tile.source.all_rows().to_scipy().toarray()
    return out


@pytest.fixture
def on_disk(tiny_mosaic: Mosaic, tmp_path: Path) -> Mosaic:
    tiles = {}
    for (b, m), tile in tiny_mosaic.tiles.items():
        path = tmp_path / f"{b}_{m}.zarr"
        ad.AnnData(X=tile.source.all_rows().to_scipy()).write_zarr(path)
        source = ZarrRows(zarr.open_group(path, mode="r")["X"], tile.source.n_columns)
        tiles[b, m] = replace(tile, source=source)
    return replace(tiny_mosaic, tiles=tiles)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_minibatch_equals_the_dense_rows(tiny_mosaic: Mosaic, on_disk: Mosaic, where: str) -> None:
    maker = MinibatchMaker(tiny_mosaic if where == "memory" else on_disk)
    assert maker.on_disk == (where == "disk")
    cells = np.random.default_rng(0).integers(0, tiny_mosaic.n_cells, 40)
    made = list(maker.stream([cells, cells[:5]]))
    assert [batch.n for batch in made] == [40, 5]
    for modality in tiny_mosaic.modalities:
        expected = dense_of(tiny_mosaic, modality)[cells]
        rows = made[0].x[modality]
        present = np.arange(40) if rows.rows is None else rows.rows.numpy()
        assert np.array_equal(present, np.flatnonzero(~np.isnan(expected).any(1)))
        assert np.array_equal(rows.dense.numpy(), expected[present])


def test_missing_modality_takes_no_memory(tiny_mosaic: Mosaic) -> None:
    batch, missing = next(
        (b, m) for b in tiny_mosaic.batches for m in tiny_mosaic.modalities if (b, m) not in tiny_mosaic.tiles
    )
    cells = np.flatnonzero(tiny_mosaic.cells["batch"].to_numpy() == batch)
    made = MinibatchMaker(tiny_mosaic).make(cells)
    assert missing not in made.x
    assert made.one_batch == tiny_mosaic.batches.index(batch)
    assert all(rows.rows is None for rows in made.x.values())


def test_masks_follow_the_cells(tiny_mosaic: Mosaic) -> None:
    modality = next(m for (_, m), tile in tiny_mosaic.tiles.items() if tile.mask is not None)
    rows = MinibatchMaker(tiny_mosaic).make(np.arange(tiny_mosaic.n_cells)).x[modality]
    assert rows.mask is not None
    positions = np.arange(tiny_mosaic.n_cells) if rows.rows is None else rows.rows.numpy()
    for (_, m), tile in tiny_mosaic.tiles.items():
        if m == modality:
            expected = np.ones(rows.n_columns, bool) if tile.mask is None else tile.mask
            found = rows.mask.numpy()[np.isin(positions, tile.cells)]
            assert (found == expected).all()


def test_disk_rows_with_renumbered_columns(tmp_path: Path) -> None:
    matrix = sp.random(50, 20, 0.3, "csr", random_state=0, dtype=np.float32)
    ad.AnnData(X=matrix).write_zarr(tmp_path / "x.zarr")
    columns = np.full(20, -1)
    columns[[3, 8, 15]] = [2, 0, 4]
    source = ZarrRows(zarr.open_group(tmp_path / "x.zarr", mode="r")["X"], 5, columns)
    which = np.array([7, 7, 0, 49, 3])
    found = source.rows(which).to_scipy().toarray()
    expected = np.zeros((5, 5), dtype=np.float32)
    expected[:, [2, 0, 4]] = matrix.toarray()[which][:, [3, 8, 15]]
    assert np.array_equal(found, expected)
    again = source.take(np.array([7, 3])).rows(np.array([1, 0])).to_scipy().toarray()
    assert np.array_equal(again, expected[[4, 0]])


def test_explicit_zeros_and_duplicates_are_cleaned() -> None:
    matrix = sp.csr_matrix((np.array([1.0, 2.0, 0.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 3))
    rows = MemoryRows(matrix).all_rows()
    assert rows.indices.tolist() == [1]
    assert rows.data.tolist() == [3.0]


def test_prefetch_hands_over_errors() -> None:
    def items():
        yield 1
        raise ValueError("broken disk")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken disk"):
        next(stream)


# Section 5 of the MIDAS sheet: steps an epoch.
@pytest.mark.parametrize(
    ("cells", "steps"),
    [
        ([7361, 5897, 10190, 9527], 160),
        ([7325, 7137, 7361, 9527], 152),
        ([6378, 5899, 4628, 5285, 6952, 6060, 8854, 8908], 280),
    ],
)
def test_one_batch_steps_of_the_paper(cells: list[int], steps: int) -> None:
    starts = np.cumsum([0, *cells])
    sampler = OneBatchSampler([np.arange(a, a + n) for a, n in zip(starts, cells, strict=False)], 256, 0)
    assert sampler.steps == steps
    plan = sampler.plan(0)
    assert len(plan) == steps
    owner = [int(np.searchsorted(starts, part[0], side="right")) for part in plan]
    for start in range(0, steps, len(cells)):
        assert sorted(owner[start : start + len(cells)]) == list(range(1, len(cells) + 1))
    for part, batch in zip(plan, owner, strict=True):
        assert ((part >= starts[batch - 1]) & (part < starts[batch])).all()


def test_one_batch_draws_without_replacement_until_exhausted() -> None:
    sampler = OneBatchSampler([np.arange(100), np.arange(100, 1100)], 50, 3)
    plan = sampler.plan(4)
    small = np.concatenate([part for part in plan if part[0] < 100])
    for start in range(0, len(small), 100):
        assert len(set(small[start : start + 100])) == 100
    assert set(np.concatenate(plan)) == set(range(1100))


def test_plans_depend_on_seed_and_epoch_alone() -> None:
    batches = [np.arange(30), np.arange(30, 100)]
    for kind in (OneBatchSampler, MixedSampler, StratifiedSampler):
        one, two = kind(batches, 16, 7), kind(batches, 16, 7)
        one.plan(0)
        assert all(np.array_equal(a, b) for a, b in zip(one.plan(5), two.plan(5), strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(one.plan(5), two.plan(6), strict=True))
        assert len(one.plan(1)) == one.steps


def test_mixed_and_stratified_cover() -> None:
    batches = [np.arange(30), np.arange(30, 100)]
    assert sorted(np.concatenate(MixedSampler(batches, 16, 0).plan(0))) == list(range(100))
    for part in StratifiedSampler(batches, 16, 0).plan(0):
        assert (part < 30).sum() == (part >= 30).sum() == 8


def test_a_modality_of_which_nothing_is_left_is_absent(tiny_mosaic: Mosaic) -> None:
    everywhere = np.flatnonzero(tiny_mosaic.measured("adt") & tiny_mosaic.measured("rna"))
    alone = np.flatnonzero(tiny_mosaic.measured("adt"))
    emptied = tiny_mosaic.without({"adt": alone})
    assert "adt" in emptied.features
    assert set(MinibatchMaker(emptied).make(everywhere[:5]).x) == set(
        MinibatchMaker(tiny_mosaic).make(everywhere[:5]).x
    ) - {"adt"}
