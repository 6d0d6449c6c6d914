"""FOSCTTM: the known answer, limits, and the blocked form against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group

from headless.evaluate.foscttm import foscttm, per_cell


def dense(a: np.ndarray, b: np.ndarray) -> float:
    d = cdist(a, b)
    own = np.diag(d)
    n = len(a)
    return float(((d < own[:, None]).sum() + (d < own[None, :]).sum()) / (2 * n * (n - 1)))


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 8))
    return a, a + rng.normal(size=a.shape)


def test_the_known_answer() -> None:
    assert foscttm([[0.0], [1.0], [2.0]], [[0.1], [2.1], [0.9]]) == pytest.approx(0.5)


def test_identical_sets_are_perfect_even_with_duplicates() -> None:
    a = np.random.default_rng(1).normal(size=(60, 3))
    a[10:20] = a[0]
    assert foscttm(a, a) == 0
    assert foscttm(1e4 + a, 1e4 + a) == 0


def test_random_matches_are_about_one_half() -> None:
    rng = np.random.default_rng(2)
    assert foscttm(rng.normal(size=(800, 5)), rng.normal(size=(800, 5))) == pytest.approx(0.5, abs=0.02)


def test_the_worst_match_is_one() -> None:
    assert foscttm([[0.0], [10.0]], [[10.0], [0.0]]) == 1


@pytest.mark.parametrize("block", [1, 7, 512])
def test_blocks_do_not_change_the_value(pair: tuple[np.ndarray, np.ndarray], block: int) -> None:
    assert foscttm(*pair, block=block) == pytest.approx(dense(*pair), abs=1e-12)
    for got, want in zip(per_cell(*pair, block=block), per_cell(*pair), strict=True):
        np.testing.assert_array_equal(got, want)


def test_order_rotation_translation_and_scale_do_not_matter(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    value = foscttm(a, b)
    order = np.random.default_rng(3).permutation(len(a))
    turn = ortho_group.rvs(8, random_state=4)
    assert foscttm(a[order], b[order]) == pytest.approx(value, abs=1e-12)
    assert foscttm(3 * a @ turn + 5, 3 * b @ turn + 5) == pytest.approx(value, abs=1e-9)
    assert foscttm(b, a) == pytest.approx(value, abs=1e-12)


@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_ties_are_not_closer(n: int, d: int, seed: int, block: int) -> None:
    # Whole numbers: distances tie often, and the dense form is exact.
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, (n, d)).astype(float), rng.integers(0, 4, (n, d)).astype(float)
    assert foscttm(a, b, block) == pytest.approx(dense(a, b), abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), "one shape"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "two cells"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "finite"),
    ],
)
def test_what_cannot_be_matched_is_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foscttm(a, b)
