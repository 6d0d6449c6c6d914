"""h5ad, h5mu and zarr: values, names, modalities, layers and columns of cells as written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data.matrix import Matrix
from headless.data.read import peek, read_matrix
from headless.data.sources import ZarrRows
from headless.errors import MosaicError

GENES = ["ACTB", "GAPDH", "CD3E", "MS4A1", "MALAT1"]
PROTEINS = ["CD3_TotalSeqB", "CD19_TotalSeqB", "IgG1_TotalSeqB"]
PEAKS = ["chr1:100-700", "chr1:900-1500", "chrX:5-600", "chr2:10-510"]


def counts(n: int, d: int, seed: int = 0) -> sp.csr_matrix:
    values = np.random.default_rng(seed).poisson(1.0, (n, d)).astype(np.float32)
    values[:, 0] += 1  # no empty cells
    return sp.csr_matrix(values)


def barcodes(n: int) -> list[str]:
    return [f"AAACCCAAGATT{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}-1" for i in range(n)]


def adata(n: int, names: list[str], seed: int = 0) -> ad.AnnData:
    return ad.AnnData(counts(n, len(names), seed), obs=pd.DataFrame(index=barcodes(n)), var=pd.DataFrame(index=names))


def mdata(**mods: ad.AnnData) -> mudata.MuData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mudata.MuData(mods)


def write(data: ad.AnnData | mudata.MuData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".zarr":
            data.write_zarr(path)
        else:
            data.write(path)
    return path


def dense(matrix: Matrix) -> np.ndarray:
    x = matrix.x.all_rows().to_scipy() if isinstance(matrix.x, ZarrRows) else matrix.x
    return x.toarray()


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_values_barcodes_and_features_come_back(tmp_path: Path, ending: str, layout: str) -> None:
    data = adata(12, GENES)
    want = data.X.toarray()
    data.X = {"csr": data.X, "csc": data.X.tocsc(), "dense": want}[layout]
    path = write(data, tmp_path / f"a.{ending}")
    (info,) = peek(path).matrices
    assert (info.key, info.modality, info.n_cells, info.n_features) == ("X", "rna", 12, 5)
    assert info.counts == "counts"
    assert "ACTB" in info.reason
    for on_disk in (False, True):
        matrix = read_matrix(path, "X", on_disk=on_disk)
        np.testing.assert_array_equal(dense(matrix), want)
        assert matrix.barcodes.tolist() == barcodes(12)
        assert matrix.features.index.tolist() == GENES
        assert matrix.obs.index.tolist() == barcodes(12)
        assert matrix.source == f"a.{ending}:X"
        assert isinstance(matrix.x, ZarrRows) == (on_disk and layout == "csr")
    assert read_matrix(path, "X").x.dtype == np.float32


def test_format_follows_content_not_name(tmp_path: Path) -> None:
    path = write(adata(6, GENES), tmp_path / "a.h5ad").rename(tmp_path / "a.dat")
    assert peek(path).format == "h5ad"
    path = write(mdata(rna=adata(6, GENES)), tmp_path / "b.h5mu").rename(tmp_path / "b.h5ad")
    assert peek(path).format == "h5mu"


@pytest.mark.parametrize("ending", ["h5mu", "zarr"])
def test_modalities_are_joined_to_global_obs_by_barcode(tmp_path: Path, ending: str) -> None:
    rna, adt = adata(8, GENES), adata(8, PROTEINS, 1)[[7, 2, 5]].copy()
    data = mdata(rna=rna, adt=adt)
    data.obs["batch"] = pd.Categorical([f"b{name[-4]}" for name in data.obs_names])
    data.obs["weight"] = np.arange(8.0)
    path = write(data, tmp_path / f"m.{ending}")
    info = peek(path)
    assert [(m.key, m.modality, m.n_cells, m.n_features) for m in info.matrices] == [
        ("mod/rna", "rna", 8, 5),
        ("mod/adt", "adt", 3, 3),
    ]
    assert [c.name for c in info.obs_columns] == ["batch", "weight"]
    matrix = read_matrix(path, "mod/adt")
    assert matrix.barcodes.tolist() == adt.obs_names.tolist()
    np.testing.assert_array_equal(dense(matrix), adt.X.toarray())
    expected = data.obs.loc[adt.obs_names, "batch"].astype(str).tolist()
    assert matrix.obs["batch"].astype(str).tolist() == expected
    assert matrix.obs["weight"].tolist() == data.obs.loc[adt.obs_names, "weight"].tolist()


def test_columns_that_modalities_share_are_listed_once(tmp_path: Path) -> None:
    rna, adt = adata(6, GENES), adata(6, PROTEINS)[:4].copy()
    for part in (rna, adt):
        part.obs["batch"] = ["x", "y", "x", "y", "x", "z"][: part.n_obs]
        part.obs["total"] = np.asarray(part.X.sum(1)).ravel() + 0.5
    rna.obs["donor"] = list("ppqqpq")
    path = write(mdata(rna=rna, adt=adt), tmp_path / "m.h5mu")
    with h5py.File(path, "r+") as file:  # as files look whose global obs was never filled
        for name in list(file["obs"]):
            if name != "_index":
                del file["obs"][name]
        file["obs"].attrs["column-order"] = np.array([], dtype="S1")
    info = peek(path)
    assert sorted(c.name for c in info.obs_columns) == ["adt:total", "batch", "rna:donor", "rna:total"]
    matrix = read_matrix(path, "mod/adt")
    assert sorted(matrix.obs.columns) == ["adt:total", "batch", "rna:donor", "rna:total"]
    assert matrix.obs["batch"].tolist() == ["x", "y", "x", "y"]
    assert matrix.obs["rna:donor"].tolist() == list("ppqq")
    np.testing.assert_allclose(matrix.obs["rna:total"], rna.obs["total"].iloc[:4])


def test_global_value_wins_and_the_modality_fills_its_holes(tmp_path: Path) -> None:
    rna, adt = adata(4, GENES), adata(4, PROTEINS)[:2].copy()
    rna.obs["site"] = pd.Categorical(list("abab"))
    data = mdata(rna=rna, adt=adt)
    data.obs["site"] = pd.Categorical(["b", None, "a", None], categories=["a", "b"])
    path = write(data, tmp_path / "m.h5mu")
    obs = read_matrix(path, "mod/rna").obs
    assert obs["site"].astype(str).tolist() == ["b", "b", "a", "b"]


def test_columns_of_every_kind(tmp_path: Path) -> None:
    data = adata(4, GENES)
    data.obs["cat"] = pd.Categorical(["u", None, "v", "u"])
    data.obs["ordered"] = pd.Categorical(["lo", "hi", "lo", "hi"], categories=["lo", "hi"], ordered=True)
    data.obs["flag"] = [True, False, True, True]
    data.obs["n"] = [3, 1, 2, 3]
    data.obs["score"] = [0.5, np.nan, 1.5, 2.0]
    data.obs["nullable"] = pd.array([1, None, 3, 4], dtype="Int64")
    data.obs["maybe"] = pd.array([True, None, False, True], dtype="boolean")
    data.obs["text"] = ["a1", "a2", "a3", "a4"]
    path = write(data, tmp_path / "a.h5ad")
    columns = {c.name: c for c in peek(path).obs_columns}
    kinds = {name: column.kind for name, column in columns.items()}
    assert kinds == {
        "cat": "categorical", "ordered": "categorical", "flag": "bool", "n": "integer", "score": "number",
        "nullable": "integer", "maybe": "bool", "text": kinds["text"],
    }  # fmt: skip
    assert columns["cat"].n_levels == 2
    assert columns["cat"].examples == ("u", "v")
    obs = read_matrix(path, "X").obs
    assert obs["cat"].isna().tolist() == [False, True, False, False]
    assert obs["ordered"].cat.ordered
    assert obs["n"].tolist() == [3, 1, 2, 3]
    assert obs["nullable"].isna().tolist() == [False, True, False, False]
    assert obs["maybe"].isna().tolist() == [False, True, False, False]
    assert obs["text"].astype(str).tolist() == ["a1", "a2", "a3", "a4"]
    assert obs["flag"].tolist() == [True, False, True, True]


def test_layer_with_counts_is_found_and_anything_else_refused(tmp_path: Path) -> None:
    data = adata(10, GENES)
    raw = data.X.copy()
    data.layers["norm"] = raw * 0.31
    data.layers["counts"] = raw
    data.layers["spliced"] = raw
    data.X = raw * 0.31
    path = write(data, tmp_path / "a.h5ad")
    (info,) = peek(path).matrices
    assert info.layer == "layers/counts"
    assert info.counts == "counts"
    assert set(info.layers) == {"X", "layers/counts", "layers/norm", "layers/spliced"}
    assert "X does not (values 0.31" in info.layer_reason
    np.testing.assert_array_equal(dense(read_matrix(path, "X", "layers/counts")), raw.toarray())
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X", "X")
    assert caught.value.code == "data.not_counts"
    assert "values 0.31, 0.62" in caught.value.message
    assert caught.value.where["modality"] == "rna"
    assert "layers/counts" in caught.value.hint


def test_counts_in_raw_bring_the_features_of_raw(tmp_path: Path) -> None:
    full = adata(6, GENES)
    data = full[:, 1:4].copy()
    data.X = data.X * 0.5 + 0.25 * (data.X > 0)
    data.raw = full
    path = write(data, tmp_path / "a.h5ad")
    (info,) = peek(path).matrices
    assert (info.layer, info.n_features) == ("raw/X", 5)
    matrix = read_matrix(path, "X", "raw/X")
    assert matrix.features.index.tolist() == GENES
    np.testing.assert_array_equal(dense(matrix), full.X.toarray())


def test_no_counts_anywhere_is_said_in_the_preview(tmp_path: Path) -> None:
    data = adata(6, GENES)
    data.X = data.X * -1.5
    (info,) = peek(write(data, tmp_path / "a.h5ad")).matrices
    assert info.counts.startswith("not counts: values -")


def test_one_wrong_value_outside_the_sample_is_found_when_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = sp.random(4000, 200, density=0.4, random_state=0, format="csr", dtype=np.float32)
    x.data = rng.integers(1, 5, x.nnz).astype(np.float32)
    x.data[x.nnz // 14 + 15_000] = 0.125  # between two runs that a preview looks at
    data = ad.AnnData(x, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(200)]))
    path = write(data, tmp_path / "a.h5ad")
    assert peek(path).matrices[0].counts == "counts"
    for on_disk in (False, True):
        with pytest.raises(MosaicError, match=r"values 0\.125"):
            read_matrix(path, "X", on_disk=on_disk)


def test_feature_types_in_one_table_become_matrices(tmp_path: Path) -> None:
    data = adata(6, [*GENES, *PROTEINS])
    kinds = ["GEX"] * 5 + ["ADT"] * 3
    order = [0, 5, 1, 6, 2, 3, 4, 7]
    data = data[:, order].copy()
    data.var["feature_types"] = [kinds[i] for i in order]
    data.var["gene_ids"] = [f"id{i}" for i in order]
    path = write(data, tmp_path / "a.h5ad")
    assert [(m.key, m.modality, m.n_features) for m in peek(path).matrices] == [("GEX", "rna", 5), ("ADT", "adt", 3)]
    for on_disk in (False, True):
        matrix = read_matrix(path, "ADT", on_disk=on_disk)
        assert matrix.features.index.tolist() == PROTEINS
        assert matrix.features["id"].tolist() == ["id5", "id6", "id7"]
        np.testing.assert_array_equal(dense(matrix), data[:, PROTEINS].X.toarray())


def test_binarised_peaks_with_coordinates(tmp_path: Path) -> None:
    data = adata(6, PEAKS)
    data.X = (data.X > 0).astype(np.float32)
    path = write(data, tmp_path / "a.h5ad")
    (info,) = peek(path).matrices
    assert (info.modality, info.counts) == ("atac", "binary")
    assert "peak-like" in info.reason
    features = read_matrix(path, "X").features
    assert features["chrom"].tolist() == ["chr1", "chr1", "chrX", "chr2"]
    assert features["start"].tolist() == [100, 900, 5, 10]
    assert features["end"].tolist() == [700, 1500, 600, 510]


def test_duplicate_features_are_made_unique_and_barcodes_are_not(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = adata(4, ["ACTB", "ACTB", "B2M", "ACTB-1", "ACTB"])
        data.var["gene_ids"] = list("abcde")
        data.obs_names = ["A", "A", "B", "C"]
    matrix = read_matrix(write(data, tmp_path / "a.h5ad"), "X")
    assert matrix.features.index.tolist() == ["ACTB", "ACTB-2", "B2M", "ACTB-1", "ACTB-3"]
    assert matrix.features["id"].tolist() == list("abcde")
    assert matrix.barcodes.tolist() == ["A", "A", "B", "C"]


def test_symbols_take_the_place_of_identifiers(tmp_path: Path) -> None:
    data = adata(4, [f"ENSG0000000000{i}" for i in range(5)])
    data.var["feature_name"] = ["ACTB", "B2M", "CD3E", "", "GAPDH"]
    features = read_matrix(write(data, tmp_path / "a.h5ad"), "X").features
    assert features.index.tolist() == ["ACTB", "B2M", "CD3E", "ENSG00000000003", "GAPDH"]
    assert features["id"].tolist()[1] == "ENSG00000000001"


def test_other_modalities_are_listed_with_the_reason(tmp_path: Path) -> None:
    data = mdata(rna=adata(4, GENES), hto=adata(4, ["tag1", "tag2"]), odd=adata(4, ["q", "r"]))
    info = peek(write(data, tmp_path / "m.h5mu"))
    assert [m.modality for m in info.matrices] == ["rna", None, None]
    assert "sample tags" in info.matrix("mod/hto").reason
    assert "not recognised" in info.matrix("mod/odd").reason
    with pytest.raises(MosaicError) as caught:
        read_matrix(info.path, "mod/odd")
    assert caught.value.code == "data.unknown_modality"
    assert read_matrix(info.path, "mod/odd", modality="adt").modality == "adt"


def test_whole_numbers_up_to_two_to_the_24_are_exact(tmp_path: Path) -> None:
    data = adata(3, GENES)
    data.X = sp.csr_matrix(np.array([[2**24, 2**24 - 1, 0, 1, 2]] * 3, dtype=np.int64))
    path = write(data, tmp_path / "a.h5ad")
    assert dense(read_matrix(path, "X"))[0].tolist() == [2**24, 2**24 - 1, 0, 1, 2]
    data.X = sp.csr_matrix(np.array([[2**24 + 1, 1, 0, 1, 2]] * 3, dtype=np.int64))
    with pytest.raises(MosaicError, match="not raw counts"):
        read_matrix(write(data, tmp_path / "b.h5ad"), "X")


def test_encodings_before_anndata_0_7(tmp_path: Path) -> None:
    x = counts(4, 3)
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"] = b"csr"
        group.attrs["h5sparse_shape"] = np.array([4, 3])
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(x, name)
        obs = np.zeros(4, dtype=[("index", "S8"), ("batch", "i1"), ("depth", "f8")])
        obs["index"], obs["batch"], obs["depth"] = [b"c1", b"c2", b"c3", b"c4"], [0, 1, 1, 0], [1, 2, 3, 4]
        file["obs"] = obs
        file["var"] = np.array([(b"ACTB",), (b"B2M",), (b"CD3E",)], dtype=[("index", "S8")])
        file["uns/batch_categories"] = np.array([b"ctrl", b"stim"])
    info = peek(path)
    assert {c.name: c.kind for c in info.obs_columns} == {"batch": "categorical", "depth": "number"}
    matrix = read_matrix(path, "X")
    np.testing.assert_array_equal(dense(matrix), x.toarray())
    assert matrix.obs["batch"].tolist() == ["ctrl", "stim", "stim", "ctrl"]
    assert matrix.barcodes.tolist() == ["c1", "c2", "c3", "c4"]


def test_encodings_of_anndata_0_7(tmp_path: Path) -> None:
    path = write(adata(4, GENES), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        levels = file.create_dataset("obs/__categories/batch", data=np.array([b"ctrl", b"stim"]))
        codes = file.create_dataset("obs/batch", data=np.array([0, 1, -1, 0], dtype="i1"))
        codes.attrs["categories"] = levels.ref
        file["obs"].attrs["column-order"] = np.array([b"batch"])
    assert [(c.name, c.kind, c.n_levels) for c in peek(path).obs_columns] == [("batch", "categorical", 2)]
    batch = read_matrix(path, "X").obs["batch"]
    assert batch.isna().tolist() == [False, False, True, False]
    assert batch.tolist()[1] == "stim"


def test_zarr_zip(tmp_path: Path) -> None:
    import shutil

    folder = write(adata(6, GENES), tmp_path / "a.zarr")
    path = Path(shutil.make_archive(str(tmp_path / "a.zarr"), "zip", folder))
    assert peek(path).format == "zarr zip"
    np.testing.assert_array_equal(dense(read_matrix(path, "X")), counts(6, 5).toarray())


def test_pickled_zarr_arrays_are_refused(tmp_path: Path) -> None:
    data = adata(4, GENES)
    data.obs["batch"] = list("abab")
    with ad.settings.override(zarr_write_format=2):
        path = write(data, tmp_path / "a.zarr")
    index = next(p for p in (path / "obs").rglob(".zarray") if p.parent.name in ("_index", "index"))
    meta = json.loads(index.read_text())
    meta["dtype"], meta["filters"] = "|O", [{"id": "pickle", "protocol": 5}]
    index.write_text(json.dumps(meta))
    (path / ".zmetadata").unlink(missing_ok=True)
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X")
    assert caught.value.code == "data.pickle"
