"""Fingerprints, and the reference that a project keeps of a file."""

from __future__ import annotations

import time
from pathlib import Path, PurePosixPath

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data.datasets import DatasetRef
from headless.data.fingerprint import BLOCK, BLOCKS, fingerprint
from headless.data.matrix import FileInfo, MatrixInfo, ObsColumn
from headless.data.propose import dataset_id, propose
from headless.data.read import peek
from headless.errors import MosaicError


def matrix(key: str = "mod/rna", modality: str | None = "rna", counts: str = "counts", n: int = 10) -> MatrixInfo:
    return MatrixInfo(key, modality, f"reason of {key}", n, 5, "X", "", ("X", "layers/counts"), counts)


def info(path: Path, *matrices: MatrixInfo, columns: tuple[str, ...] = ()) -> FileInfo:
    path.touch()
    listed = tuple(ObsColumn(name, "categorical", 2, ("a", "b")) for name in columns)
    return FileInfo(path, "h5mu", matrices or (matrix(),), listed)


def refused(found: FileInfo, **choices: object) -> MosaicError:
    with pytest.raises(MosaicError) as caught:
        propose(found, found.path.parent, **choices)  # type: ignore[arg-type]
    assert caught.value.where["file"] == str(found.path)
    return caught.value


def test_from_file_to_reference_and_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "study").mkdir()
    path = tmp_path / "data" / "my pbmc (1).h5ad"
    data = ad.AnnData(
        sp.csr_matrix(np.eye(4, dtype=np.float32) * 2),
        obs=pd.DataFrame({"donor": list("ppqq")}, index=list("abcd")),
        var=pd.DataFrame(index=["ACTB", "B2M", "CD3E", "RPL3"]),
    )
    data.write_h5ad(path)
    ref = propose(peek(path), tmp_path / "study", None, None)
    assert ref.id == "my_pbmc_1"
    assert ref.path == "../data/my pbmc (1).h5ad"
    assert (tmp_path / "study" / PurePosixPath(ref.path)).resolve() == path
    assert Path(ref.absolute) == path
    assert ref.fingerprint == fingerprint(path)
    assert [(m.key, m.modality, m.layer) for m in ref.matrices] == [("X", "rna", "X")]
    assert (ref.batch_column, ref.batch_name) == ("donor", None)
    assert DatasetRef.model_validate_json(ref.model_dump_json()) == ref


def test_a_link_to_data_is_kept_as_a_link(tmp_path: Path) -> None:
    target = info(tmp_path / "m.h5mu").path
    link = tmp_path / "link.h5mu"
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no right to make links here")
    ref = propose(info(link), tmp_path)
    assert (ref.id, ref.path) == ("link", "link.h5mu")


@pytest.mark.parametrize(
    ("columns", "batch", "expected"),
    [
        (("cell_type", "batch", "sample"), None, ("batch", None)),
        (("Sample_ID",), None, ("Sample_ID", None)),
        (("orig.ident",), None, ("orig.ident", None)),
        (("phase",), None, (None, "m")),
        (("batch",), "", (None, "m")),
        (("phase",), "phase", ("phase", None)),
        (("rna:lane", "adt:lane"), "rna:lane", ("rna:lane", None)),
        (("batch",), "rna:batch", ("batch", None)),
    ],
)
def test_batch_column(
    tmp_path: Path, columns: tuple[str, ...], batch: str | None, expected: tuple[str | None, str | None]
) -> None:
    ref = propose(info(tmp_path / "m.h5mu", columns=columns), tmp_path, batch)
    assert (ref.batch_column, ref.batch_name) == expected


def test_label_column(tmp_path: Path) -> None:
    found = info(tmp_path / "m.h5mu", columns=("cell_type", "louvain"))
    assert propose(found, tmp_path).label_column == "cell_type"
    assert propose(found, tmp_path, label="louvain").label_column == "louvain"
    assert propose(found, tmp_path, label="").label_column is None


def test_measurements_are_no_batches(tmp_path: Path) -> None:
    (tmp_path / "m.h5mu").touch()
    columns = (ObsColumn("batch", "number", 9), ObsColumn("sample", "text", None), ObsColumn("donor", "text", 5000))
    found = FileInfo(tmp_path / "m.h5mu", "h5mu", (matrix(),), columns)
    assert propose(found, tmp_path).batch_column is None


