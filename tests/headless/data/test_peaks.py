from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headless.data import genome, peaks
from headless.errors import MosaicError


def table(*names: str) -> pd.DataFrame:
    return peaks.parse(pd.DataFrame(index=list(names)))


@pytest.mark.parametrize("name", ["chr1:100-200", "chr1-100-200", "chr1_100_200", "1:100-200", "Chr1:100-200"])
def test_peak_names_are_read_in_every_usual_form(name: str) -> None:
    assert table(name).iloc[0].tolist() == ["chr1", 100, 200]


def test_coordinates_of_columns_count_before_names() -> None:
    features = pd.DataFrame({"chrom": ["chrX"], "start": [5], "end": [9]}, index=["peak_1"])
    assert peaks.parse(features).iloc[0].tolist() == ["chrX", 5, 9]


@pytest.mark.parametrize("name", ["peak_a", "chr1", "chr1:200-100"])
def test_peaks_without_a_position_are_refused_with_an_example(name: str) -> None:
    with pytest.raises(MosaicError, match=name) as caught:
        peaks.parse(pd.DataFrame(index=["chr1:1-9", name]))
    assert caught.value.code == "data.peaks_unreadable"


def test_overlapping_peaks_of_two_files_become_one_and_others_stay() -> None:
    first, second = table("chr1:100-200", "chr2:5-10"), table("chr1:300-400", "chr1:150-250", "chr10:1-5")
    union = peaks.union([first, second], ["a", "b"])
    assert union.features.index.tolist() == ["chr1:100-250", "chr1:300-400", "chr2:5-10", "chr10:1-5"]
    assert union.columns[0].tolist() == [0, 2]
    assert union.columns[1].tolist() == [1, 0, 3]
    assert union.measured(0).tolist() == [True, False, True, False]


def test_peaks_that_only_touch_are_not_merged() -> None:
    union = peaks.union([table("chr1:1-5", "chr1:20-30"), table("chr1:5-9", "chr1:25-26")], ["a", "b"])
    assert union.features.index.tolist() == ["chr1:1-5", "chr1:5-9", "chr1:20-30"]


def test_one_peak_set_is_left_as_it_is_but_sorted() -> None:
    union = peaks.union([table("chr10:1-50", "chr2:20-60", "chr2:1-30", "chrX:1-2")] * 2, ["a", "b"])
    assert union.features.index.tolist() == ["chr2:1-30", "chr2:20-60", "chr10:1-50", "chrX:1-2"]
    assert union.columns[1].tolist() == [2, 1, 0, 3]
    assert union.notes == ()


def test_files_without_any_overlap_are_refused() -> None:
    with pytest.raises(MosaicError) as caught:
        peaks.union([table("chr1:1-5"), table("chr1:10-20")], ["a", "b"])
    assert caught.value.code == "data.no_shared_feature"


intervals = st.lists(
    st.tuples(st.sampled_from(["chr1", "chr2"]), st.integers(0, 60), st.integers(1, 15)), min_size=1, max_size=25
)


@given(intervals)
def test_merging_is_that_of_the_transitive_overlap(given_intervals: list[tuple[str, int, int]]) -> None:
    rows = sorted((chrom, start, start + width) for chrom, start, width in given_intervals)
    chrom, start, end = (np.array(column) for column in zip(*rows, strict=True))
    group = peaks.merged(chrom, start, end)
    n = len(rows)
    touch = np.array([
        [chrom[i] == chrom[j] and start[i] < end[j] and start[j] < end[i] for j in range(n)] for i in range(n)
    ])
    reach = np.linalg.matrix_power((touch | np.eye(n, dtype=bool)).astype(float), n) > 0
    assert (reach == (group[:, None] == group[None, :])).all()


def test_frequent_peaks_are_chosen_and_sparse_data_keep_the_most_open() -> None:
    shares, cells = np.array([0.5, 0.04, 0.05, 0.0, 0.01]), np.array([50, 4, 5, 0, 1])
    limits = {"min_share": 0.04, "min_cells": 1, "at_most": None}
    keep, _ = peaks.choose(shares, cells, at_least=0, **limits)
    assert keep.tolist() == [True, False, True, False, False]
    keep, notes = peaks.choose(shares, cells, at_least=3, **limits)
    assert keep.tolist() == [True, True, True, False, False]
    assert "Only 2 peaks" in notes[-1]
    keep, _ = peaks.choose(shares, cells, at_least=100, **limits)
    assert keep.tolist() == [True, True, True, False, True]
    keep, _ = peaks.choose(shares, cells, at_least=0, min_share=0.0, min_cells=1, at_most=2)
    assert keep.tolist() == [True, False, True, False, False]


def test_chromosomes_stand_in_natural_order() -> None:
    names = np.array(["chrM", "chrX", "chr10", "chrUn_1", "chr2", "chrY", "chr1"], dtype=object)
    zero = np.zeros(7, dtype=np.int64)
    assert names[genome.order(names, zero, zero)].tolist() == [
        "chr1", "chr2", "chr10", "chrX", "chrY", "chrM", "chrUn_1",
    ]


def test_sex_chromosomes_scaffolds_and_mitochondria_are_told_apart() -> None:
    names = np.array(["chr1", "chrX", "chrM", "chr1_KI270706v1_random", "GL000205.2"], dtype=object)
    assert genome.is_autosome(names).tolist() == [True, False, False, False, False]
    assert genome.is_standard(names).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("assembly", "name"), [("hg19", "chr1:249100000-249100500"), ("hg38", "chr17:83000000-83000500"),
                           ("mm10", "chr19:61400000-61400500")],
)
def test_the_assembly_follows_from_positions_near_chromosome_ends(assembly: str, name: str) -> None:
    # Peaks of the mouse are told from human ones by a chromosome that is longer there.
    extra = ("chr13:120000000-120000500",) if assembly == "mm10" else ("chr22:20000000-20000500",)
    peaks_there = table(name, *extra)
    assert genome.compatible(peaks_there) == (assembly,)
    assert genome.check([peaks_there], ["a"])[0] == assembly


def test_a_peak_may_overhang_the_end_of_its_chromosome() -> None:
    length = genome.sizes("hg38")["chr17"]
    assert not genome.misfit(table(f"chr17:{length - 100}-{length + 51}"), "hg38")
    assert "chr17" in genome.misfit(table(f"chr17:{length + 5000}-{length + 5100}"), "hg38")


def test_a_genome_named_wrongly_is_refused_with_those_that_fit() -> None:
    with pytest.raises(MosaicError, match="hg19") as caught:
        genome.check([table("chr1:249100000-249100500", "chr22:1-2")], ["a.h5"], "hg38")
    assert caught.value.code == "data.wrong_genome"
    assert caught.value.where["file"] == "a.h5"


def test_files_on_two_assemblies_are_refused() -> None:
    first, second = table("chr1:249100000-249100500", "chr22:1-2"), table("chr17:83000000-83000500", "chr22:1-2")
    with pytest.raises(MosaicError, match="hg19 against hg38") as caught:
        genome.check([first, second], ["a", "b"])
    assert caught.value.code == "data.wrong_genome"


def test_files_with_other_chromosome_names_are_refused() -> None:
    with pytest.raises(MosaicError, match="share no chromosome") as caught:
        genome.check([table("chr1:1-2"), table("NC_000001:1-2")], ["a", "b"])
    assert caught.value.code == "data.wrong_genome"
