"""Modality contribution on embeddings whose neighbourhoods are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from headless.tasks import contribution as module
from headless.tasks.contribution import contribution, means, neighbours


def test_a_modality_equal_to_the_joint_embedding_contributes_all() -> None:
    rng = np.random.default_rng(0)
    joint = rng.normal(size=(400, 3)).astype(np.float32)
    noise = rng.normal(size=(400, 3)).astype(np.float32)
    values = contribution(joint, {"rna": joint, "adt": noise}, k=10)
    # Of ten neighbours in pure noise, 10 * 10 / 399 = 0.25 are joint neighbours by chance.
    assert values[:, 0].mean() == pytest.approx(1 / 1.025, abs=0.02)
    np.testing.assert_allclose(values.sum(axis=1), 1, rtol=1e-5)


def test_known_ratio() -> None:
    # Three groups of cells far apart; the joint embedding keeps the groups, adt merges the first two into one.
    group = np.repeat([0, 1, 2], 11)
    jitter = np.linspace(0, 1, 33)[:, None]
    joint = (group[:, None] * 100 + jitter).astype(np.float32)
    values = contribution(joint, {"rna": joint.copy(), "adt": joint.copy()}, k=10)
    np.testing.assert_allclose(values, 0.5)
    # k = 10 finds exactly the other ten of the group in joint and rna; in adt, groups are dealt out in turn, so
    # the ten nearest of a cell come from all three groups.
    dealt = np.argsort(np.argsort(np.arange(33) % 11, kind="stable"))[:, None].astype(np.float32)
    values = contribution(joint, {"rna": joint, "adt": dealt}, k=10)
    common = [len(set(neighbours(dealt, 10)[i]) & set(np.flatnonzero(group == group[i]))) / 10 for i in range(33)]
    np.testing.assert_allclose(values[:, 0], 1 / (1 + np.array(common)), rtol=1e-5)


def test_only_the_modalities_of_a_cell_count() -> None:
    rng = np.random.default_rng(1)
    joint = rng.normal(size=(60, 2)).astype(np.float32)
    rna, adt = joint.copy(), joint.copy()
    rna[:20], adt[20:40] = np.nan, np.nan
    values = contribution(joint, {"rna": rna, "adt": adt}, k=5)
    np.testing.assert_array_equal(values[:20], np.tile([np.nan, 1], (20, 1)))
    np.testing.assert_array_equal(values[20:40], np.tile([1, np.nan], (20, 1)))
    np.testing.assert_allclose(values[40:], 0.5)


def test_few_cells_and_no_cells() -> None:
    joint = np.arange(4, dtype=np.float32)[:, None]
    np.testing.assert_allclose(contribution(joint, {"rna": joint, "adt": joint}, k=50), 0.5)
    alone = contribution(joint[:1], {"rna": joint[:1], "adt": joint[:1]})
    assert np.isnan(alone).all()


@pytest.mark.slow  # numba compiles for half a minute
def test_approximate_neighbours_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(2).normal(size=(600, 4)).astype(np.float32)
    points[5] = points[6] = points[7]
    exact = neighbours(points, 10)
    monkeypatch.setattr(module, "EXACT_CELLS", 100)
    found = neighbours(points, 10)
    assert found.shape == exact.shape
    assert not (found == np.arange(600)[:, None]).any()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall > 0.95


def test_means_by_batch_and_label_leave_out_cells_with_one_modality() -> None:
    cells = pd.DataFrame({"batch": ["a", "a", "b", "c"], "label": ["T", "B", "T", "T"]}, index=list("wxyz"))
    values = np.array([[0.2, 0.8], [0.4, 0.6], [1.0, np.nan], [0.6, 0.4]], dtype=np.float32)
    table = means(values, ("rna", "adt"), cells).set_index(["by", "group"])
    assert table.loc[("batch", "a"), "rna"] == pytest.approx(0.3)
    assert table.loc[("label", "T"), "rna"] == pytest.approx(0.4)
    assert table.loc[("label", "T"), "adt"] == pytest.approx(0.6)
    assert table.loc[("label", "T"), "n_cells"] == 2
    assert ("batch", "b") not in table.index
