"""The tasks on a linear method whose answers can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows, Rows, RowSource
from headless.errors import MosaicError
from headless.results import Results
from headless.tasks.correct import corrected_latents, decode_blocks
from headless.tasks.embed import pieces
from headless.tasks.translate import translations

TWO = {"a": ["rna"], "b": ["adt"], "c": ["rna", "adt"]}
THREE = {"a": ["rna"], "b": ["adt", "atac"], "c": ["rna", "adt", "atac"]}


def by_hand(module: Any, counts: Mapping[str, NDArray[np.float32]], has: Mapping[str, NDArray[np.bool_]]) -> Any:
    """Posterior means from these modalities: sum t log1p(x) W / (1 + sum t) over those that a cell has."""
    n = len(next(iter(counts.values())))
    weighted, total = np.zeros((n, 3)), np.ones((n, 1))
    for m, x in counts.items():
        t = module.precision(m) * has[m][:, None]
        weighted += t * (np.log1p(x) @ module.get_buffer(f"w_{m}").numpy())
        total += t
    return weighted / total


def decoded(module: Any, latent: Any, modality: str, codes: Any) -> Any:
    eta = latent @ module.get_buffer(f"v_{modality}").numpy() + 0.1 * codes[:, None]
    return 1 / (1 + np.exp(-eta)) if modality == "atac" else np.exp(eta)


@pytest.fixture(params=[TWO, THREE], ids=["two modalities", "three modalities"])
def case(request: pytest.FixtureRequest, linear: Any, make_mosaic: Any, dense_counts: Any, answered: Any) -> Any:
    """Mosaic, module, counts, who has what, results; blocks of four cells cut across batches."""
    mosaic = make_mosaic(request.param)
    module = linear(Layout.of(mosaic))
    counts = {m: dense_counts(mosaic, m) for m in mosaic.modalities}
    has = {m: mosaic.measured(m) for m in mosaic.modalities}
    return mosaic, module, counts, has, answered(module, mosaic, size=4)


def test_joint_latent_is_the_product_of_the_experts_that_a_cell_has(case: Any) -> None:
    _, module, counts, has, results = case
    np.testing.assert_allclose(results.latents("joint"), by_hand(module, counts, has), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(results.latents("joint.c"), results.latents("joint")[:, :2])
    np.testing.assert_array_equal(results.latents("joint.u"), results.latents("joint")[:, 2:])


def test_unimodal_latents_are_nan_exactly_where_the_modality_is_lacking(case: Any) -> None:
    mosaic, module, counts, has, results = case
    for m in mosaic.modalities:
        found = results.latents(m)
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), ~has[m])
        np.testing.assert_allclose(found[has[m]], by_hand(module, {m: counts[m]}, has)[has[m]], rtol=1e-5, atol=1e-6)


def test_imputation_decodes_the_joint_mean_with_the_cell_s_own_batch_for_all_cells(case: Any) -> None:
    mosaic, module, counts, has, results = case
    joint = by_hand(module, counts, has)
    for m in mosaic.modalities:
        expected = decoded(module, joint, m, mosaic.batch_codes)
        np.testing.assert_allclose(results.layer("imputed", m)[:], expected, rtol=1e-4)


def test_translation_uses_the_inputs_alone_and_only_cells_that_have_them_all(case: Any) -> None:
    mosaic, module, counts, has, results = case
    for name, (inputs, target) in translations(mosaic.modalities).items():
        eligible = np.logical_and.reduce([has[m] for m in inputs])
        found = results.layer("translated", name)[:]
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), ~eligible)
        latent = by_hand(module, {m: counts[m] for m in inputs}, has)
        expected = decoded(module, latent, target, mosaic.batch_codes)
        np.testing.assert_allclose(found[eligible], expected[eligible], rtol=1e-4)


def test_number_and_names_of_translations() -> None:
    assert set(translations(("rna", "adt"))) == {"rna_to_adt", "adt_to_rna"}
    three = translations(("rna", "adt", "atac"))
    assert len(three) == 9
    assert three["adt_rna_to_atac"] == (("rna", "adt"), "atac")
    assert {"adt_atac_to_rna", "atac_rna_to_adt", "atac_to_adt", "rna_to_atac"} <= set(three)
    assert len(translations(("a", "b", "c", "d"))) == 28
    assert translations(("rna",)) == {}


def test_correction_gives_every_cell_the_same_technical_latent(case: Any) -> None:
    mosaic, module, counts, has, results = case
    joint = by_hand(module, counts, has)
    joint[:, 2] = joint[:, 2].mean()
    for m in mosaic.modalities:
        expected = decoded(module, joint, m, np.zeros(mosaic.n_cells))
        np.testing.assert_allclose(results.layer("corrected", m)[:], expected, rtol=1e-4)


def test_with_one_batch_correction_is_imputation_from_c_and_the_mean_u(
    linear: Any, make_mosaic: Any, answered: Any
) -> None:
    mosaic = make_mosaic({"a": ["rna", "adt"]})
    module = linear(Layout.of(mosaic))
    results = answered(module, mosaic, ["corrected"])
    joint = results.latents("joint").copy()
    joint[:, 2] = joint[:, 2].mean()
    expected = module.decode(torch.from_numpy(joint), "rna", torch.zeros(len(joint))).mean.numpy()
    np.testing.assert_allclose(results.layer("corrected", "rna")[:], expected, rtol=1e-5)


def test_permuting_the_cells_permutes_every_answer(case: Any, answered: Any) -> None:
    mosaic, module, _, _, results = case
    before = {name: results.rows(*name.split("/"), slice(None)) for name in results.layers}
    joint, share = results.latents("joint").copy(), results.contribution
    order = np.concatenate([np.flatnonzero(mosaic.batch_codes == b)[::-1] for b in range(len(mosaic.batches))])
    place = np.argsort(order)
    tiles = {}
    for key, tile in mosaic.tiles.items():
        moved = place[tile.cells]
        rows = np.argsort(moved)
        tiles[key] = Tile(*key, tile.source.take(rows), moved[rows], tile.mask)
    after = answered(module, Mosaic(mosaic.cells.iloc[order], mosaic.batches, mosaic.features, tiles), size=5)
    np.testing.assert_allclose(after.latents("joint"), joint[order], rtol=1e-5, atol=1e-7)
    for name, values in before.items():
        np.testing.assert_allclose(after.rows(*name.split("/"), slice(None)), values[order], rtol=1e-4)
    np.testing.assert_allclose(after.contribution, share.iloc[order], rtol=1e-5)


def test_the_size_of_blocks_does_not_matter_and_a_second_call_overwrites(case: Any, answered: Any) -> None:
    mosaic, module, _, _, results = case
    first = results.rows("imputed", "rna", slice(None))
    again = answered(module, mosaic, ["imputed"])
    np.testing.assert_allclose(again.rows("imputed", "rna", slice(None)), first, rtol=1e-5)
    assert {name.split("/")[0] for name in again.layers} == {"imputed"}
    assert not (again.folder / "contribution.npy").exists()


def test_each_subset_is_encoded_once_a_block(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(THREE)
    module = linear(Layout.of(mosaic))
    answered(module, mosaic)
    assert len(module.encoded) == len(set(module.encoded)) == 7  # joint, three alone, three pairs; one block
    module.encoded.clear()
    answered(module, mosaic, [])
    assert module.encoded == [None, ("rna",), ("adt",), ("atac",)]


def test_observed_values_are_kept_on_request_but_not_where_a_feature_was_not_measured(
    linear: Any, make_mosaic: Any, answered: Any, dense_counts: Any
) -> None:
    mosaic = make_mosaic(THREE, masked=("c", "rna"))
    module = linear(Layout.of(mosaic))
    plain = {m: answered(module, mosaic, ["imputed"]).rows("imputed", m, slice(None)) for m in mosaic.modalities}
    kept = answered(module, mosaic, ["imputed"], keep_observed=True, size=4)
    for m in mosaic.modalities:
        observed = np.repeat(mosaic.measured(m)[:, None], plain[m].shape[1], axis=1)
        if m == "rna":
            observed[mosaic.batch_codes == 2, 0] = False
        counts = dense_counts(mosaic, m)
        values = np.where(observed, (counts > 0.5) if m == "atac" else counts, plain[m])
        np.testing.assert_allclose(kept.layer("imputed", m)[:], values, rtol=1e-5)


def test_draws_are_whole_numbers_that_follow_the_seed(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO, n=300)
    module = linear(Layout.of(mosaic))
    expected = answered(module, mosaic, ["corrected"]).rows("corrected", "adt", slice(None))
    draws = [
        answered(module, mosaic, ["corrected"], sample=True, seed=s).rows("corrected", "adt", slice(None))
        for s in (1, 1, 2)
    ]
    assert (draws[0] == draws[0].round()).all()
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    # 900 draws a feature: the mean lies within five standard errors of the expected value.
    error = 5 * np.sqrt(expected.mean(axis=0) / len(expected))
    assert (abs(draws[0].mean(axis=0) - expected.mean(axis=0)) < error).all()


@pytest.mark.parametrize(
    ("cannot", "gone", "kept"),
    [
        (
            ["decode atac"],
            ["imputed/atac", "corrected/atac", "translated/rna_to_atac"],
            ["imputed/rna", "corrected/rna"],
        ),
        (["corrected"], ["corrected/rna", "corrected/adt", "corrected/atac"], ["imputed/atac"]),
        (["encode rna"], ["translated/rna_to_adt", "translated/rna_to_atac"], ["translated/adt_to_rna", "imputed/rna"]),
    ],
)
def test_what_a_method_cannot_answer_is_left_out_with_its_reason(
    linear: Any, make_mosaic: Any, answered: Any, cannot: list[str], gone: list[str], kept: list[str]
) -> None:
    mosaic = make_mosaic(THREE)
    said: list[str] = []
    results: Results = answered(
        linear(Layout.of(mosaic), cannot), mosaic, size=4, emit=lambda kind, **f: said.append(f.get("text", ""))
    )
    assert not set(gone) & set(results.layers)
    assert set(kept) <= set(results.layers)
    assert any("This method" in text for text in said)
    for name in gone:
        with pytest.raises(MosaicError, match="This method") as caught:
            results.layer(*name.split("/"))
        assert caught.value.code == "run.no_result"
    if cannot == ["encode rna"]:
        assert "rna" not in results.index["latents"]
        assert not list((results.folder / "latents").glob("rna*"))
        with pytest.raises(MosaicError, match="cannot start from rna"):
            results.latents("rna.c")
    if cannot == ["corrected"]:
        assert results.index["outputs"]["corrected"] == {
            "state": "cannot",
            "reason": "This method does not model batches.",
        }
        assert results.index["outputs"]["imputed"] == {"state": "done"}


def test_a_method_without_an_embedding_still_gets_an_index_with_reasons(
    linear: Any, make_mosaic: Any, answered: Any
) -> None:
    mosaic = make_mosaic(TWO)
    everything = ["encode rna+adt", "encode rna", "encode adt"]
    results = answered(linear(Layout.of(mosaic), everything), mosaic)
    # Programs need no embedding of cells, all others do.
    entries = [entry for name, entry in results.index["outputs"].items() if name != "programs"]
    assert {entry["state"] for entry in entries} == {"cannot"}
    assert all(entry["reason"] for entry in entries)


def test_a_fault_of_the_method_is_not_taken_for_an_answer(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))

    def broken(*args: object) -> None:
        raise MosaicError("memory.device", "Out of memory.")

    module.decode = broken
    with pytest.raises(MosaicError, match="Out of memory"):
        answered(module, mosaic)


def test_without_a_cell_that_has_the_inputs_the_reason_says_so(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic({"a": ["rna"], "b": ["adt"], "c": ["atac"]})
    results = answered(linear(Layout.of(mosaic)), mosaic)
    assert "translated/adt_rna_to_atac" not in results.layers
    assert results.cannot["translated/adt_rna_to_atac"] == "No cell has rna and adt."
    assert results.index["outputs"]["contribution"]["reason"] == "No cell has two modalities."
    one = make_mosaic({"a": ["rna"], "b": ["rna"]})
    assert (
        answered(linear(Layout.of(one)), one).index["outputs"]["translated"]["reason"] == "There is only one modality."
    )


def test_wrong_outputs_and_other_data_are_refused_before_anything_is_written(
    linear: Any, make_mosaic: Any, answered: Any, tmp_path: Any
) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))
    with pytest.raises(MosaicError, match="Did you mean 'imputed'") as caught:
        answered(module, mosaic, ["inputed"])
    assert caught.value.code == "model.unknown_output"
    with pytest.raises(MosaicError) as caught:
        answered(module, make_mosaic(THREE))
    assert caught.value.code == "model.other_data"
    with pytest.raises(MosaicError, match="batches") as caught:
        answered(module, make_mosaic({"x": ["rna"], "y": ["adt"]}))
    assert caught.value.code == "model.other_data"
    assert not list(tmp_path.rglob("index.json"))


def test_progress_and_artifacts_are_told(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO)
    told: list[tuple[str, dict[str, Any]]] = []
    results = answered(linear(Layout.of(mosaic)), mosaic, size=4, emit=lambda kind, **f: told.append((kind, f)))
    steps = [f for kind, f in told if kind == "progress" and f["task"] == "embed and decode"]
    assert [f["done"] for f in steps] == [4, 8, 12, 16, 18]
    assert all(one["done"] < two["done"] for one, two in pairwise(steps))
    paths = [f["path"] for kind, f in told if kind == "artifact"]
    assert paths[-1] == "results/index.json"
    assert "results/layers.zarr/imputed/rna" in paths
    assert all((results.folder.parent / path).exists() for path in paths)
    json.dumps([f for _, f in told])


def test_an_interrupted_answer_leaves_no_index(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))
    results = answered(module, mosaic)

    def cancel(kind: str, **fields: Any) -> None:
        if fields.get("done", 0) >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answered(module, mosaic, size=4, emit=cancel)
    with pytest.raises(MosaicError) as caught:
        Results(results.folder)
    assert caught.value.code == "run.no_result"


def test_a_disk_that_cannot_hold_the_layers_is_told_before_the_work(
    linear: Any, make_mosaic: Any, answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("headless.tasks.store.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(MosaicError) as caught:
        answered(module, mosaic)
    assert caught.value.code == "disk.full"
    assert module.encoded == []


def test_training_mode_is_put_back(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic)).train()
    answered(module, mosaic)
    assert module.training


def test_cells_without_any_modality_have_no_answer(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO).without({"rna": np.array([2]), "adt": np.array([2])})
    results = answered(linear(Layout.of(mosaic)), mosaic)
    for values in (results.latents("joint"), results.layer("imputed", "rna")[:], results.layer("corrected", "adt")[:]):
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(values).any(axis=1)), [2])


def test_correction_skips_cells_without_a_latent(linear: Any, make_mosaic: Any) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))
    latents = np.arange(54, dtype=np.float32).reshape(18, 3)
    latents[4] = np.nan
    found, _ = corrected_latents(module, latents, mosaic.batch_codes)
    u = np.delete(latents[:, 2], 4).mean()
    np.testing.assert_allclose(np.delete(found[:, 2], 4), u)
    assert np.isnan(found[4]).all()
    blocks = list(decode_blocks(module, latents, mosaic.batch_codes, "adt", size=7))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 7), (7, 14), (14, 18)]
    assert np.isnan(blocks[0][1][4]).all()


def test_pieces_of_a_latent_store_the_whole_where_parts_do_not_tile_it() -> None:
    tiled = {"c": slice(0, 2), "u": slice(2, 3)}
    assert pieces(tiled, 3) == tiled
    assert pieces({"c": slice(0, 2), "u": slice(1, 3)}, 3)[""] == slice(0, 3)
    assert "" in pieces({"u": slice(1, 3)}, 3)


def test_overlapping_parts_come_back_whole(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic(TWO)
    module = linear(Layout.of(mosaic))
    before = answered(module, mosaic, ["corrected"])
    joint, values = before.latents("joint").copy(), before.rows("corrected", "rna", slice(None))
    module.parts = {"c": slice(0, 2), "z": slice(1, 3)}
    results = answered(module, mosaic, ["corrected"])
    np.testing.assert_array_equal(results.latents("joint"), joint)
    np.testing.assert_array_equal(results.latents("joint.z"), joint[:, 1:])
    np.testing.assert_allclose(results.rows("corrected", "rna", slice(None)), values, rtol=1e-6)


def test_no_more_rows_than_a_block_are_asked_for(
    linear: Any, make_mosaic: Any, answered: Callable[..., Results]
) -> None:
    asked: list[int] = []

    class Counting(RowSource):
        def __init__(self, source: MemoryRows) -> None:
            self.source, self.n_rows, self.n_columns = source, source.n_rows, source.n_columns

        def rows(self, which: NDArray[np.int64]) -> Rows:
            asked.append(len(which))
            return self.source.rows(which)

        def take(self, which: NDArray[np.int64]) -> RowSource:
            return self.source.take(which)

    mosaic = make_mosaic(TWO, n=50)
    module = linear(Layout.of(mosaic))
    tiles = {key: Tile(*key, Counting(tile.source), tile.cells, tile.mask) for key, tile in mosaic.tiles.items()}
    answered(module, Mosaic(mosaic.cells, mosaic.batches, mosaic.features, tiles), size=16)
    assert sum(asked) == 200  # every measured row once
    assert max(asked) <= 16
