"""Real files: described in well under a second, read with the shapes of their documentation, left as they were."""

from __future__ import annotations

import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from headless.data.modality import recognise
from headless.data.propose import propose
from headless.data.read import peek, read_matrix
from headless.data.sources import ZarrRows

SHAPES = {
    "midas_quickstart_pbmc": {"rna": (1200, 500), "adt": (1200, 224)},
    "pbmc10k_cite": {"rna": (6855, 4000), "adt": (6855, 17)},
    "malt_cite": {"rna": (2100, 15161), "adt": (2100, 17)},
    "bmmc_neurips_cite": {"rna": (600, 1000), "adt": (600, 134)},
    "bmmc_neurips_multiome": {"rna": (500, 600), "atac": (500, 600)},
    "asap_pbmc_adt_only": {"adt": (17055, 216)},
    "kang_pbmc_stim_rna": {"rna": (2000, 9015)},
    "scicar_a549": {"rna": (2641, 1185), "atac": (2641, 52761)},
    "mop_snareseq_dev": {"rna": (5232, 1677), "atac": (5232, 25734)},
    "tasks/pbmc_mosaic": {"rna": (4204, 2000), "adt": (4188, 14)},
    "tasks/pbmc_mosaic.truth": {"rna": (5994, 2000), "adt": (5994, 14)},
}
BATCHES = {"midas_quickstart_pbmc": 4, "mop_snareseq_dev": 6, "asap_pbmc_adt_only": 4, "pbmc10k_cite": 1}


@pytest.mark.parametrize("name", SHAPES)
def test_real_file(shared_data: Path, name: str, tmp_path: Path) -> None:
    path = shared_data / f"{name}.h5mu"
    before = path.stat()
    peek(path)  # imports of libraries are not the file's fault
    start = time.perf_counter()
    info = peek(path)
    assert time.perf_counter() - start < 1.0
    assert info.format == "h5mu"
    assert {m.modality: (m.n_cells, m.n_features) for m in info.matrices} == SHAPES[name]
    assert all(
        m.counts == ("binary" if name == "scicar_a549" and m.modality == "atac" else "counts") for m in info.matrices
    )
    batch = next(column for column in info.obs_columns if column.name == "batch")
    assert batch.n_levels == BATCHES.get(name, batch.n_levels)
    for described in info.matrices:
        matrix = read_matrix(path, described.key, described.layer)
        assert matrix.x.shape == SHAPES[name][described.modality]
        with h5py.File(path, "r") as file:  # an independent look at the stored numbers and names
            part = file[described.key]
            assert float(matrix.x.sum(dtype=np.float64)) == float(part["X/data"][...].sum(dtype=np.float64))
            assert matrix.barcodes.tolist() == part["obs/_index"].asstr()[...].tolist()
            codes, levels = part["obs/batch/codes"][...], part["obs/batch/categories"].asstr()[...]
        assert matrix.obs["batch"].astype(str).tolist() == levels[codes].tolist()
        assert ("chrom" in matrix.features) == (described.modality == "atac")
        if described.modality == "atac":
            assert (matrix.features["end"] > matrix.features["start"]).all()
        lazy = read_matrix(path, described.key, described.layer, on_disk=True)
        assert isinstance(lazy.x, ZarrRows)
        which = np.array([5, 0, 299, 5])
        assert (lazy.x.rows(which).to_scipy() != matrix.x[which]).nnz == 0
        # the names alone tell the modality too
        assert recognise(matrix.features.index.tolist(), matrix.x.shape[1])[0] == described.modality
    ref = propose(info, tmp_path, None, None)
    assert (ref.batch_column, {m.modality for m in ref.matrices}) == ("batch", set(SHAPES[name]))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)


def test_isotype_controls_and_genome(shared_data: Path) -> None:
    adt = read_matrix(shared_data / "pbmc10k_cite.h5mu", "mod/adt").features
    assert adt.index[adt["isotype_control"]].tolist() == ["IgG1", "IgG2a", "IgG2b"]
    assert {m.genome for m in peek(shared_data / "scicar_a549.h5mu").matrices} == {"hg19"}
    assert {m.genome for m in peek(shared_data / "mop_snareseq_dev.h5mu").matrices} == {"mm10"}
