"""Cell Ranger output, HDF5 and folders, of both generations."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from headless.data.read import peek, read_matrix
from headless.data.sources import ZarrRows
from headless.errors import MosaicError

BARCODES = ["AAACCCAAGATTGTGA-1", "AAACCCACATCGGTTA-1", "AAACCCAGTACCGCGT-1", "AAACCCAGTATCGAAA-1"]
#: name, id, type, genome, interval
MULTI = [
    ("ACTB", "ENSG1", "Gene Expression", "GRCh38", "chr7:5526408-5563902"),
    ("TBCE", "ENSG2", "Gene Expression", "GRCh38", "chr1:235367359-235452443"),
    ("TBCE", "ENSG3", "Gene Expression", "GRCh38", "chr1:235367300-235448952"),
    ("CD3", "CD3_TotalSeqB", "Antibody Capture", "", ""),
    ("chr1:100-900", "chr1:100-900", "Peaks", "GRCh38", "chr1:100-900"),
    ("chrX:5-600", "chrX:5-600", "Peaks", "GRCh38", "chrX:5-600"),
    ("guide1", "guide1", "CRISPR Guide Capture", "", ""),
]


def cells(d: int) -> np.ndarray:
    return np.random.default_rng(3).poisson(2.0, (4, d)) + np.eye(4, d, dtype=int)


def write_csc(group: h5py.Group, x: np.ndarray) -> None:
    csc = sp.csc_matrix(x.T.astype(np.int32))
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(csc, name)
    group["shape"] = np.array(csc.shape, dtype=np.int32)
    group["barcodes"] = np.array(BARCODES, dtype="S18")


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    path = tmp_path / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "w") as file:
        write_csc(file.create_group("matrix"), cells(7))
        features = file.create_group("matrix/features")
        for i, name in enumerate(("name", "id", "feature_type", "genome", "interval")):
            features[name] = np.array([row[i] for row in MULTI], dtype="S40")
        features["_all_tag_keys"] = np.array([b"genome", b"interval"])
    return path


def test_feature_types_are_matrices(v3: Path) -> None:
    info = peek(v3)
    assert info.format == "10x h5"
    assert [(m.key, m.modality, m.n_cells, m.n_features, m.genome) for m in info.matrices] == [
        ("Gene Expression", "rna", 4, 3, "GRCh38"),
        ("Antibody Capture", "adt", 4, 1, None),
        ("Peaks", "atac", 4, 2, "GRCh38"),
        ("CRISPR Guide Capture", None, 4, 1, None),
    ]
    assert info.matrix("Peaks").reason == "feature type 'Peaks'"
    assert info.matrix("CRISPR Guide Capture").reason.startswith("skipped")


@pytest.mark.parametrize("on_disk", [False, True])
def test_values_identifiers_and_intervals(v3: Path, on_disk: bool) -> None:
    rna = read_matrix(v3, "Gene Expression", on_disk=on_disk)
    x = rna.x.all_rows().to_scipy() if isinstance(rna.x, ZarrRows) else rna.x
    assert isinstance(rna.x, ZarrRows) == on_disk
    np.testing.assert_array_equal(x.toarray(), cells(7)[:, :3])
    assert rna.barcodes.tolist() == BARCODES
    assert rna.features.index.tolist() == ["ACTB", "TBCE", "TBCE-1"]
    assert rna.features["id"].tolist() == ["ENSG1", "ENSG2", "ENSG3"]
    assert rna.features["chrom"].tolist() == ["chr7", "chr1", "chr1"]
    assert rna.features["start"].tolist() == [5526408, 235367359, 235367300]
    atac = read_matrix(v3, "Peaks", on_disk=on_disk)
    assert atac.features["end"].tolist() == [900, 600]
    assert atac.features["feature_type"].tolist() == ["Peaks", "Peaks"]


def test_guides_are_not_read_unless_named(v3: Path) -> None:
    with pytest.raises(MosaicError) as caught:
        read_matrix(v3, "CRISPR Guide Capture")
    assert caught.value.code == "data.unknown_modality"
    with pytest.raises(MosaicError) as caught:
        read_matrix(v3, "Hashtags")
    assert caught.value.code == "data.no_matrix"
    assert "Peaks" in caught.value.hint


def test_one_group_a_genome_before_cell_ranger_3(tmp_path: Path) -> None:
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        for genome, d in (("GRCh38", 3), ("mm10", 2)):
            group = file.create_group(genome)
            write_csc(group, cells(d))
            group["genes"] = np.array([f"ENSG{i:08d}" for i in range(d)], dtype="S20")
            group["gene_names"] = np.array(["ACTB", "B2M", "GAPDH"][:d], dtype="S20")
    info = peek(path)
    assert [(m.key, m.modality, m.n_features, m.genome) for m in info.matrices] == [
        ("GRCh38", "rna", 3, "GRCh38"),
        ("mm10", "rna", 2, "mm10"),
    ]
    mouse = read_matrix(path, "mm10")
    np.testing.assert_array_equal(mouse.x.toarray(), cells(2))
    assert mouse.features["id"].tolist() == ["ENSG00000000", "ENSG00000001"]


def test_two_genomes_in_one_table(v3: Path) -> None:
    with h5py.File(v3, "r+") as file:
        genome = file["matrix/features/genome"]
        genome[...] = np.array([b"GRCh38", b"mm10", b"mm10", b"", b"GRCh38", b"GRCh38", b""])
    assert peek(v3).matrix("Gene Expression").genome == "GRCh38+mm10"
    assert read_matrix(v3, "Gene Expression").features["genome"].tolist() == ["GRCh38", "mm10", "mm10"]


def put(path: Path, text: str, zipped: bool) -> None:
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def folder(path: Path, zipped: bool = True, prefix: str = "", old: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    d = 3 if old else 7
    put(path / f"{prefix}barcodes.tsv", "\n".join(BARCODES) + "\n", zipped)
    rows = [f"{r[1]}\t{r[0]}" if old else f"{r[1]}\t{r[0]}\t{r[2]}" for r in MULTI[:d]]
    put(path / f"{prefix}{'genes' if old else 'features'}.tsv", "\n".join(rows) + "\n", zipped)
    target = path / f"{prefix}matrix.mtx"
    scipy.io.mmwrite(str(target), sp.coo_matrix(cells(d).T), field="integer")
    if zipped:
        put(target, target.read_text(), True)
        target.unlink()
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("prefix", ["", "GSM1_pbmc_"])
def test_folders(tmp_path: Path, zipped: bool, prefix: str) -> None:
    path = folder(tmp_path / "sample", zipped, prefix)
    info = peek(path)
    assert info.format == "10x mtx"
    assert [(m.key, m.modality, m.n_cells, m.n_features) for m in info.matrices[:3]] == [
        ("Gene Expression", "rna", 4, 3),
        ("Antibody Capture", "adt", 4, 1),
        ("Peaks", "atac", 4, 2),
    ]
    atac = read_matrix(path, "Peaks")
    np.testing.assert_array_equal(atac.x.toarray(), cells(7)[:, 4:6])
    assert atac.features["chrom"].tolist() == ["chr1", "chrX"]
    assert atac.barcodes.tolist() == BARCODES
    assert read_matrix(path, "Gene Expression").features.index.tolist() == ["ACTB", "TBCE", "TBCE-1"]


def test_folder_of_genes_before_cell_ranger_3(tmp_path: Path) -> None:
    path = folder(tmp_path / "hg19", zipped=False, old=True)
    (info,) = peek(path).matrices
    assert (info.key, info.modality) == ("matrix", "rna")
    np.testing.assert_array_equal(read_matrix(path, "matrix").x.toarray(), cells(3))


def test_square_matrix_is_not_turned(tmp_path: Path) -> None:
    path = folder(tmp_path / "s")
    with gzip.open(path / "features.tsv.gz", "wt") as stream:
        stream.write("".join(f"E{i}\tRPL{i}\tGene Expression\n" for i in range(4)))
    scipy.io.mmwrite(str(path / "matrix.mtx"), sp.coo_matrix(cells(4).T), field="integer")
    (path / "matrix.mtx.gz").unlink()
    np.testing.assert_array_equal(read_matrix(path, "Gene Expression").x.toarray(), cells(4))


def test_several_samples_in_a_folder_are_kept_apart(tmp_path: Path) -> None:
    path = folder(folder(tmp_path / "geo", prefix="a_"), prefix="b_")
    with pytest.raises(MosaicError) as caught:
        peek(path)
    assert caught.value.code == "data.several_matrices"
    assert peek(path / "b_matrix.mtx.gz").matrices[0].n_cells == 4


def test_peaks_of_cell_ranger_atac(tmp_path: Path) -> None:
    path = folder(tmp_path / "atac", zipped=False, old=True)
    (path / "genes.tsv").unlink()
    (path / "peaks.bed").write_text("chr1\t10\t400\nchr1\t500\t900\nchr2\t1\t300\n")
    (info,) = peek(path).matrices
    assert (info.key, info.modality) == ("Peaks", "atac")
    features = read_matrix(path, "Peaks").features
    assert features.index.tolist() == ["chr1:10-400", "chr1:500-900", "chr2:1-300"]
    assert features["start"].tolist() == [10, 500, 1]


def test_fractions_in_a_folder_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "s", zipped=False, old=True)
    scipy.io.mmwrite(str(path / "matrix.mtx"), sp.coo_matrix(cells(3).T * 0.25))
    assert peek(path).matrices[0].counts.startswith("not counts: values 0.25")
    with pytest.raises(MosaicError, match="not raw counts"):
        read_matrix(path, "matrix")


@pytest.mark.parametrize(("name", "code"), [("barcodes.tsv", "data.mismatch"), ("genes.tsv", "data.mismatch")])
def test_names_that_do_not_fit_the_matrix(tmp_path: Path, name: str, code: str) -> None:
    path = folder(tmp_path / "s", zipped=False, old=True)
    lines = (path / name).read_text().splitlines()
    (path / name).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "matrix")
    assert caught.value.code == code


def test_cut_off_matrix_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "s", zipped=True, old=True)
    file = path / "matrix.mtx.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "matrix")
    assert caught.value.code == "data.truncated"
    plain = folder(tmp_path / "t", zipped=False, old=True)
    text = (plain / "matrix.mtx").read_text().splitlines()
    (plain / "matrix.mtx").write_text("\n".join(text[:-3]) + "\n")
    with pytest.raises(MosaicError) as caught:
        read_matrix(plain, "matrix")
    assert caught.value.code in ("data.truncated", "data.unreadable")
