"""Integration scores of an embedding (Luecken et al. 2022, scIB), in the flavour of MIDAS (He et al. 2024).

Batch part: iLISI, graph connectivity, kBET. Bio part: NMI, ARI, isolated-label F1, cLISI. Each part is the plain mean
of its metrics, overall = 0.6 bio + 0.4 batch; no scaling between methods. Silhouettes and k-means scores stand
beside, outside the aggregate. LISI, graph connectivity, k-means and the neighbour graph are scib-metrics';
isolated-label F1, which it lacks, comes from the same Leiden partitions; silhouettes are scikit-learn's and kBET is
:mod:`headless.evaluate.kbet`, with the library's values but without its minutes of compilation.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from headless.evaluate.kbet import kbet
from headless.evaluate.metric import Metrics, MetricValue, measure
from headless.schema import Frozen

FLAVOUR: Final = "scIB, MIDAS flavour"
BATCH_PART: Final = ("ilisi", "graph_connectivity", "kbet")
BIO_PART: Final = ("nmi", "ari", "isolated_f1", "clisi")
BESIDE: Final = ("nmi_kmeans", "ari_kmeans", "isolated_asw", "label_asw", "batch_asw")
BIO_WEIGHT: Final = 0.6

#: Values of a label column that mean "no label".
UNLABELLED: Final = frozenset({"", "na", "nan", "none", "unknown", "unassigned", "unlabeled", "unlabelled"})

RESOLUTIONS: Final = tuple(round(0.1 * step, 1) for step in range(1, 21))


class Settings(Frozen):
    """How integration is scored; the defaults are those of scib-metrics' benchmarker."""

    max_cells: int | None = 20_000  # a random part is scored if there are more
    lisi_neighbours: int = 90
    kbet_neighbours: int = 50
    graph_neighbours: int = 15
    resolutions: tuple[float, ...] = RESOLUTIONS
    seed: int = 0


def scib(
    embedding: NDArray[Any],
    batches: NDArray[Any],
    labels: NDArray[Any] | None = None,
    settings: Settings | None = None,
) -> Metrics:
    """All metrics of an embedding ``(n, d)`` and their aggregates ``batch``, ``bio`` and ``overall``.

    Parameters
    ----------
    batches, labels
        ``(n,)``. Without labels only iLISI can be computed. Cells without a label (:data:`UNLABELLED`, missing) or
        without an embedding (not finite) are left out and counted.

    Returns
    -------
    Metrics
        What cannot be computed is absent with its reason.
    """
    settings = settings or Settings()
    chosen, facts = _choose(embedding, labels, settings)
    if len(chosen) < 3:
        return {
            name: MetricValue.absent("fewer than three cells to score", **facts)
            for name in (*BATCH_PART, *BIO_PART, *BESIDE)
        } | aggregate({})
    scorer = _Scorer(embedding[chosen], batches[chosen], None if labels is None else labels[chosen], settings, facts)
    metrics = scorer.all()
    return metrics | aggregate(metrics)


def aggregate(metrics: Mapping[str, MetricValue]) -> Metrics:
    """``batch``, ``bio`` and ``overall`` from the metrics that are there; the missing ones are named.

    A part of which nothing is there is absent, and with it ``overall``.
    """
    parts = {}
    for name, members in (("batch", BATCH_PART), ("bio", BIO_PART)):
        values = [metrics[m].value for m in members if m in metrics]
        good = [value for value in values if value is not None]
        missing = [m for m in members if m not in metrics or metrics[m].value is None]
        used = [m for m in members if m not in missing]
        facts: dict[str, Any] = {"flavour": FLAVOUR, "mean_of": used, "without": missing}
        parts[name] = (
            MetricValue(value=float(np.mean(good)), parameters=facts)
            if good
            else MetricValue.absent("none of its metrics could be computed", **facts)
        )
    batch, bio = parts["batch"], parts["bio"]
    without = [*batch.parameters["without"], *bio.parameters["without"]]
    weights = {"bio": BIO_WEIGHT, "batch": round(1 - BIO_WEIGHT, 6)}
    facts = {"flavour": FLAVOUR, "weights": weights, "without": without}
    if batch.value is None or bio.value is None:
        return parts | {"overall": MetricValue.absent("the batch or the bio part is absent", **facts)}
    overall = BIO_WEIGHT * bio.value + (1 - BIO_WEIGHT) * batch.value
    return parts | {"overall": MetricValue(value=overall, parameters=facts)}