def test_unknown_column_names_near_ones(tmp_path: Path) -> None:
    found = info(tmp_path / "m.h5mu", columns=("batch", "rna:lane"))
    error = refused(found, batch="bach")
    assert (error.code, error.field) == ("data.no_column", "batch_column")
    assert "'batch'" in error.hint
    assert "'rna:lane'" in refused(found, batch="lane").hint
    assert "batch, rna:lane" in refused(found, label="zzzz").hint
    assert refused(found, label="zzzz").field == "label_column"


def test_unrecognised_matrices_are_left_out_and_said(tmp_path: Path) -> None:
    found = info(tmp_path / "m.h5mu", matrix(), matrix("mod/hto", None))
    (ref,) = propose(found, tmp_path).matrices
    assert ref.key == "mod/rna"
    assert "mod/hto left out" in ref.reason
    assert refused(info(tmp_path / "n.h5mu", matrix("X", None))).code == "data.unknown_modality"
    chosen = propose(found, tmp_path, modalities={"mod/hto": "adt", "mod/rna": None})
    assert [(m.key, m.modality) for m in chosen.matrices] == [("mod/hto", "adt")]
    assert refused(found, modalities={"mod/hto": "proteome"}).code == "data.unknown_modality"
    assert refused(found, modalities={"mod/xyz": "adt"}).code == "data.no_matrix"


def test_of_two_matrices_of_a_modality_the_larger_is_kept(tmp_path: Path) -> None:
    for order in (1, -1):
        pair = [matrix("GRCh38", n=100), matrix("mm10", n=10)][::order]
        (ref,) = propose(info(tmp_path / "m.h5", *pair), tmp_path).matrices
        assert ref.key == "GRCh38"
        assert "mm10 left out" in ref.reason


def test_no_counts_are_refused_until_a_layer_is_chosen(tmp_path: Path) -> None:
    found = info(tmp_path / "m.h5mu", matrix(counts="not counts: values 0.31, 1.76"))
    error = refused(found)
    assert error.code == "data.not_counts"
    assert "values 0.31, 1.76" in error.message
    assert "layers/counts" in error.hint
    (ref,) = propose(found, tmp_path, layers={"mod/rna": "layers/counts"}).matrices
    assert ref.layer == "layers/counts"
    assert refused(found, layers={"mod/rna": "layers/umis"}).code == "data.no_layer"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pbmc10k.h5mu", "pbmc10k"),
        ("a.b.csv.gz", "a.b"),
        ("GSE1 (raw).tsv", "GSE1_raw"),
        ("atlas.zarr", "atlas"),
        ("S1/matrix.mtx.gz", "S1"),
        ("Blut ü.h5ad", "Blut_ü"),
        ("---.h5ad", "data"),
    ],
)
def test_names_of_datasets(name: str, expected: str) -> None:
    assert dataset_id(PurePosixPath("/x") / name) == expected


def test_fingerprint_sees_every_byte_of_small_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = bytearray(b"0123456789" * 1000)
    path.write_bytes(content)
    first = fingerprint(path)
    assert first.size == 10_000
    moved = path.rename(tmp_path / "elsewhere")
    assert fingerprint(moved) == first
    content[7777] = 0
    moved.write_bytes(content)
    assert fingerprint(moved) != first


def test_fingerprint_of_a_huge_file_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as stream:  # sparse: takes no room on the disk
        stream.truncate(40_000_000_000)
        stream.seek(39_999_999_999)
        stream.write(b"x")
    start = time.perf_counter()
    first = fingerprint(path)
    assert time.perf_counter() - start < 1.0
    with path.open("r+b") as stream:
        stream.seek(0)
        stream.write(b"y")
    assert fingerprint(path) != first


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    big = np.random.default_rng(0).bytes(BLOCK * (BLOCKS + 2))
    (folder / "sub" / "b").write_bytes(big)
    (folder / "a").write_bytes(b"aa")
    first = fingerprint(folder)
    assert first.size == len(big) + 2
    assert fingerprint(folder.rename(tmp_path / "g")) == first
    (tmp_path / "g" / "a").rename(tmp_path / "g" / "c")
    second = fingerprint(tmp_path / "g")
    assert second != first
    assert second.size == first.size
    (tmp_path / "g" / "sub" / "b").write_bytes(big[:-1] + b"!")
    assert fingerprint(tmp_path / "g") != second
