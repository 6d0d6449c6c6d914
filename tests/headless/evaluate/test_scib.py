"""scIB: the aggregate of the reference, limits of every metric, invariances, and parity with scib-metrics."""

from __future__ import annotations

import builtins
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import ortho_group

from headless.evaluate.kbet import kbet, kbet_per_label
from headless.evaluate.metric import MetricValue
from headless.evaluate.scib import BATCH_PART, BESIDE, BIO_PART, Settings, aggregate, has_label, isolated_f1, scib

QUICK = Settings(resolutions=(0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0))


def values(**metrics: float | None) -> dict[str, MetricValue]:
    return {name: MetricValue(value=value) for name, value in metrics.items()}


def cells(n: int = 360, mixed: bool = True, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three well separated types in two batches; unmixed batches lie apart."""
    rng = np.random.default_rng(seed)
    labels, batches = np.arange(n) % 3, rng.integers(0, 2, n)
    x = rng.normal(size=(n, 6))
    x[np.arange(n), labels] += 12
    if not mixed:
        x[:, 5] += 40 * batches
    return x, np.array(["a", "b"])[batches], np.array(["T", "B", "NK"])[labels]


@pytest.fixture(scope="module")
def mixed() -> dict[str, MetricValue]:
    return scib(*cells(), QUICK)


@pytest.fixture(scope="module")
def apart() -> dict[str, MetricValue]:
    return scib(*cells(mixed=False), QUICK)


# ---- the aggregate: no library needed --------------------------------------------------------------------------


def test_the_reference_row_gives_the_reference_total() -> None:
    # The RNA-only dogma row of the MIDAS paper, as in the evaluation notes, section 10.
    total = aggregate(
        values(ilisi=0.639, graph_connectivity=0.942, kbet=0.570, nmi=0.475, ari=0.530, isolated_f1=0.805, clisi=0.970)
    )
    assert total["batch"].value == pytest.approx(0.717, abs=5e-4)
    assert total["bio"].value == pytest.approx(0.695, abs=5e-4)
    assert total["overall"].value == pytest.approx(0.704, abs=5e-4)
    assert total["overall"].parameters["flavour"] == "scIB, MIDAS flavour"


def test_an_aggregate_names_what_it_lacks_and_is_absent_without_a_part() -> None:
    part = aggregate(values(ilisi=0.6, graph_connectivity=0.8, kbet=None, nmi=0.5, ari=0.5, isolated_f1=0.5, clisi=0.9))
    assert part["batch"].value == pytest.approx(0.7)
    assert part["batch"].parameters["mean_of"] == ["ilisi", "graph_connectivity"]
    assert part["overall"].parameters["without"] == ["kbet"]
    none = aggregate(values(ilisi=0.6))
    assert none["bio"].value is None
    assert none["overall"].value is None
    assert "absent" in none["overall"].reason


def test_isolated_f1_by_hand() -> None:
    # "x" occurs in one batch, the others in two. Best cluster for x: 3 of its 4 cells and 1 foreign one: F1 = 6/8.
    labels = np.array(["x"] * 4 + ["y"] * 4)
    batches = np.array([1, 1, 1, 1, 1, 2, 1, 2])
    first = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    assert isolated_f1([first], labels, batches) == pytest.approx(0.75)
    perfect = np.array([0] * 4 + [1] * 4)
    assert isolated_f1([first, perfect], labels, batches) == 1


def test_which_labels_count() -> None:
    given = ["T cell", "unknown", "Unknown ", None, float("nan"), "", "NK", "unassigned"]
    np.testing.assert_array_equal(np.flatnonzero(has_label(given)), [0, 6])


def test_without_the_library_every_metric_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "scib_metrics":
            raise ImportError("No module named 'scib_metrics'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = scib(*cells(60), QUICK)
    for name in (*BATCH_PART, *BIO_PART, *BESIDE):
        assert found[name].value is None
        assert "pip install 'mosaic-desktop[metrics]'" in found[name].reason
    assert found["overall"].value is None


# ---- the metrics themselves ------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(find_spec("scib_metrics") is None, reason="scib-metrics is not installed")


@needs_library
def test_perfect_mixing_of_clear_types_is_near_one(mixed: dict[str, MetricValue]) -> None:
    for name in ("nmi", "ari", "nmi_kmeans", "ari_kmeans", "clisi", "graph_connectivity", "isolated_f1"):
        assert (mixed[name].value or 0) > 0.97, name
    for name in ("ilisi", "kbet", "batch_asw"):
        assert (mixed[name].value or 0) > 0.85, name
    assert (mixed["overall"].value or 0) > 0.93


@needs_library
def test_batches_apart_score_zero_where_mixing_counts(apart: dict[str, MetricValue]) -> None:
    assert apart["ilisi"].value == pytest.approx(0, abs=0.01)
    assert apart["kbet"].value == pytest.approx(0, abs=0.05)
    assert (apart["graph_connectivity"].value or 1) < 0.7
    assert (apart["clisi"].value or 0) > 0.97
    assert (apart["overall"].value or 1) < 0.8


@needs_library
def test_random_labels_share_nothing_with_the_clusters() -> None:
    x, batches, labels = cells()
    shuffled = np.random.default_rng(1).permutation(labels)
    found = scib(x, batches, shuffled, QUICK)
    assert found["ari"].value == pytest.approx(0, abs=0.05)
    assert found["nmi"].value == pytest.approx(0, abs=0.1)


@needs_library
def test_order_rotation_and_translation_do_not_matter(mixed: dict[str, MetricValue]) -> None:
    x, batches, labels = cells()
    order = np.random.default_rng(2).permutation(len(x))
    moved = (x @ ortho_group.rvs(x.shape[1], random_state=3) + 7)[order]
    found = scib(moved, batches[order], labels[order], QUICK)
    for name in (*BATCH_PART, *BIO_PART, *BESIDE, "overall"):
        # kBET goes through a diffusion map and Leiden through random numbers: the house's tolerance for those.
        tolerance = 2e-2 if name in ("kbet", "overall", "batch") else 2e-3
        assert found[name].value == pytest.approx(mixed[name].value, abs=tolerance), name


def hard() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    labels, batches = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 5)) + 1.5 * np.eye(5)[labels] + 0.7 * np.eye(5)[batches]
    return x.astype(np.float32), batches, labels


def near(x: np.ndarray, k: int) -> Any:
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=k).fit(x).kneighbors(x)
    return NeighborsResults(indices=indices, distances=distances)


@needs_library
def test_parity_with_scib_metrics_on_a_hard_embedding() -> None:
    import scib_metrics

    x, batches, labels = hard()
    ours = scib(x, batches, labels, QUICK)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(near(x, 15), labels, optimize_resolution=True, n_jobs=1)
    theirs = {
        "nmi": (leiden["nmi"], 1e-3),
        "ari": (leiden["ari"], 1e-3),
        "clisi": (scib_metrics.clisi_knn(near(x, 90), labels), 1e-2),
        "ilisi": (scib_metrics.ilisi_knn(near(x, 90), batches), 1e-2),
        "graph_connectivity": (scib_metrics.graph_connectivity(near(x, 15), labels), 1e-3),
        "label_asw": (scib_metrics.silhouette_label(x, labels), 1e-3),
        "batch_asw": (scib_metrics.silhouette_batch(x, labels, batches), 1e-3),
        "isolated_asw": (scib_metrics.isolated_labels(x, labels, batches), 1e-3),
    }
    for name, (want, tolerance) in theirs.items():
        assert ours[name].value == pytest.approx(float(want), abs=tolerance), name


@needs_library
@pytest.mark.slow
def test_kbet_is_that_of_scib_metrics() -> None:
    import scib_metrics

    x, batches, labels = hard()
    for y in (x, x + 0.5 * np.eye(5, dtype=np.float32)[batches]):
        want = scib_metrics.kbet_per_label(near(y, 50), batches, labels)
        assert kbet(near(y, 50).knn_graph_connectivities, batches, labels) == pytest.approx(want, abs=1e-2)


def test_kbet_skips_small_labels_and_labels_of_one_batch() -> None:
    rng = np.random.default_rng(6)
    n = 90
    labels = np.repeat([0, 1, 2], [60, 8, 22])
    batches = np.where(labels == 2, 0, rng.integers(0, 2, n))
    half = sp.random(n, n, 0.3, random_state=0, format="csr")
    rates = kbet_per_label(half + half.T, batches, labels)
    assert list(rates) == [0]
    assert rates[0] > 0.8
    assert np.isnan(kbet(half + half.T, np.zeros(n, int), labels))
    # A label whose graph falls to pieces too small to test counts as unmixed.
    pieces = sp.block_diag([np.ones((5, 5))] * 12).tocsr()
    assert kbet_per_label(pieces, batches[:60], labels[:60]) == {0: 0.0}


@needs_library
def test_what_cannot_be_computed_is_absent_with_its_reason() -> None:
    x, batches, labels = cells(120)
    unlabelled = scib(x, batches, None, QUICK)
    assert unlabelled["ilisi"].value is not None
    assert all(unlabelled[name].reason == "there are no labels" for name in ("nmi", "kbet", "clisi"))
    assert unlabelled["overall"].value is None
    one = scib(x, np.full(120, "a"), labels, QUICK)
    assert one["ilisi"].reason == "there is one batch only"
    assert one["nmi"].value is not None


@needs_library
def test_left_out_cells_and_subsampling_are_stated() -> None:
    x, batches, labels = cells(200)
    x[:5] = np.nan
    labels = labels.astype(object)
    labels[5:15] = "unknown"
    found = scib(x, batches, labels, Settings(max_cells=120, resolutions=(1.0,)))
    facts = found["clisi"].parameters
    assert (facts["without_embedding"], facts["without_label"]) == (5, 10)
    assert (facts["subsampled_from"], facts["cells"]) == (185, 120)
    assert facts["k"] == 90
    tiny = scib(x[:4], batches[:4], labels[:4])
    assert tiny["nmi"].reason == "fewer than three cells to score"
