"""Fixtures that every test may use, and the calm that tests need: one thread, no display, nobody's caches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic

# Before numpy and torch are imported for the first time: two test processes on two cores, one thread each.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("MPLBACKEND", "agg")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets (``MOSAIC_SHARED_DATA``, or ``shared/data`` beside the checkout), for reading only.

    They are too large and not ours to ship, so tests that need them are skipped where they are absent.
    """
    named = os.environ.get("MOSAIC_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "midas_quickstart_pbmc.h5mu").is_file():
        pytest.skip(f"no real data sets in {folder}; set MOSAIC_SHARED_DATA to a folder that has them")
    return folder


@pytest.fixture(scope="session")
def tiny_mosaic() -> Mosaic:
    """Simulated: four batches of 50 cells with two or three modalities each, features missing here and there.

    Shared by all tests of a session: make another mosaic of it, never change its arrays.
    """
    from headless.data.simulate import simulate

    return simulate(200, n_genes=80, n_proteins=20, n_peaks=120).to_mosaic()
