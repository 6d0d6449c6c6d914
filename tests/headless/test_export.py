"""Exports: they open in scanpy and muon as they are, hold what the results hold, and never cost an input file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.sparse as sp

from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.export import choose_layers, export
from headless.results import Results

#: A gene and a protein of one name are nothing unusual; mudata warns of them at every reading.
pytestmark = pytest.mark.filterwarnings("ignore:var_names are not unique:UserWarning")

PATTERN = {"a": ["rna"], "b": ["adt"], "c": ["rna", "adt"]}


@pytest.fixture
def mosaic(make_mosaic: Any) -> Mosaic:
    made: Mosaic = make_mosaic(PATTERN, n=12, masked=("c", "rna"))
    return made


@pytest.fixture
def module(mosaic: Mosaic, linear: Any) -> Any:
    return linear(Layout.of(mosaic))


@pytest.fixture
def results(mosaic: Mosaic, module: Any, answered: Any) -> Results:
    found: Results = answered(module, mosaic)
    return found


def read(path: Path) -> mudata.MuData:
    with mudata.set_options(pull_on_update=False):
        return mudata.read_h5mu(path)


def test_h5mu_holds_every_cell_in_every_modality(
    results: Results, mosaic: Mosaic, dense_counts: Any, tmp_path: Path
) -> None:
    data = read(export(results, tmp_path / "out.h5mu", mosaic=mosaic))
    assert list(data.mod) == ["rna", "adt"]
    assert list(data.obs_names) == list(mosaic.cells.index)
    assert list(data.obs["batch"].cat.categories) == ["a", "b", "c"]
    assert list(data.obs["label"]) == list(mosaic.cells["label"])
    np.testing.assert_array_equal(data.obs["age"], mosaic.cells["age"])
    np.testing.assert_array_equal(data.obsm["X_linear"], results.latents("joint.c"))
    np.testing.assert_array_equal(data.obsm["X_linear_u"], results.latents("joint.u"))
    for m in mosaic.modalities:
        part = data[m]
        assert part.shape == (mosaic.n_cells, len(mosaic.features[m]))
        assert list(part.var_names) == list(mosaic.features[m].index)
        assert sp.issparse(part.X)
        assert part.X.indices.dtype == part.X.indptr.dtype
        np.testing.assert_array_equal(part.X.toarray(), dense_counts(mosaic, m))
        np.testing.assert_array_equal(part.obs["measured"], mosaic.measured(m))
        np.testing.assert_array_equal(part.obsm["X_linear"], results.latents(f"{m}.c"))
        np.testing.assert_array_equal(np.isnan(part.obsm["X_linear"]).any(axis=1), ~mosaic.measured(m))
        assert set(part.layers) == {"imputed", "corrected"}
        for layer in part.layers:
            np.testing.assert_array_equal(part.layers[layer], results.layer(layer, m)[:])
    assert list(data["rna"].var["measured_c"]) == [False] + [True] * 6
    assert list(data["rna"].var["measured_b"]) == [False] * 7


def test_provenance_travels_without_the_paths_of_this_machine(results: Results, tmp_path: Path) -> None:
    page = results.folder.parent / "run.json"
    request = json.loads(page.read_text())
    request["datasets"][0]["path"] = "../secret/patients/data.h5mu"
    page.write_text(json.dumps(request))
    facts = read(export(results, tmp_path / "out.h5mu", ["imputed"])).uns["mosaic"]
    assert json.loads(facts["datasets"]) == [{"id": "data", "path": "data.h5mu"}]
    assert (facts["model"], facts["run"], facts["seed"]) == ("linear", "first-1", 3)
    assert json.loads(facts["settings"]) == {"lr": 0.1}
    assert json.loads(facts["layers"]) == {"imputed/rna": "stored", "imputed/adt": "stored"}
    assert json.loads(facts["notes"]) == ["made by hand"]
    assert str(tmp_path) not in json.dumps({k: str(v) for k, v in facts.items()})
    assert facts["X"].startswith("absent")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_scanpy_and_muon_work_on_it(results: Results, mosaic: Mosaic, tmp_path: Path) -> None:
    import muon
    import scanpy as sc

    data = muon.read(str(export(results, tmp_path / "out.h5mu", mosaic=mosaic)))
    sc.pp.neighbors(data, use_rep="X_linear", n_neighbors=5)
    assert data.obsp["connectivities"].shape == (36, 36)
    rna = data["rna"][data["rna"].obs["measured"].to_numpy(dtype=bool)].copy()
    sc.pp.neighbors(rna, use_rep="X_linear", n_neighbors=5)
    sc.pp.normalize_total(rna)
    sc.pp.log1p(rna)
    assert rna.n_obs == 24
    assert np.isfinite(rna.X.toarray()).all()


def test_h5ad_holds_one_modality_and_the_joint_embedding(results: Results, mosaic: Mosaic, tmp_path: Path) -> None:
    data = anndata.read_h5ad(export(results, tmp_path / "out.h5ad", modality="adt", mosaic=mosaic))
    np.testing.assert_array_equal(data.obsm["X_linear"], results.latents("joint.c"))
    np.testing.assert_array_equal(data.obsm["X_linear_adt"], results.latents("adt.c"))
    np.testing.assert_array_equal(data.layers["corrected"], results.layer("corrected", "adt")[:])
    assert {"batch", "label", "age", "measured"} <= set(data.obs)
    with pytest.raises(MosaicError, match="rna, adt") as caught:
        export(results, tmp_path / "two.h5ad")
    assert caught.value.code == "usage.modality"


def test_translations_go_to_their_target(results: Results, tmp_path: Path) -> None:
    data = read(export(results, tmp_path / "out.h5mu", ["translated", "imputed/rna"]))
    assert set(data["adt"].layers) == {"rna_to_adt"}
    assert set(data["rna"].layers) == {"adt_to_rna", "imputed"}
    np.testing.assert_array_equal(data["adt"].layers["rna_to_adt"], results.layer("translated", "rna_to_adt")[:])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv_holds_cells_by_latent(results: Results, tmp_path: Path, suffix: str) -> None:
    path = export(results, tmp_path / f"out{suffix}")
    table = pd.read_csv(path, index_col="cell")
    assert list(table.index) == list(results.cells.index)
    assert list(table.columns) == ["c_1", "c_2"]
    np.testing.assert_allclose(table, results.latents("joint.c"), rtol=1e-6)
    if suffix == ".csv.gz":
        gzip.decompress(path.read_bytes())
    whole = pd.read_csv(export(results, tmp_path / f"all{suffix}", latent="rna"), index_col="cell")
    np.testing.assert_allclose(whole, results.latents("rna"), rtol=1e-6)


def test_what_was_held_out_is_held_out_of_the_export(
    mosaic: Mosaic, linear: Any, answered: Any, dense_counts: Any, tmp_path: Path
) -> None:
    hidden = mosaic.without({"adt": np.array([25, 30])})
    results = answered(linear(Layout.of(hidden)), hidden, ["imputed"])
    data = read(export(results, tmp_path / "out.h5mu", mosaic=mosaic))
    np.testing.assert_array_equal(data["adt"].X.toarray(), dense_counts(hidden, "adt"))
    assert not data["adt"].obs["measured"].iloc[[25, 30]].any()


def test_other_data_than_the_run_s_are_refused(results: Results, make_mosaic: Any, tmp_path: Path) -> None:
    with pytest.raises(MosaicError) as caught:
        export(results, tmp_path / "out.h5mu", mosaic=make_mosaic(PATTERN, n=11))
    assert caught.value.code == "data.other_cells"
    assert not list(tmp_path.glob("*out.h5mu"))


def test_the_same_cells_read_in_another_order_are_matched_by_name(
    mosaic: Mosaic, module: Any, answered: Any, make_mosaic: Any, dense_counts: Any, tmp_path: Path
) -> None:
    results = answered(module, mosaic, ["imputed"])
    order = np.r_[np.arange(24, 36)[::-1], np.arange(12), np.arange(12, 24)]  # batches c, a, b; c backwards
    place = np.argsort(order)
    tiles = {}
    for key, tile in mosaic.tiles.items():
        rows = np.argsort(place[tile.cells])
        tiles[key] = Tile(*key, tile.source.take(rows), place[tile.cells][rows], tile.mask)
    other = Mosaic(mosaic.cells.iloc[order], ("c", "a", "b"), mosaic.features, tiles)
    data = read(export(results, tmp_path / "out.h5mu", mosaic=other))
    assert list(data.obs_names) == list(mosaic.cells.index)
    for m in mosaic.modalities:
        np.testing.assert_array_equal(data[m].X.toarray(), dense_counts(mosaic, m))
    renamed = Mosaic(mosaic.cells.rename(index={"a:cell0": "x"}), mosaic.batches, mosaic.features, mosaic.tiles)
    swapped = mosaic.cells.assign(batch=["b"] * 12 + ["a"] * 12 + ["c"] * 12)
    for wrong in (renamed, Mosaic(swapped, mosaic.batches, mosaic.features, mosaic.tiles)):
        with pytest.raises(MosaicError) as caught:
            export(results, tmp_path / "no.h5mu", mosaic=wrong)
        assert caught.value.code == "data.other_cells"


@pytest.mark.parametrize(
    ("layers", "near"),
    [(["inputed"], "imputed"), (["corected"], "corrected"), (["translated/rna_to_atd"], "rna_to_adt")],
)
def test_unknown_layers_are_refused_with_the_nearest_name(
    results: Results, tmp_path: Path, layers: list[str], near: str
) -> None:
    with pytest.raises(MosaicError, match=near) as caught:
        export(results, tmp_path / "out.h5mu", layers)
    assert caught.value.code == "usage.unknown_layer"


@pytest.mark.parametrize("name", ["out.txt", "out", "out.h5", ".csv", "out.gz"])
def test_unknown_suffixes_are_refused(results: Results, tmp_path: Path, name: str) -> None:
    with pytest.raises(MosaicError, match=r"\.h5mu") as caught:
        export(results, tmp_path / name)
    assert caught.value.code == "usage.suffix"


def test_files_that_exist_are_replaced_only_on_request(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("precious")
    with pytest.raises(MosaicError, match="--overwrite") as caught:
        export(results, path)
    assert caught.value.code == "usage.exists"
    assert path.read_text() == "precious"
    export(results, path, overwrite=True)
    assert path.read_text().startswith("cell,")
    with pytest.raises(MosaicError) as caught:
        export(results, tmp_path / "no" / "out.csv")
    assert caught.value.code == "usage.no_folder"


def test_input_files_are_never_overwritten(results: Results, tmp_path: Path) -> None:
    source = tmp_path / "study" / "data.h5mu"
    link = tmp_path / "link.h5mu"
    link.symlink_to(source)
    hard = tmp_path / "hard.h5mu"
    hard.hardlink_to(source)
    other = tmp_path / "other.csv"
    other.write_text("counts")
    inside = tmp_path / "study" / "matrices"
    inside.mkdir()
    for target in (source, link, hard, other, inside / "new.csv"):
        with pytest.raises(MosaicError) as caught:
            export(results, target, overwrite=True, inputs=[other, inside])
        assert caught.value.code == "usage.overwrites_input"
    assert source.read_text() == "the input file"
    with pytest.raises(MosaicError) as caught:
        export(results, results.folder / "cells.csv", overwrite=True)
    assert caught.value.code == "usage.inside_run"


def test_an_export_that_fails_leaves_nothing_and_keeps_what_was_there(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "out.h5mu"
    path.write_text("before")
    (results.folder / "layers.zarr" / "corrected" / "adt" / "c" / "0" / "0").write_bytes(b"\x00" * 40)
    with pytest.raises(MosaicError) as caught:
        export(results, path, overwrite=True)
    assert caught.value.code == "run.damaged"
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.h5mu", "study"]


def test_a_full_disk_is_told(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")

    monkeypatch.setattr("headless.export_h5._copy_layer", full)
    with pytest.raises(MosaicError) as caught:
        export(results, tmp_path / "out.h5mu")
    assert caught.value.code == "disk.full"
    assert not list(tmp_path.glob("*.h5mu"))


def test_layers_that_were_not_stored_are_computed_from_the_model(
    mosaic: Mosaic, module: Any, results: Results, answered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {name: results.rows(*name.split("/"), slice(None)) for name in results.layers}
    bare = answered(module, mosaic, ["embedding"])
    with pytest.raises(MosaicError, match="not beside the results") as caught:
        export(bare, tmp_path / "out.h5mu", ["imputed"])
    assert caught.value.code == "run.no_result"
    (bare.folder / "model").mkdir()
    (bare.folder / "model" / "model.json").write_text("{}")
    with pytest.raises(MosaicError, match="input data"):
        choose_layers(bare, ["translated"], bare.modalities)
    monkeypatch.setattr("headless.export_h5._Compute.module", module)
    everything = ["imputed", "corrected", "translated"]
    data = read(export(bare, tmp_path / "out.h5mu", everything, mosaic=mosaic))
    for name, values in stored.items():
        kind, what = name.split("/")
        target, layer = (what, kind) if kind != "translated" else (what.split("_to_")[1], what)
        np.testing.assert_allclose(data[target].layers[layer], values, rtol=1e-5)
    assert json.loads(data.uns["mosaic"]["layers"])["imputed/rna"] == "computed"


def test_a_layer_that_the_method_cannot_give_is_refused_with_its_reason(
    mosaic: Mosaic, linear: Any, answered: Any, tmp_path: Path
) -> None:
    results = answered(linear(Layout.of(mosaic), ["corrected"]), mosaic)
    with pytest.raises(MosaicError, match="does not model batches"):
        export(results, tmp_path / "out.h5mu", ["corrected"])


@pytest.mark.slow
def test_nothing_dense_of_all_cells_is_ever_held(linear: Any, answered: Any, tmp_path: Path) -> None:
    """40,000 cells x 2,000 features: one dense layer is 320 MB; a block of 1,024 cells is 8 MB."""
    n, d = 40_000, 2_000
    x = sp.random(n, d, density=0.005, format="csr", dtype=np.float32, random_state=0)
    cells = pd.DataFrame({"batch": "a", "barcode": [f"c{i}" for i in range(n)]}, index=[f"c{i}" for i in range(n)])
    features = {"rna": pd.DataFrame(index=[f"g{i}" for i in range(d)])}
    mosaic = Mosaic(cells, ("a",), features, {("a", "rna"): Tile("a", "rna", MemoryRows(x), np.arange(n))})
    module = linear(Layout.of(mosaic))
    process = psutil.Process()
    highest = [process.memory_info().rss]

    def look(*args: object, **fields: object) -> None:
        highest.append(process.memory_info().rss)

    results = answered(module, mosaic, ["imputed", "corrected"], emit=look)
    export(results, tmp_path / "out.h5mu", ["imputed"], mosaic=mosaic, progress=look)
    assert len(highest) > 150
    assert max(highest) - highest[0] < 200e6
    with h5py.File(tmp_path / "out.h5mu") as file:
        assert file["mod/rna/layers/imputed"].shape == (n, d)
        assert len(file["mod/rna/X/data"]) == x.nnz
