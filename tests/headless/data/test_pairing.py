from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headless.data.pairing import join
from headless.errors import MosaicError


def names(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=object)


def test_cells_are_joined_by_barcode_whatever_the_order_of_rows() -> None:
    joined = join("b", {"adt": names("C A X"), "rna": names("A B C")})
    assert joined.barcodes.tolist() == ["A", "B", "C", "X"]
    assert joined.rows["rna"].tolist() == [0, 1, 2]
    assert joined.cells["rna"].tolist() == [0, 1, 2]
    assert joined.rows["adt"].tolist() == [1, 0, 2]
    assert joined.cells["adt"].tolist() == [0, 2, 3]


def test_the_report_counts_matched_extra_and_repeated_barcodes() -> None:
    report = join("b", {"rna": names("A B C B"), "adt": names("C A X Y")}, duplicates="first").report
    assert (report.n_cells, report.matched) == (5, 2)
    assert report.extra == {"rna": 1, "adt": 2}
    assert report.duplicates == {"rna": 1, "adt": 0}
    assert report.in_words() == (
        "Batch b: 2 barcodes in all of rna, adt; 1 extra in rna, 2 extra in adt; repeated barcodes: 1 in rna."
    )
    assert json.loads(report.model_dump_json())["matched"] == 2


def test_an_intersection_keeps_cells_that_have_everything() -> None:
    joined = join("b", {"rna": names("A B C"), "adt": names("C A X")}, how="intersection")
    assert joined.barcodes.tolist() == ["A", "C"]
    assert joined.rows["adt"].tolist() == [1, 0]
    assert joined.report.left_out == 2


def test_an_empty_intersection_is_an_error_that_names_the_batch() -> None:
    with pytest.raises(MosaicError, match="batch b1") as caught:
        join("b1", {"rna": names("A"), "adt": names("X")}, how="intersection", may_be_disjoint=True)
    assert caught.value.code == "data.no_cells"


@pytest.mark.parametrize(("rna", "adt"), [("A-1 B-1", "B A"), ("A B", "B-1 A-1"), ("A-1 B-1", "B-2 A-2")])
def test_an_ending_is_left_out_only_where_it_makes_barcodes_match_and_is_told(rna: str, adt: str) -> None:
    joined = join("b", {"rna": names(rna), "adt": names(adt)})
    assert joined.barcodes.tolist() == rna.split()
    assert joined.rows["adt"].tolist() == [1, 0]
    assert joined.report.suffix == ("adt",)
    assert "'-1'" in joined.report.in_words()


def test_an_ending_stays_where_barcodes_match_with_it() -> None:
    joined = join("b", {"rna": names("A-1 B-1 A-2"), "adt": names("A-1 B-2")})
    assert joined.barcodes.tolist() == ["A-1", "B-1", "A-2", "B-2"]
    assert joined.report.suffix == ()


def test_an_ending_stays_where_it_tells_cells_apart() -> None:
    with pytest.raises(MosaicError) as caught:
        join("b", {"rna": names("A-1 A-2"), "adt": names("A")})
    assert caught.value.code == "data.no_shared_barcode"


def test_an_ending_stays_when_the_rule_is_switched_off() -> None:
    with pytest.raises(MosaicError) as caught:
        join("b", {"rna": names("A-1"), "adt": names("A")}, match_without_suffix=False)
    assert caught.value.code == "data.no_shared_barcode"


def test_modalities_without_a_common_barcode_are_refused_with_examples() -> None:
    with pytest.raises(MosaicError) as caught:
        join("day1", {"rna": names("AAC AAG"), "adt": names("cell_1")})
    assert caught.value.code == "data.no_shared_barcode"
    assert caught.value.where == {"batch": "day1", "modality": "adt"}
    assert "AAC" in caught.value.message
    assert "cell_1" in caught.value.message


def test_repeated_barcodes_are_refused_where_their_partners_are_ambiguous() -> None:
    with pytest.raises(MosaicError) as caught:
        join("b", {"rna": names("A B"), "adt": names("A A B")})
    assert caught.value.code == "data.duplicate_barcodes"
    assert caught.value.where["modality"] == "adt"


def test_repeated_barcodes_of_a_single_modality_are_different_cells() -> None:
    joined = join("b", {"rna": names("A B A")})
    assert joined.barcodes.tolist() == ["A", "B", "A#2"]
    assert joined.report.duplicates == {"rna": 1}


@given(st.lists(st.integers(0, 30), unique=True, min_size=1), st.lists(st.integers(0, 30), unique=True, min_size=1))
def test_every_row_goes_to_the_cell_of_its_barcode(first: list[int], second: list[int]) -> None:
    barcodes = {"rna": np.array([f"c{i}" for i in first], object), "adt": np.array([f"c{i}" for i in second], object)}
    joined = join("b", barcodes, may_be_disjoint=True, match_without_suffix=False)
    assert set(joined.barcodes) == set(barcodes["rna"]) | set(barcodes["adt"])
    for modality, own in barcodes.items():
        assert sorted(joined.rows[modality]) == list(range(len(own)))
        assert (np.diff(joined.cells[modality]) > 0).all()
        assert (own[joined.rows[modality]] == joined.barcodes[joined.cells[modality]]).all()
    assert joined.report.matched == len(set(first) & set(second))
