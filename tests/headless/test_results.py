"""Results: what was written comes back exactly, lazily, and damage is told by the name of the piece."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from headless.data.mosaic import Layout, Mosaic
from headless.errors import MosaicError
from headless.results import Results

PATTERN = {"a": ["rna"], "b": ["adt", "atac"], "c": ["rna", "adt", "atac"]}


@pytest.fixture
def mosaic(make_mosaic: Any) -> Mosaic:
    made: Mosaic = make_mosaic(PATTERN, masked=("c", "rna"))
    return made


@pytest.fixture
def results(mosaic: Mosaic, linear: Any, answered: Any) -> Results:
    found: Results = answered(linear(Layout.of(mosaic)), mosaic)
    return found


def test_cells_come_back_exactly(results: Results, mosaic: Mosaic) -> None:
    cells = results.cells
    assert list(cells.index) == list(mosaic.cells.index)
    assert list(cells["batch"].cat.categories) == ["a", "b", "c"]
    for name in ("batch", "barcode", "label"):
        assert list(cells[name].astype(str)) == list(mosaic.cells[name])
    np.testing.assert_array_equal(cells["age"], mosaic.cells["age"])
    donors = mosaic.cells["donor/site"]
    np.testing.assert_array_equal(cells["donor_site"].isna(), donors.isna())
    assert list(cells["donor_site"].dropna()) == list(donors.dropna())
    for modality in mosaic.modalities:
        np.testing.assert_array_equal(results.measured(modality), mosaic.measured(modality))
        assert cells[f"measured_{modality}"].dtype == bool
    np.testing.assert_array_equal(results.batch_codes, mosaic.batch_codes)


def test_awkward_columns_and_names_survive(linear: Any, make_mosaic: Any, answered: Any) -> None:
    mosaic = make_mosaic({"a": ["rna"], "b": ["rna"]})
    n = mosaic.n_cells
    columns = {
        "flag": np.arange(n) % 2 == 0,
        "count": pd.array([1, None] * (n // 2), dtype="Int64"),
        "maybe": pd.array([True, None] * (n // 2), dtype="boolean"),
        "mixed": [1, "two", None, 3.5] * (n // 4),
        "grade": pd.Categorical(["low", "high"] * (n // 2), categories=["low", "mid", "high"], ordered=True),
        "number": pd.Categorical([3, 1] * (n // 2)),
        "note": [f"näïve {i}" for i in range(n)],
    }
    cells = mosaic.cells.assign(**columns)
    cells.index = [f"Zelle-{i} β" for i in range(n)]
    results = answered(linear(Layout.of(mosaic)), Mosaic(cells, mosaic.batches, mosaic.features, mosaic.tiles), [])
    found = results.cells
    assert list(found.index) == list(cells.index)
    assert list(found["flag"]) == list(columns["flag"])
    np.testing.assert_array_equal(found["count"][:4], [1, np.nan, 1, np.nan])
    assert found["maybe"].isna().sum() == n // 2
    assert list(found["mixed"][:4].astype(object).fillna("-")) == ["1", "two", "-", "3.5"]
    assert list(found["grade"].cat.categories) == ["low", "mid", "high"]
    assert found["grade"].cat.ordered
    assert list(found["number"].astype(str)[:2]) == ["3", "1"]
    assert list(found["note"]) == columns["note"]


def test_features_come_back_exactly(results: Results, mosaic: Mosaic) -> None:
    for modality in mosaic.modalities:
        table, given = results.features(modality), mosaic.features[modality]
        assert list(table.index) == list(given.index)  # one of them is called NA
        np.testing.assert_array_equal(table["chrom"].isna(), given["chrom"].isna())
        assert list(table["chrom"].dropna()) == list(given["chrom"].dropna())  # "1" stays text
        assert list(table["start"]) == list(given["start"])
        assert table["start"].dtype == np.int64
    rna = results.features("rna")
    assert list(rna["measured_a"]) == [True] * 7
    assert list(rna["measured_b"]) == [False] * 7
    assert list(rna["measured_c"]) == [False] + [True] * 6


def test_one_feature_of_all_cells(results: Results) -> None:
    whole = results.layer("imputed", "rna")[:]
    np.testing.assert_array_equal(results.column("imputed", "rna", "rna3"), whole[:, 3])
    np.testing.assert_array_equal(results.column("imputed", "rna", "NA"), whole[:, 0])
    translated = results.column("translated", "adt_atac_to_rna", "rna6")
    np.testing.assert_array_equal(translated, results.layer("translated", "adt_atac_to_rna")[:, 6])
    with pytest.raises(MosaicError, match="Did you mean") as caught:
        results.column("imputed", "rna", "rna33")
    assert caught.value.code == "run.no_feature"


def test_measured_values_of_one_feature(results: Results, mosaic: Mosaic, dense_counts: Any) -> None:
    found = results.measured_column(mosaic, "rna", "NA")
    batch = mosaic.batch_codes
    assert np.isnan(found[batch != 0]).all()  # b has no RNA, and the feature is masked in c
    np.testing.assert_array_equal(found[batch == 0], dense_counts(mosaic, "rna")[batch == 0, 0])
    second = results.measured_column(mosaic, "rna", "rna1")
    np.testing.assert_array_equal(np.isnan(second), batch == 1)
    with pytest.raises(MosaicError):
        results.measured_column(mosaic, "rna", "gene")


def test_latents_are_mapped_not_loaded(results: Results) -> None:
    assert isinstance(results.latents("joint.c"), np.memmap)
    assert set(results.latent_names) >= {"joint", "joint.c", "joint.u", "rna", "rna.c", "atac.u"}
    with pytest.raises(MosaicError, match=r"joint\.c") as caught:
        results.latents("joint.d")
    assert caught.value.code == "run.no_result"


def test_what_was_not_asked_for_is_said_to_be_absent(linear: Any, mosaic: Mosaic, answered: Any) -> None:
    results = answered(linear(Layout.of(mosaic)), mosaic, ["imputed"])
    for ask in (
        lambda: results.layer("corrected", "rna"),
        lambda: results.contribution,
        lambda: results.metrics,
        lambda: results.features("protein"),
        lambda: results.measured("protein"),
    ):
        with pytest.raises(MosaicError) as caught:
            ask()
        assert caught.value.code == "run.no_result"
        assert caught.value.hint


def test_metrics_and_provenance(results: Results) -> None:
    (results.folder / "metrics.json").write_text(json.dumps({"scib": {"total": 0.8}}))
    assert results.metrics["scib"]["total"] == 0.8
    assert results.model == "linear"
    assert results.provenance["seed"] == 3
    (results.folder.parent / "run.json").unlink()
    assert results.provenance == {}
    (results.folder / "model").mkdir()
    (results.folder / "model" / "model.json").write_text(json.dumps({"method": "other"}))
    assert results.model == "other"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "cells.h5ad": lambda r: r.cells,
    "features/rna.csv": lambda r: r.features("rna"),
    "latents/joint.c.npy": lambda r: r.latents("joint.c"),
    "latents/joint.u.npy": lambda r: r.latents("joint"),
    "layers.zarr/imputed/rna/c/0/0": lambda r: r.column("imputed", "rna", "rna1"),
    "layers.zarr/imputed/rna/zarr.json": lambda r: r.layer("imputed", "rna"),
    "contribution.npy": lambda r: r.contribution,
    "metrics.json": lambda r: r.metrics,
    "index.json": lambda r: Results(r.folder),
}


#: Readings that need a piece besides the one that they are named after.
NEEDED_BY = {
    "cells.h5ad": ["contribution.npy"],
    "features/rna.csv": ["layers.zarr/imputed/rna/c/0/0"],
    "latents/joint.c.npy": ["latents/joint.u.npy"],
    "layers.zarr/imputed/rna/c/0/0": ["layers.zarr/imputed/rna/zarr.json"],
    "layers.zarr/imputed/rna/zarr.json": ["layers.zarr/imputed/rna/c/0/0"],
}


@pytest.mark.parametrize("piece", DAMAGE)
@pytest.mark.parametrize("how", ["cut", "gone", "nonsense"])
def test_damage_is_told_by_name_and_leaves_the_rest_readable(results: Results, piece: str, how: str) -> None:
    (results.folder / "metrics.json").write_text('{"scib": {}}')
    path = results.folder / piece
    if how == "cut":
        cut(path)
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\x00\xffnonsense")
    fresh = results if piece == "index.json" else Results(results.folder)
    with pytest.raises(MosaicError) as caught:
        DAMAGE[piece](fresh)
    absent = how == "gone" and piece in ("metrics.json", "index.json")
    assert caught.value.code == ("run.no_result" if absent else "run.damaged")
    named = "rna" if "layers.zarr" in piece else Path(piece).name
    assert named in str(caught.value)
    others = [DAMAGE[other] for other in DAMAGE if other not in (piece, "index.json", *NEEDED_BY.get(piece, ()))]
    for read in others:
        read(fresh)


def test_other_sizes_than_the_index_says_are_damage(results: Results) -> None:
    np.save(results.folder / "latents" / "joint.c.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(MosaicError) as caught:
        results.latents("joint.c")
    assert caught.value.code == "run.damaged"
    index = json.loads((results.folder / "index.json").read_text())
    (results.folder / "index.json").write_text(json.dumps({**index, "schema_version": 99}))
    with pytest.raises(MosaicError) as caught:
        Results(results.folder)
    assert caught.value.code == "run.newer"


def test_a_folder_without_results_is_told(tmp_path: Path) -> None:
    with pytest.raises(MosaicError) as caught:
        Results(tmp_path / "nowhere")
    assert caught.value.code == "run.no_result"


def test_reading_imports_no_heavy_library(results: Results) -> None:
    code = f"""
import sys
from headless.results import Results
r = Results({str(results.folder)!r})
r.cells, r.features("rna"), r.latents("joint"), r.column("imputed", "rna", "rna1"), r.contribution
heavy = {{"torch", "anndata", "scanpy", "mudata", "qtpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_scanpy_opens_the_table_of_cells(results: Results) -> None:
    import anndata

    assert list(anndata.read_h5ad(results.folder / "cells.h5ad").obs_names) == list(results.cells.index)
