"""From matrices in memory to a mosaic: known answers, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headless.data.batching import Part
from headless.data.build import assemble, pairing_reports, quality, suggest_qc
from headless.data.mosaic import Layout, Mosaic
from headless.data.preparation import Preparation, Thresholds
from headless.errors import MosaicError

MakePart = Callable[..., Part]


def dense(mosaic: Mosaic, batch: str, modality: str) -> pd.DataFrame:
    """A tile as a table: cell names x feature names."""
    tile = mosaic.tiles[batch, modality]
    values = tile.source.all_rows().to_scipy().toarray()
    return pd.DataFrame(values, index=mosaic.cells.index[tile.cells], columns=mosaic.features[modality].index)


def shuffled(part: Part, seed: int) -> Part:
    order = np.random.default_rng(seed).permutation(len(part.matrix.barcodes))
    matrix = replace(
        part.matrix, x=part.matrix.x[order], barcodes=part.matrix.barcodes[order], obs=part.matrix.obs.iloc[order]
    )
    label = None if part.label is None else part.label[order]
    return replace(part, matrix=matrix, batch=part.batch[order], label=label)


def same(first: Mosaic, second: Mosaic) -> None:
    """Equal cell by cell, whatever the order of batches."""
    assert set(first.batches) == set(second.batches)
    assert first.tiles.keys() == second.tiles.keys()
    for modality in first.features:
        assert first.features[modality].index.tolist() == second.features[modality].index.tolist()
    for key, tile in first.tiles.items():
        pd.testing.assert_frame_equal(dense(first, *key), dense(second, *key))
        masks = [np.ones(5) if t.mask is None else t.mask for t in (tile, second.tiles[key])]
        np.testing.assert_array_equal(*masks)
    pd.testing.assert_frame_equal(first.cells, second.cells.loc[first.cells.index], check_like=True)


@pytest.fixture
def three(make_part: MakePart) -> list[Part]:
    """Batch one: RNA and protein of A B C and of B C X; batch two: protein; batch three: RNA with another panel."""
    return [
        make_part("one", "rna", [[1, 0, 2], [0, 3, 0], [4, 0, 0]], "ABC", ["CD3E", "g2", "g3"], label=["T", None, "B"]),
        make_part("one", "adt", [[1, 5], [2, 6], [3, 7]], ["C", "X", "B"], ["CD3_TotalSeqB", "IgG1"]),
        make_part("two", "adt", [[9, 8], [7, 0]], ["P", "Q"], ["cd4", "CD3"]),
        make_part("three", "rna", [[1, 1], [0, 2]], ["R", "S"], ["g3", "g4"]),
    ]


def test_cells_features_masks_and_values_of_a_small_mosaic(three: list[Part]) -> None:
    mosaic = assemble(three)
    assert mosaic.batches == ("one", "two", "three")
    assert mosaic.cells.index.tolist() == ["A", "B", "C", "X", "P", "Q", "R", "S"]
    assert mosaic.cells["batch"].tolist() == ["one"] * 4 + ["two"] * 2 + ["three"] * 2
    assert mosaic.cells["label"].tolist() == ["T", "unknown", "B"] + ["unknown"] * 5
    assert mosaic.modalities == ("rna", "adt")
    assert mosaic.features["rna"].index.tolist() == ["CD3E", "g2", "g3", "g4"]
    assert mosaic.features["adt"].index.tolist() == ["CD3", "CD4"]
    assert mosaic.features["adt"]["gene"].tolist() == ["CD3E", "CD4"]
    assert set(mosaic.tiles) == {("one", "rna"), ("one", "adt"), ("two", "adt"), ("three", "rna")}
    assert mosaic.tiles["one", "rna"].mask.tolist() == [True, True, True, False]
    assert mosaic.tiles["three", "rna"].mask.tolist() == [False, False, True, True]
    assert mosaic.tiles["one", "adt"].mask.tolist() == [True, False]
    assert mosaic.tiles["two", "adt"].mask is None
    expected = pd.DataFrame([[3, 0], [1, 0], [2, 0]], index=list("BCX"), columns=["CD3", "CD4"], dtype=np.float32)
    pd.testing.assert_frame_equal(dense(mosaic, "one", "adt"), expected)
    assert dense(mosaic, "two", "adt").to_numpy().tolist() == [[8, 9], [0, 7]]
    assert dense(mosaic, "three", "rna").to_numpy().tolist() == [[0, 0, 1, 1], [0, 0, 0, 2]]
    assert any("2 barcodes in all of rna, adt; 1 extra in rna, 1 extra in adt" in note for note in mosaic.notes)
    assert any("isotype controls left out: IgG1" in note for note in mosaic.notes)


def test_every_note_is_passed_on_when_it_is_made(three: list[Part]) -> None:
    heard: list[str] = []
    assert assemble(three, note=heard.append).notes == tuple(heard)


def test_input_matrices_are_not_changed(three: list[Part]) -> None:
    before = [part.matrix.x.toarray().copy() for part in three]
    names = [part.matrix.features.copy() for part in three]
    assemble(three, Preparation(n_top_genes=1, keep_genes=("g3", "g4")))
    for part, values, features in zip(three, before, names, strict=True):
        np.testing.assert_array_equal(part.matrix.x.toarray(), values)
        pd.testing.assert_frame_equal(part.matrix.features, features)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_rows_of_a_modality_does_not_matter(three: list[Part], seed: int) -> None:
    mosaic, again = assemble(three), assemble([three[0], shuffled(three[1], seed), three[2], three[3]])
    same(mosaic, again)
    assert again.cells.index.tolist() == mosaic.cells.index.tolist()
    assert again.notes == mosaic.notes


@given(order=st.permutations(range(4)))
@settings(max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_files_does_not_matter(three: list[Part], order: list[int]) -> None:
    same(assemble(three), assemble([three[i] for i in order]))


def test_batches_of_a_file_stand_in_natural_order_and_cells_without_batch_go(make_part: MakePart) -> None:
    part = make_part("f", "rna", np.eye(4), "abcd", list("wxyz"), batch=["day10", None, "day2", "day10"])
    mosaic = assemble([part])
    assert mosaic.batches == ("day2", "day10")
    assert mosaic.cells.index.tolist() == ["c", "a", "d"]
    assert "1 cells of f.h5mu:rna have no batch" in mosaic.notes[0]


def test_clashing_barcodes_get_the_name_of_their_batch(make_part: MakePart) -> None:
    parts = [make_part(name, "rna", [[1, 1], [1, 1]], ["A", "B"], ["g", "h"]) for name in ("x", "y")]
    mosaic = assemble(parts)
    assert mosaic.cells.index.tolist() == ["x:A", "x:B", "y:A", "y:B"]
    assert mosaic.cells["barcode"].tolist() == ["A", "B", "A", "B"]


def test_batches_are_renamed_merged_and_left_out(make_part: MakePart) -> None:
    part = make_part("f", "rna", np.eye(4) + 1, "abcd", list("wxyz"), batch=["1", "2", "3", "1"])
    edits = {"1": {"name": "both"}, "f:2": {"name": "both"}, "3": {"exclude": True}}
    mosaic = assemble([part], Preparation(batches=edits))
    assert mosaic.batches == ("both",)
    assert dense(mosaic, "both", "rna").loc[["a", "b", "d"]].to_numpy().tolist() == (np.eye(4) + 1)[[0, 1, 3]].tolist()


def test_a_batch_is_used_without_a_modality(make_part: MakePart) -> None:
    parts = [make_part("f", m, np.eye(4) + 1, "abcd", list("wxyz"), batch=["1", "1", "2", "2"]) for m in ("rna", "adt")]
    mosaic = assemble(parts, Preparation(batches={"2": {"without": ["adt"]}}))
    assert set(mosaic.tiles) == {("1", "rna"), ("1", "adt"), ("2", "rna")}
    assert any("2 of f is used without adt" in note for note in mosaic.notes)
    for left_out, code in ((["atac"], "data.unknown_modality"), (["rna", "adt"], "data.no_cells")):
        with pytest.raises(MosaicError) as caught:
            assemble(parts, Preparation(batches={"2": {"without": left_out}}))
        assert caught.value.code == code


def test_a_misspelt_batch_is_refused_with_the_nearest_name(make_part: MakePart) -> None:
    part = make_part("f", "rna", [[1]], "a", "g", batch="donor1")
    with pytest.raises(MosaicError, match="donor1") as caught:
        assemble([part], Preparation(batches={"doner1": {"exclude": True}}))
    assert caught.value.code == "data.unknown_batch"
    with pytest.raises(MosaicError) as caught:
        assemble([part], Preparation(qc={"doner1": {}}))
    assert caught.value.code == "data.unknown_batch"


def test_leaving_every_batch_out_leaves_no_cells(make_part: MakePart) -> None:
    with pytest.raises(MosaicError) as caught:
        assemble([make_part("f", "rna", [[1]], "a", "g")], Preparation(batches={"f": {"exclude": True}}))
    assert caught.value.code == "data.no_cells"


def test_merged_batches_of_files_with_other_panels_measure_what_both_have(make_part: MakePart) -> None:
    parts = [
        make_part("a", "rna", [[1, 2]], ["A"], ["g1", "g2"]),
        make_part("b", "rna", [[3, 4]], ["B"], ["g2", "g3"]),
    ]
    mosaic = assemble(parts, Preparation(batches={"b": {"name": "a"}}))
    assert dense(mosaic, "a", "rna")["g2"].tolist() == [2, 3]
    assert mosaic.features["rna"].index.tolist() == ["g2"]  # nothing is left of what only one of them measured
    assert mosaic.tiles["a", "rna"].mask is None


def test_batches_of_one_name_in_two_files_with_other_cells_are_kept_apart(make_part: MakePart) -> None:
    parts = [
        make_part("cite", "rna", [[1, 1]], ["A"], ["g", "h"], batch="s1"),
        make_part("cite", "adt", [[1]], ["A"], ["CD4"], batch="s1"),
        make_part("multi", "rna", [[1, 1]], ["B"], ["g", "h"], batch="s1"),
        make_part("multi", "atac", [[1]], ["B"], ["chr1:1-9"], batch="s1"),
    ]
    mosaic = assemble(parts)
    assert mosaic.batches == ("s1 (cite)", "s1 (multi)")
    assert ("s1 (multi)", "atac") in mosaic.tiles
    assert "kept apart" in mosaic.notes[0]


def test_files_that_share_the_cells_of_a_batch_are_joined(make_part: MakePart) -> None:
    parts = [
        make_part("rna_file", "rna", [[1], [2]], ["A-1", "B-1"], ["g"], batch="s1"),
        make_part("adt_file", "adt", [[5], [6]], ["B", "A"], ["CD4"], batch="s1"),
    ]
    mosaic = assemble(parts)
    assert mosaic.batches == ("s1",)
    assert dense(mosaic, "s1", "adt")["CD4"].to_dict() == {"A-1": 6, "B-1": 5}
    (report,) = pairing_reports(parts)
    assert (report.matched, report.suffix) == (2, ("adt",))
    assert any("'-1'" in note for note in mosaic.notes)


def test_the_same_cells_twice_are_refused(make_part: MakePart) -> None:
    parts = [make_part(name, "rna", [[1], [2]], ["A", "B"], ["g"], batch="s1") for name in ("x", "y")]
    with pytest.raises(MosaicError, match="x and y") as caught:
        assemble(parts)
    assert caught.value.code == "data.duplicate_cells"


def test_files_of_one_batch_without_common_barcodes_are_refused(make_part: MakePart) -> None:
    parts = [
        make_part("x", "rna", [[1]], ["A"], ["g"], batch="s1"),
        make_part("y", "adt", [[1]], ["B"], ["CD4"], batch="s1"),
    ]
    with pytest.raises(MosaicError) as caught:
        assemble(parts)
    assert caught.value.code == "data.no_shared_barcode"
    apart = assemble(parts, Preparation(batches={"y:s1": {"name": "s2"}}))
    assert apart.batches == ("s1", "s2")


def test_a_cell_may_miss_a_modality_inside_one_file(make_part: MakePart) -> None:
    parts = [
        make_part("f", "rna", [[1], [1]], ["A", "B"], ["g"], batch="s1"),
        make_part("f", "adt", [[1], [1]], ["C", "D"], ["CD4"], batch="s1"),
    ]
    mosaic = assemble(parts)
    assert mosaic.measured("rna").tolist() == [True, True, False, False]
    assert mosaic.measured("adt").tolist() == [False, False, True, True]


def test_cells_of_all_modalities_only(three: list[Part]) -> None:
    mosaic = assemble(three, Preparation(pairing="intersection"))
    assert mosaic.cells.index[mosaic.cells["batch"] == "one"].tolist() == ["B", "C"]


def test_labels_come_from_any_modality_and_other_columns_are_kept_once(make_part: MakePart) -> None:
    obs = {
        "rna": pd.DataFrame({"donor": ["d1", "d2"], "n_counts": [5, 6], "batch": ["q", "q"]}),
        "adt": pd.DataFrame({"donor": ["d2", "d3"], "n_counts": [50, 60]}),
    }
    mosaic = assemble(
        [
            make_part("f", "rna", [[1], [1]], ["A", "B"], ["g"], obs=obs["rna"]),
            make_part("f", "adt", [[1], [1]], ["B", "C"], ["CD4"], obs=obs["adt"], label=["NK", "B"]),
        ]
    )
    assert mosaic.cells["label"].tolist() == ["unknown", "NK", "B"]
    assert mosaic.cells["donor"].tolist() == ["d1", "d2", "d3"]
    assert mosaic.cells.columns[:3].tolist() == ["batch", "barcode", "label"]
    assert mosaic.cells["rna:n_counts"].tolist()[:2] == [5, 6]
    assert mosaic.cells["adt:n_counts"].tolist()[1:] == [50, 60]
    assert mosaic.cells["batch_in_file"].tolist()[:2] == ["q", "q"]


def test_labels_change_nothing_else(three: list[Part]) -> None:
    other = assemble([replace(part, label=None) for part in three])
    mosaic = assemble(three)
    assert "label" not in other.cells
    same(replace(mosaic, cells=mosaic.cells.drop(columns="label")), other)


def test_a_cell_must_pass_in_every_modality_or_loses_only_the_failing_one(three: list[Part]) -> None:
    limits = {"one": {"adt": Thresholds(min_counts=9)}}  # counts of B, C, X with the control: 10, 6, 8
    whole = assemble(three, Preparation(qc=limits))
    assert whole.cells.index.tolist()[:2] == ["A", "B"]
    assert "B" in dense(whole, "one", "adt").index
    single = assemble(three, Preparation(qc=limits, qc_drops="modality"))
    assert single.cells.index.tolist()[:3] == ["A", "B", "C"]
    assert dense(single, "one", "adt").index.tolist() == ["B"]
    assert dense(single, "one", "rna").index.tolist() == ["A", "B", "C"]
    assert any("1 of 3 cells within the quality limits" in note for note in single.notes)


def test_limits_of_all_batches_hold_where_a_batch_has_none_of_its_own(three: list[Part]) -> None:
    limits = {"*": {"adt": Thresholds(min_counts=8)}, "two": {"adt": Thresholds(min_counts=0)}}
    mosaic = assemble(three, Preparation(qc=limits))
    assert mosaic.cells.index.tolist() == ["A", "B", "X", "P", "Q", "R", "S"]


def test_a_batch_that_fails_wholly_is_an_error_that_names_it(three: list[Part]) -> None:
    with pytest.raises(MosaicError) as caught:
        assemble(three, Preparation(qc={"two": {"adt": Thresholds(min_counts=10_000)}}))
    assert (caught.value.code, caught.value.where["batch"]) == ("data.no_cells", "two")


def test_limits_that_exclude_each_other_are_refused(three: list[Part]) -> None:
    with pytest.raises(MosaicError) as caught:
        assemble(three, Preparation(qc={"*": {"rna": Thresholds(min_counts=5, max_counts=4)}}))
    assert caught.value.code == "data.bad_limits"


def test_cells_without_counts_stay_unless_limits_say_otherwise(make_part: MakePart) -> None:
    part = make_part("f", "rna", [[0, 0], [1, 2]], "AB", ["g", "h"])
    assert assemble([part]).n_cells == 2
    assert assemble([part], Preparation(qc={"*": {"rna": Thresholds(min_counts=1)}})).cells.index.tolist() == ["B"]


def test_metrics_and_suggested_limits_have_the_form_of_the_preparation(three: list[Part]) -> None:
    tables = quality(three)
    assert tables["one", "adt"]["counts"].to_dict() == {"B": 10, "C": 6, "X": 8}
    limits = suggest_qc(tables)
    assert set(limits) == {"one", "two", "three"}
    assert assemble(three, Preparation(qc=limits)).n_cells > 0


def test_genes_match_by_id_where_symbols_disagree(make_part: MakePart) -> None:
    ids = ["ENSG00000000001.2", "ENSG00000000002", "ENSG00000000003"]
    parts = [
        make_part("a", "rna", [[1, 2, 3]], ["A"], ["old1", "g2", "old3"], id=ids),
        make_part("b", "rna", [[4, 5, 6]], ["B"], ["new3", "g2", "new1"], id=[ids[2], ids[1], "ENSG00000000001.9"]),
    ]
    mosaic = assemble(parts)
    assert mosaic.features["rna"].index.tolist() == ["new1", "g2", "new3"]
    assert dense(mosaic, "b", "rna").to_numpy().tolist() == [[6, 5, 4]]
    assert any("Ensembl" in note for note in mosaic.notes)


@pytest.mark.parametrize(
    ("modality", "first", "second"), [("rna", "CD3E", "Cd3e"), ("adt", "CD4", "CD8"), ("atac", "chr1:1-5", "chr1:9-12")]
)
def test_batches_that_share_no_feature_are_refused(make_part: MakePart, modality: str, first: str, second: str) -> None:
    parts = [make_part("a", modality, [[1]], ["A"], [first]), make_part("b", modality, [[1]], ["B"], [second])]
    with pytest.raises(MosaicError) as caught:
        assemble(parts)
    assert (caught.value.code, caught.value.where["modality"]) == ("data.no_shared_feature", modality)


def test_overlapping_peaks_are_merged_and_their_counts_added(make_part: MakePart) -> None:
    parts = [
        make_part("a", "atac", [[1, 1, 0, 2]], ["A"], ["chr2:1-10", "chr1:100-200", "chr1:900-950", "chrX:5-9"]),
        make_part("b", "atac", [[1, 1, 1]], ["B"], ["chr1-150-180", "chr1-190-300", "chr2-5-20"]),
    ]
    mosaic = assemble(parts, Preparation(min_cells=0, peaks_min_share=0))
    peaks = mosaic.features["atac"]
    assert peaks.index.tolist() == ["chr1:100-300", "chr1:900-950", "chr2:1-20", "chrX:5-9"]
    assert peaks["end"].tolist() == [300, 950, 20, 9]
    assert dense(mosaic, "a", "atac").to_numpy().tolist() == [[1, 0, 1, 2]]
    assert dense(mosaic, "b", "atac").to_numpy().tolist() == [[2, 0, 1, 0]]
    assert mosaic.tiles["b", "atac"].mask.tolist() == [True, False, True, False]
    assert Layout.of(mosaic).chunks["atac"] == (2, 1, 1)


def test_scaffolds_go_and_sex_chromosomes_on_request(make_part: MakePart) -> None:
    names = ["chr1:1-5", "chr2:1-5", "chr3:1-5", "chrX:1-5", "chrM:1-5", "GL000205.2:1-5"]
    part = make_part("a", "atac", [[1] * 6], ["A"], names)
    assert assemble([part]).features["atac"]["chrom"].tolist() == ["chr1", "chr2", "chr3", "chrX"]
    assert len(assemble([part], Preparation(autosomes_only=True)).features["atac"]) == 3


def test_peaks_without_positions_are_matched_by_name_if_all_files_agree(make_part: MakePart) -> None:
    parts = [make_part(name, "atac", [[1, 2]], [name], ["p1", "p2"]) for name in "ab"]
    mosaic = assemble(parts)
    assert Layout.of(mosaic).chunks["atac"] == (2,)
    assert any("no position" in note for note in mosaic.notes)
    parts[1] = make_part("b", "atac", [[1, 2]], ["b"], ["p1", "p3"])
    with pytest.raises(MosaicError) as caught:
        assemble(parts)
    assert caught.value.code == "data.peaks_unreadable"


def test_rows_on_disk_stay_there_and_give_the_same_mosaic(make_part: MakePart) -> None:
    from headless.data.columns import SummedRows
    from headless.data.sources import ZarrRows

    def on_disk(part: Part) -> Part:
        x: Any = part.matrix.x
        group = {"data": x.data, "indices": x.indices, "indptr": x.indptr}
        return replace(part, matrix=replace(part.matrix, x=ZarrRows(group, x.shape[1])))

    random = np.random.default_rng(0)
    parts = [
        make_part("a", "rna", random.poisson(1.0, (9, 6)), [f"a{i}" for i in range(9)], [f"g{i}" for i in range(6)]),
        make_part("a", "atac", random.poisson(1.0, (9, 3)), [f"a{8 - i}" for i in range(9)],
                  ["chr1:1-9", "chr1:8-20", "chr2:1-5"]),
        make_part("b", "rna", random.poisson(1.0, (5, 4)), [f"b{i}" for i in range(5)], [f"g{i}" for i in range(2, 6)]),
        make_part("b", "atac", random.poisson(1.0, (5, 2)), [f"b{i}" for i in range(5)], ["chr1:2-18", "chr3:1-5"]),
    ]
    preparation = Preparation(n_top_genes=4, hvg_flavor="polynomial", qc={"*": {"rna": Thresholds(min_counts=2)}},
                              genes_min_share=0)
    stored = assemble([on_disk(part) for part in parts], preparation)
    same(assemble(parts, preparation), stored)
    assert isinstance(stored.tiles["a", "rna"].source, ZarrRows)
    assert isinstance(stored.tiles["a", "atac"].source, SummedRows)  # two of its peaks were merged


def test_genes_so_few_that_batches_share_none_are_refused(three: list[Part]) -> None:
    with pytest.raises(MosaicError) as caught:
        assemble(three, Preparation(n_top_genes=1, drop_genes=("g3",)))
    assert caught.value.code == "data.no_shared_feature"
    assert "n_top_genes" in caught.value.field


def test_all_peaks_and_genes_can_be_kept(make_part: MakePart) -> None:
    part = make_part("a", "rna", sp.csr_matrix((3, 4), dtype=np.float32), "ABC", list("wxyz"))
    assert len(assemble([part], Preparation.make("everything")).features["rna"]) == 4
    with pytest.raises(MosaicError) as caught:
        assemble([part])
    assert caught.value.code == "data.no_feature"
