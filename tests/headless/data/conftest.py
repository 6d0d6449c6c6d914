"""Matrices in memory, small enough to read, for tests of what happens between the files and the mosaic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless.data.batching import Part
from headless.data.matrix import Matrix

MakePart = Callable[..., Part]


def _part(
    dataset: str,
    modality: str,
    counts: Any,
    barcodes: Sequence[str],
    names: Sequence[str],
    batch: str | Sequence[str | None] | None = None,
    label: Sequence[str | None] | None = None,
    obs: pd.DataFrame | None = None,
    **columns: Sequence[Any],
) -> Part:
    barcodes = np.array(list(barcodes), dtype=object)
    matrix = Matrix(
        x=counts if sp.issparse(counts) else sp.csr_matrix(np.asarray(counts, dtype=np.float32)),
        barcodes=barcodes,
        features=pd.DataFrame(columns, index=pd.Index(list(names), dtype=object)),
        obs=pd.DataFrame(index=barcodes) if obs is None else obs.set_axis(barcodes),
        modality=modality,
        source=f"{dataset}.h5mu:{modality}",
    )
    batches = np.full(len(barcodes), dataset if batch is None else batch, dtype=object)
    if batch is not None and not isinstance(batch, str):
        batches = np.array(batch, dtype=object)
    return Part(dataset, matrix, batches, None if label is None else np.array(label, dtype=object))


@pytest.fixture(scope="session")
def make_part() -> MakePart:
    """``make_part(dataset, modality, counts, barcodes, names, batch=..., label=..., obs=..., **feature_columns)``."""
    return _part
