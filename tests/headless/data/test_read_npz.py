"""NumPy archives: sparse and dense, names inside and beside, no pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from headless.data.read import peek, read_matrix
from headless.errors import MosaicError

X = np.array([[1, 0, 2], [0, 3, 0], [4, 0, 0], [0, 0, 5]], dtype=np.int64)
CELLS = np.array(["c1", "c2", "c3", "c4"])
GENES = np.array(["ACTB", "B2M", "GAPDH"])


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("turned", [False, True])
def test_sparse_with_names_beside(tmp_path: Path, layout: str, turned: bool) -> None:
    path = tmp_path / "pbmc.npz"
    sp.save_npz(path, sp.coo_matrix(X.T if turned else X).asformat(layout))
    (tmp_path / "pbmc_barcodes.tsv").write_text("barcode\n" + "\n".join(CELLS) + "\n")
    (tmp_path / "pbmc.features.txt").write_text("\n".join(GENES) + "\n")
    info = peek(path)
    assert info.format == "npz"
    (matrix,) = info.matrices
    assert (matrix.key, matrix.modality, matrix.n_cells, matrix.n_features) == ("X", "rna", 4, 3)
    assert ("features x cells" in matrix.reason) == turned
    got = read_matrix(path, "X")
    np.testing.assert_array_equal(got.x.toarray(), X)
    assert got.barcodes.tolist() == CELLS.tolist()
    assert got.features.index.tolist() == GENES.tolist()


def test_sparse_with_names_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    csr = sp.csr_matrix(X)
    np.savez_compressed(
        path, format=b"csr", shape=csr.shape, data=csr.data, indices=csr.indices, indptr=csr.indptr,
        barcodes=CELLS, genes=GENES.astype("S8"), batch=np.array(["x", "x", "y", "y"]), depth=X.sum(1),
    )  # fmt: skip
    assert {c.name: c.kind for c in peek(path).obs_columns} == {"batch": "text", "depth": "integer"}
    got = read_matrix(path, "X")
    np.testing.assert_array_equal(got.x.toarray(), X)
    assert got.obs["batch"].tolist() == ["x", "x", "y", "y"]
    assert got.features.index.tolist() == GENES.tolist()


def test_plain_arrays_with_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, rna=X, adt=X[:, :2], barcodes=CELLS, rna_features=GENES, adt_features=np.array(["CD3", "CD19"]))
    assert [(m.key, m.modality, m.reason) for m in peek(path).matrices] == [
        ("rna", "rna", "named 'rna'"),
        ("adt", "adt", "named 'adt'"),
    ]
    np.testing.assert_array_equal(read_matrix(path, "adt").x.toarray(), X[:, :2])


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, X=X, barcodes=CELLS.astype(object), genes=GENES)
    for attempt in (peek, lambda p: read_matrix(p, "X")):
        with pytest.raises(MosaicError) as caught:
            attempt(path)
        assert caught.value.code == "data.pickle"
        assert "'barcodes'" in caught.value.message


def test_names_are_needed_and_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, X=X)
    with pytest.raises(MosaicError) as caught:
        peek(path)
    assert caught.value.code == "data.no_names"
    assert "a_barcodes.tsv" in caught.value.hint
    np.savez(path, X=X, barcodes=CELLS[:2], genes=GENES)
    with pytest.raises(MosaicError) as caught:
        peek(path)
    assert caught.value.code == "data.mismatch"


def test_fractions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, X=X / 4, barcodes=CELLS, genes=GENES)
    assert peek(path).matrices[0].counts == "not counts: values 0.25, 0.5, 0.75"
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X")
    assert caught.value.code == "data.not_counts"
    sp.save_npz(path, sp.csr_matrix(-X))
    (tmp_path / "a_barcodes.tsv").write_text("\n".join(CELLS))
    (tmp_path / "a_genes.tsv").write_text("\n".join(GENES))
    with pytest.raises(MosaicError, match="not raw counts"):
        read_matrix(path, "X")


def test_cut_off_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, X=X, barcodes=CELLS, genes=GENES)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(MosaicError) as caught:
        peek(path)
    assert caught.value.code == "data.truncated"
