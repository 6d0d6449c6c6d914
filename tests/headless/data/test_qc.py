from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from headless.data import qc
from headless.data.preparation import Thresholds
from headless.data.sources import MemoryRows


def test_metrics_of_rna_count_molecules_genes_and_the_mitochondrial_share() -> None:
    counts = [[3, 0, 1], [0, 0, 0], [1, 2, 1]]
    table = qc.metrics(MemoryRows(sp.csr_matrix(counts)), pd.Index(["A", "B", "MT-CO1"]), "rna")
    assert table["counts"].tolist() == [4, 0, 4]
    assert table["features"].tolist() == [2, 0, 3]
    assert table["mito"].tolist() == [0.25, 0, 0.25]


def test_mouse_mitochondria_are_known_and_data_without_any_have_no_share() -> None:
    source = MemoryRows(sp.csr_matrix([[1, 1]]))
    assert qc.metrics(source, pd.Index(["Actb", "mt-Co1"]), "rna")["mito"].tolist() == [0.5]
    assert "mito" not in qc.metrics(source, pd.Index(["Actb", "Mtor"]), "rna")


def test_isotype_controls_are_counted_apart() -> None:
    table = qc.metrics(MemoryRows(sp.csr_matrix([[5, 2]])), pd.Index(["CD4", "IgG1"]), "adt")
    assert table["isotype"].tolist() == [2]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [True, True, True]),
        ({"min_counts": 10}, [False, True, True]),
        ({"max_counts": 10}, [True, True, False]),
        ({"min_features": 3, "max_features": 3}, [False, True, False]),
        ({"max_mito": 0.1}, [True, True, False]),
    ],
)
def test_cells_at_a_limit_pass(limits: dict[str, float], expected: list[bool]) -> None:
    table = pd.DataFrame({"counts": [5, 10, 20], "features": [2, 3, 4], "mito": [0.0, 0.1, 0.2]})
    assert qc.passes(table, Thresholds(**limits)).tolist() == expected
    assert qc.kept(table, Thresholds(**limits)) == sum(expected)


def test_a_metric_that_is_absent_limits_nothing() -> None:
    assert qc.kept(pd.DataFrame({"counts": [1.0], "features": [1]}), Thresholds(max_mito=0.0)) == 1


def test_limits_are_suggested_at_median_and_deviations_of_the_logarithm() -> None:
    # log(1 + x) = 4 log 2 ... 8 log 2: median 6 log 2, MAD log 2.
    counts = 2.0 ** np.array([4, 5, 6, 7, 8]) - 1
    table = pd.DataFrame({"counts": counts, "features": [9] * 5, "mito": [0.01, 0.02, 0.03, 0.04, 0.05]})
    limits = qc.suggest(table, n_mads=2)
    assert (limits.min_counts, limits.max_counts) == pytest.approx((2**4 - 1, 2**8 - 1), abs=1)
    assert (limits.min_features, limits.max_features) == (None, None)
    assert limits.max_mito == pytest.approx(0.05, abs=0.0011)


@given(arrays.arrays(np.int64, st.integers(2, 40), elements=st.integers(0, 10**6)))
def test_the_typical_cell_is_always_within_the_suggestion(counts: np.ndarray) -> None:
    table = pd.DataFrame({"counts": counts.astype(float), "features": counts})
    kept = qc.passes(table, qc.suggest(table))
    distance = np.abs(np.log1p(counts) - np.median(np.log1p(counts)))
    assert kept[distance <= np.median(distance)].all()


def test_nothing_is_suggested_for_no_cells() -> None:
    assert qc.suggest(pd.DataFrame({"counts": [], "features": []})) == Thresholds()
