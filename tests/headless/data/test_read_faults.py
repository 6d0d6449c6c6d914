"""Every way in which an input file can be wrong is one MosaicError that names the file."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data.fingerprint import fingerprint
from headless.data.read import peek, read_matrix
from headless.errors import MosaicError


def adata(n: int = 300, d: int = 40) -> ad.AnnData:
    x = np.random.default_rng(0).poisson(1.0, (n, d)).astype(np.float32)
    x[:, 1] += 1
    names = [f"RPL{i}" for i in range(d)]
    return ad.AnnData(
        sp.csr_matrix(x), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=names)
    )


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    return path


@pytest.fixture
def zarr(tmp_path: Path) -> Path:
    path = tmp_path / "a.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata().write_zarr(path)
    return path


def fault(path: Path, attempt: Callable[[Path], object] = peek) -> MosaicError:
    with pytest.raises(MosaicError) as caught:
        attempt(path)
    assert path.name in str(caught.value.where["file"])
    assert caught.value.message
    return caught.value


def read_x(path: Path) -> object:
    return read_matrix(path, "X")


def test_missing_file(tmp_path: Path) -> None:
    assert fault(tmp_path / "gone.h5ad").code == "data.missing_file"
    assert fault(tmp_path / "gone.h5ad", fingerprint).code == "data.missing_file"


@pytest.mark.parametrize("name", ["a.h5mu", "a.h5ad", "a.csv", "a.npz", "a"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert fault(tmp_path / name).code == "data.empty"


def test_empty_folder_and_folder_with_nothing_known(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    assert fault(folder).code == "data.empty"
    (folder / "notes.docx").write_text("x")
    assert fault(folder).code == "data.unknown_format"
    (folder / "filtered").mkdir()
    (folder / "filtered" / "matrix.mtx.gz").touch()
    error = fault(folder)
    assert error.code == "data.unknown_format"
    assert "filtered" in error.hint


def test_matrix_without_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n1 1 1\n1 1 1\n")
    error = fault(folder)
    assert error.code == "data.unknown_format"
    assert "barcodes.tsv" in error.message


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.bin", bytes(range(256)) * 20, "no format known"),
        ("a.h5ad", b"this was never HDF5, only text", "named .h5ad"),
        ("a.txt", b"a letter to a friend\nwithout any table\n", "no format known"),
        ("a.h5mu", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("a.h5ad", b"<!DOCTYPE html><html>not found</html>", "web page"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "no format known"),
    ],
)
def test_no_data_file(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = fault(path)
    assert error.code == "data.unknown_format"
    assert word in error.message


def test_hdf5_and_zarr_of_another_kind(tmp_path: Path) -> None:
    import zarr

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)
    error = fault(path)
    assert error.code == "data.unknown_format"
    assert "images" in error.message
    zarr.open_group(str(tmp_path / "b.zarr"), mode="w").create_group("pixels")
    assert fault(tmp_path / "b.zarr").code == "data.unknown_format"


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_cut_off_h5ad_and_h5mu(h5ad: Path, tmp_path: Path, share: float) -> None:
    content = h5ad.read_bytes()
    h5ad.write_bytes(content[: int(len(content) * share)])
    assert fault(h5ad).code == "data.truncated"
    path = tmp_path / "m.h5mu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mudata.MuData({"rna": adata()}).write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert fault(path).code == "data.truncated"


def test_damage_inside_an_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\x00" * chunk.size
    path.write_bytes(content)
    assert fault(path, read_x).code in ("data.unreadable", "data.truncated")


@pytest.mark.parametrize("gone", ["X/indptr", "obs", "var/_index"])
def test_parts_missing_in_h5ad(h5ad: Path, gone: str) -> None:
    with h5py.File(h5ad, "r+") as file:
        del file[gone]
    assert fault(h5ad, read_x).code in ("data.truncated", "data.unreadable", "data.unknown_format")


@pytest.mark.parametrize("name", ["indptr", "indices"])
def test_sparse_matrix_that_contradicts_itself(h5ad: Path, name: str) -> None:
    with h5py.File(h5ad, "r+") as file:
        file[f"X/{name}"][5] = 100_000
    assert fault(h5ad, read_x).code == "data.unreadable"


def test_shape_unlike_the_names(h5ad: Path) -> None:
    with h5py.File(h5ad, "r+") as file:
        file["X"].attrs["shape"] = [300, 41]
    assert fault(h5ad, read_x).code == "data.unreadable"


@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "obs/_index"])
def test_zarr_with_missing_chunks(zarr: Path, array: str) -> None:
    chunks = [p for p in (zarr / array).rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr"))]
    assert chunks
    chunks[0].unlink()
    assert fault(zarr, read_x).code in ("data.truncated", "data.unreadable")
    with pytest.raises(MosaicError):
        read_matrix(zarr, "X", on_disk=True)


def test_zarr_with_a_damaged_chunk(zarr: Path) -> None:
    chunk = next(p for p in (zarr / "X/data").rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr")))
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert fault(zarr, read_x).code in ("data.truncated", "data.unreadable")


def test_zarr_column_of_one_level_needs_no_chunk(tmp_path: Path) -> None:
    data = adata(6, 5)
    data.obs["batch"] = pd.Categorical(["only"] * 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.write_zarr(tmp_path / "a.zarr")  # codes are all zero, so zarr writes no chunk for them
    assert read_matrix(tmp_path / "a.zarr", "X").obs["batch"].tolist() == ["only"] * 6


def test_no_permission(h5ad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "posix" and os.geteuid() != 0:
        h5ad.chmod(0)
    else:  # root may read anything

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(h5ad))

        monkeypatch.setattr(Path, "open", refuse)
    for attempt in (peek, read_x, fingerprint):
        error = fault(h5ad, attempt)
        assert error.code == "data.no_permission"
        assert error.exit_code == 3


def test_no_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    ad.AnnData(sp.csr_matrix((0, 3), dtype=np.float32), var=pd.DataFrame(index=["ACTB", "B2M", "CD3E"])).write_h5ad(
        path
    )
    assert fault(path, read_x).code == "data.empty"


def test_not_a_number_among_counts(tmp_path: Path) -> None:
    data = adata()
    data.X.data[7] = np.nan
    data.write_h5ad(tmp_path / "a.h5ad")
    error = fault(tmp_path / "a.h5ad", read_x)
    assert error.code == "data.not_counts"
    assert "nan" in error.message


def test_unknown_key_and_layer(h5ad: Path) -> None:
    assert fault(h5ad, lambda p: read_matrix(p, "mod/rna")).code == "data.no_matrix"
    error = fault(h5ad, lambda p: read_matrix(p, "X", "layers/counts"))
    assert error.code == "data.no_layer"
    assert "X" in error.hint


def test_reading_changes_nothing(h5ad: Path, zarr: Path) -> None:
    def state(path: Path) -> list[tuple[str, str, int]]:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [(str(p), hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files]

    for path in (h5ad, zarr):
        before = state(path)
        peek(path)
        fingerprint(path)
        read_matrix(path, "X")
        lazy = read_matrix(path, "X", on_disk=True)
        lazy.x.rows(np.array([3, 1]))
        assert state(path) == before
    path = h5ad
    path.chmod(0o444)
    assert read_matrix(path, "X").x.shape == (300, 40)


def test_a_file_that_is_being_written_elsewhere(h5ad: Path) -> None:
    import subprocess
    import sys

    hold = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'r+', locking=True); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(h5ad)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        assert fault(h5ad).code == "data.locked"
    finally:
        process.communicate("")
