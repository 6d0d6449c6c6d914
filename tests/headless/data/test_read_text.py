"""Tables of text: which way round, which separator, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headless.data.read import peek, read_matrix
from headless.errors import MosaicError

BARCODES = [f"AAACCCAAGATT{a}{b}-1" for a in "ACGT" for b in "ACGT"]
GENES = ["ACTB", "MT-CO1", "NA", "CD3E", "RPL11"]


def table() -> pd.DataFrame:
    values = np.random.default_rng(1).poisson(1.0, (16, 5))
    return pd.DataFrame(values, index=BARCODES, columns=GENES)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv.gz", ","), ("t.txt", ";")])
def test_both_ways_round_with_every_separator(tmp_path: Path, turned: bool, name: str, mark: str) -> None:
    path = tmp_path / name
    data = table()
    (data.T if turned else data).to_csv(path, sep=mark)
    info = peek(path)
    assert info.format == ("tsv" if mark == "\t" else "csv")
    (matrix,) = info.matrices
    assert (matrix.modality, matrix.n_cells, matrix.n_features, matrix.counts) == ("rna", 16, 5, "counts")
    assert ("features x cells" if turned else "cells x features") in matrix.reason
    assert "barcodes" in matrix.reason
    got = read_matrix(path, "X")
    np.testing.assert_array_equal(got.x.toarray(), data.to_numpy())
    assert got.barcodes.tolist() == BARCODES
    assert got.features.index.tolist() == GENES


def test_short_header_of_r(tmp_path: Path) -> None:
    path = tmp_path / "r.tsv"
    lines = table().T.to_csv(sep="\t").splitlines()
    path.write_text("\n".join([lines[0][1:], *lines[1:]]) + "\n")
    got = read_matrix(path, "X")
    assert got.barcodes.tolist() == BARCODES
    np.testing.assert_array_equal(got.x.toarray(), table().to_numpy())


def test_orientation_from_feature_names_where_cells_have_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "adt.csv"
    data = pd.DataFrame([[1, 2, 3], [4, 5, 6]], index=["CD3", "CD19"], columns=["c1", "c2", "c3"])
    data.to_csv(path)
    (info,) = peek(path).matrices
    assert (info.modality, info.n_cells, info.n_features) == ("adt", 3, 2)
    assert "row names look like features" in info.reason


def test_file_name_is_asked_last(tmp_path: Path) -> None:
    path = tmp_path / "pbmc_rna_counts.csv"
    pd.DataFrame([[1, 2]], index=["c1"], columns=["foo1", "foo2"]).to_csv(path)
    (info,) = peek(path).matrices
    assert info.modality == "rna"
    assert info.reason.startswith("'rna' in the file name")


def test_rows_beyond_the_preview_are_counted_and_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headless.data.readers import text

    monkeypatch.setattr(text, "_HEAD_LINES", 6)
    monkeypatch.setattr(text, "_BLOCK", 20)
    path = tmp_path / "t.csv"
    table().to_csv(path)
    (info,) = peek(path).matrices
    assert info.n_cells == 16
    np.testing.assert_array_equal(read_matrix(path, "X").x.toarray(), table().to_numpy())
    monkeypatch.setattr(text, "_COUNTED_BYTES", 10)
    (info,) = peek(path).matrices
    assert "about" in info.reason
    assert 12 <= info.n_cells <= 20


@pytest.mark.parametrize(
    ("line", "text", "code", "word"),
    [
        (3, "AAACCCAAGATTAC-1,1,0,2", "data.ragged", "line 3 has 4 fields instead of 6"),
        (3, "AAACCCAAGATTAC-1,1,0,2,0,0,9", "data.ragged", "line 3 has 7 fields"),
        (4, "AAACCCAAGATTAG-1,1,0,high,0,0", "data.not_numbers", "line 4, column 'NA' holds 'high'"),
        (4, "AAACCCAAGATTAG-1,1,,2,0,0", "data.not_numbers", "line 4, column 'MT-CO1' holds nothing"),
        (4, "AAACCCAAGATTAG-1,1,nan,2,0,0", "data.not_numbers", "'nan'"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_faulty_lines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: int, text: str, code: str, word: str, deep: bool
) -> None:
    from headless.data.readers import text as reader

    if deep:  # beyond the lines that a preview looks at
        monkeypatch.setattr(reader, "_HEAD_LINES", 1)
    path = tmp_path / "t.csv"
    lines = table().to_csv().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X")
    assert caught.value.code == code
    assert word in caught.value.message
    assert caught.value.where["file"] == str(path)
    if not deep and "nan" not in text:
        with pytest.raises(MosaicError) as caught:
            peek(path)
        assert caught.value.code == code


def test_fractions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    (table() * 0.5).to_csv(path)
    assert peek(path).matrices[0].counts.startswith("not counts: values 0.5")
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X")
    assert caught.value.code == "data.not_counts"


def test_header_alone_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("cell,ACTB,B2M\n")
    with pytest.raises(MosaicError) as caught:
        peek(path)
    assert caught.value.code == "data.empty"


def test_cut_off_gzip(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(table().to_csv().encode())[:-40])
    with pytest.raises(MosaicError) as caught:
        read_matrix(path, "X")
    assert caught.value.code == "data.truncated"