def has_label(labels: Iterable[Any]) -> NDArray[np.bool_]:
    """Which labels name a type."""
    import pandas as pd

    return np.array([not pd.isna(x) and str(x).strip().lower() not in UNLABELLED for x in labels], dtype=bool)


def isolated_labels(labels: NDArray[Any], batches: NDArray[Any]) -> list[Any]:
    """The labels that occur in the fewest batches (all of them where all are equal)."""
    import pandas as pd

    spread = (pd.crosstab(labels, batches) > 0).sum(axis=1)
    return list(spread.index[spread == spread.min()])


def isolated_f1(partitions: Iterable[NDArray[Any]], labels: NDArray[Any], batches: NDArray[Any]) -> float:
    """Isolated-label F1 (scIB): mean over the labels that occur in the fewest batches.

    Of each such label, the best F1 of one cluster against the rest, over clusters and ``partitions``.
    """
    import pandas as pd

    isolated = isolated_labels(labels, batches)
    best = pd.Series(0.0, index=isolated)
    for clusters in partitions:
        counts = pd.crosstab(labels, clusters)
        sizes = counts.sum(axis=1).to_numpy()[:, None] + counts.sum(axis=0).to_numpy()[None, :]
        f1 = 2 * counts / sizes
        best = np.maximum(best, f1.loc[isolated].max(axis=1))
    return float(best.mean())


def _choose(
    embedding: NDArray[Any], labels: NDArray[Any] | None, settings: Settings
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    finite = np.isfinite(embedding).all(axis=1)
    usable = finite if labels is None else finite & has_label(labels)
    chosen = np.flatnonzero(usable)
    facts = {"without_embedding": int((~finite).sum()), "without_label": int((finite & ~usable).sum())}
    if settings.max_cells is not None and len(chosen) > settings.max_cells:
        facts["subsampled_from"] = len(chosen)
        chosen = np.sort(np.random.default_rng(settings.seed).choice(chosen, settings.max_cells, replace=False))
    return chosen, {"cells": len(chosen)} | facts


class _Scorer:
    """The metrics of one embedding; neighbours and partitions are computed once."""

    def __init__(
        self,
        embedding: NDArray[Any],
        batches: NDArray[Any],
        labels: NDArray[Any] | None,
        settings: Settings,
        facts: dict[str, Any],
    ) -> None:
        import pandas as pd

        self.x = np.ascontiguousarray(embedding, dtype=np.float32)
        self.batches = np.asarray(pd.Categorical(np.asarray(batches).astype(str)).codes, dtype=np.int64)
        self.labels = None
        if labels is not None:
            self.labels = np.asarray(pd.Categorical(np.asarray(labels).astype(str)).codes, dtype=np.int64)
        self.settings = settings
        self.facts = facts

    def all(self) -> Metrics:
        """Every metric; absent ones with their reason."""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read by jax when scib-metrics imports it
        try:
            import scib_metrics as library
        except ImportError as error:
            reason = f"scib-metrics is not installed ({error}): pip install 'mosaic-desktop[metrics]'"
            return {n: MetricValue.absent(reason, **self.facts) for n in (*BATCH_PART, *BIO_PART, *BESIDE)}
        one_batch = "there is one batch only" if len(np.unique(self.batches)) < 2 else ""
        no_labels = "there are no labels" if self.labels is None else ""
        if self.labels is not None and len(np.unique(self.labels)) < 2:
            no_labels = "there is one label only"
        y, b, s = self.labels, self.batches, self.settings
        lisi = {"k": self._k(s.lisi_neighbours), "perplexity": self._k(s.lisi_neighbours) // 3}
        graph, around = {"k": self._k(s.graph_neighbours)}, {"k": self._k(s.kbet_neighbours)}
        leiden = graph | {"clusters": "Leiden", "resolutions": len(s.resolutions)}
        kmeans = {"clusters": "k-means, as many as labels"}
        tasks: dict[str, tuple[str, dict[str, Any], Any]] = {
            "ilisi": (one_batch, lisi, lambda: library.ilisi_knn(self._near(s.lisi_neighbours), b)),
            "graph_connectivity": (
                no_labels, graph, lambda: library.graph_connectivity(self._near(s.graph_neighbours), y)
            ),
            "kbet": (one_batch or no_labels, around, lambda: kbet(self._graph(s.kbet_neighbours), b, self._labels)),
            "nmi": (no_labels, leiden, lambda: self._leiden_scores[0]),
            "ari": (no_labels, leiden, lambda: self._leiden_scores[1]),
            "isolated_f1": (one_batch or no_labels, leiden, lambda: isolated_f1(self._partitions, self._labels, b)),
            "clisi": (no_labels, lisi, lambda: library.clisi_knn(self._near(s.lisi_neighbours), y)),
            "nmi_kmeans": (no_labels, kmeans, lambda: self._kmeans["nmi"]),
            "ari_kmeans": (no_labels, kmeans, lambda: self._kmeans["ari"]),
            "isolated_asw": (one_batch or no_labels, {}, lambda: self._isolated_asw()),
            "label_asw": (no_labels, {}, lambda: (self._silhouettes.mean() + 1) / 2),
            "batch_asw": (one_batch or no_labels, {}, lambda: self._batch_asw()),
        }  # fmt: skip
        return {
            name: MetricValue.absent(cannot, **self.facts, **parameters)
            if cannot
            else measure(compute, self.facts | parameters)
            for name, (cannot, parameters, compute) in tasks.items()
        }

    @property
    def _labels(self) -> NDArray[np.int64]:
        assert self.labels is not None
        return self.labels

    def _k(self, wanted: int) -> int:
        return min(wanted, len(self.x))

    @cached_property
    def _neighbours(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exact neighbours, each cell its own first."""
        from sklearn.neighbors import NearestNeighbors

        s = self.settings
        most = self._k(max(s.lisi_neighbours, s.kbet_neighbours, s.graph_neighbours))
        distances, indices = NearestNeighbors(n_neighbors=most).fit(self.x).kneighbors(self.x)
        return distances.astype(np.float32), indices

    def _near(self, k: int) -> Any:
        from scib_metrics.nearest_neighbors import NeighborsResults

        distances, indices = self._neighbours
        k = self._k(k)
        return NeighborsResults(indices=indices[:, :k].copy(), distances=distances[:, :k].copy())

    def _graph(self, k: int) -> Any:
        """Symmetric sparse neighbour graph with UMAP's weights."""
        return self._near(k).knn_graph_connectivities

    @cached_property
    def _partitions(self) -> list[NDArray[np.int64]]:
        """Leiden (modularity) at every resolution, on the neighbour graph with UMAP's weights, as in scib-metrics."""
        import igraph

        weights = self._graph(self.settings.graph_neighbours)
        graph = igraph.Graph.Weighted_Adjacency(weights, mode="directed")
        graph.to_undirected(mode="each")
        found = []
        try:
            for resolution in self.settings.resolutions:
                igraph.set_random_number_generator(random.Random(self.settings.seed + 42))
                parts = graph.community_leiden(objective_function="modularity", weights="weight", resolution=resolution)
                found.append(np.asarray(parts.membership, dtype=np.int64))
        finally:
            igraph.set_random_number_generator(random)
        return found

    @cached_property
    def _leiden_scores(self) -> tuple[float, float]:
        """NMI and ARI at the resolution with the highest NMI."""
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        scores = [normalized_mutual_info_score(self._labels, clusters) for clusters in self._partitions]
        best = int(np.argmax(scores))
        return float(scores[best]), float(adjusted_rand_score(self._labels, self._partitions[best]))

    @cached_property
    def _silhouettes(self) -> NDArray[np.float64]:
        from sklearn.metrics import silhouette_samples

        return np.asarray(silhouette_samples(self.x, self._labels), dtype=np.float64)

    def _isolated_asw(self) -> float:
        """Mean over the labels in the fewest batches of (mean silhouette + 1) / 2."""
        return float(np.mean([(self._silhouettes[self.labels == label].mean() + 1) / 2 for label in self._isolated]))

    def _batch_asw(self) -> float:
        """Mean over labels in several batches of the mean of 1 - |silhouette of the batch within the label|."""
        from sklearn.metrics import silhouette_samples

        found = []
        for label in np.unique(self._labels):
            cells = np.flatnonzero(self.labels == label)
            if 1 < len(np.unique(self.batches[cells])) < len(cells):
                found.append(1 - np.abs(silhouette_samples(self.x[cells], self.batches[cells])).mean())
        return float(np.mean(found)) if found else float("nan")

    @cached_property
    def _isolated(self) -> list[int]:
        return isolated_labels(self._labels, self.batches)

    @cached_property
    def _kmeans(self) -> dict[str, float]:
        import scib_metrics as library

        return dict(library.nmi_ari_cluster_labels_kmeans(self.x, self._labels))
