"""Real files into mosaics: batches, joins, masks and refusals as they must be for published data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headless.data import genome
from headless.data.build import assemble, build_mosaic, pairing_reports, quality, read_parts, suggest_qc
from headless.data.columns import column_stats
from headless.data.datasets import DatasetRef
from headless.data.fingerprint import fingerprint
from headless.data.mosaic import Layout, Mosaic
from headless.data.preparation import Preparation
from headless.data.propose import propose
from headless.data.read import peek
from headless.data.sources import MemoryRows, ZarrRows
from headless.errors import MosaicError

References = Callable[..., list[DatasetRef]]


@pytest.fixture(scope="session")
def references(shared_data: Path) -> References:
    """``references("a", "b")``: what a project would keep of the files a.h5mu and b.h5mu."""
    return lambda *names: [propose(peek(shared_data / f"{name}.h5mu"), shared_data) for name in names]


@pytest.fixture(scope="session")
def build(references: References, shared_data: Path) -> Callable[..., Mosaic]:
    return lambda *names, **fields: build_mosaic(references(*names), Preparation(**fields), shared_data)


def sizes(mosaic: Mosaic) -> dict[tuple[str, str], tuple[int, int]]:
    return {(tile.batch, tile.modality): (tile.n_cells, tile.n_features) for tile in mosaic.pattern().tiles}


def test_the_quickstart_is_a_mosaic_of_four_batches(build: Callable[..., Mosaic]) -> None:
    mosaic = build("midas_quickstart_pbmc")
    assert sizes(mosaic) == {
        ("p1_0", "rna"): (400, 500),
        ("p2_0", "adt"): (400, 224),
        ("p3_0", "rna"): (400, 500),
        ("p3_0", "adt"): (400, 224),
        ("p4_0", "rna"): (400, 500),
        ("p4_0", "adt"): (400, 224),
    }
    assert mosaic.batches == ("p1_0", "p2_0", "p3_0", "p4_0")
    assert mosaic.cells["label"].nunique() == 8
    assert mosaic.features["adt"].loc["CD45RA", "gene"] == "PTPRC"
    assert len(mosaic.pattern().bridges()) == 1


def test_tiles_hold_the_counts_of_the_file_cell_by_cell(build: Callable[..., Mosaic], shared_data: Path) -> None:
    import mudata

    mosaic = build("midas_quickstart_pbmc")
    truth = mudata.read_h5mu(shared_data / "midas_quickstart_pbmc.h5mu")["adt"]
    tile = mosaic.tiles["p3_0", "adt"]
    names = mosaic.cells.index[tile.cells]
    values = pd.DataFrame(
        tile.source.all_rows().to_scipy().toarray(), index=names, columns=mosaic.features["adt"].index
    )
    # The file writes cd127, cd3.1 and hla.dr.
    for ours, theirs in {"CD127": "cd127", "CD3": "cd3.1", "CD3-2": "cd3.2", "HLA-DR": "hla.dr"}.items():
        expected = truth[names, theirs].X.toarray().ravel()
        np.testing.assert_array_equal(values[ours].to_numpy(), expected)


def test_blood_from_three_studies_shares_fourteen_proteins(build: Callable[..., Mosaic]) -> None:
    mosaic = build("pbmc10k_cite", "asap_pbmc_adt_only", "kang_pbmc_stim_rna", n_top_genes=2000)
    assert mosaic.batches == ("pbmc10k", "c1", "c2", "c3", "c4", "ctrl", "stim")
    assert len(mosaic.features["adt"]) == 216  # the 14 without their isotype controls are among the 216
    shared = mosaic.tiles["pbmc10k", "adt"].mask
    assert shared.sum() == 14
    assert set(mosaic.features["adt"].index[shared]) == {
        "CD127", "CD14", "CD15", "CD16", "CD19", "CD25", "CD3", "CD45RA", "CD45RO", "CD4", "CD56", "CD8a", "CD279",
        "TIGIT",
    }
    assert mosaic.tiles["c1", "adt"].mask is None
    assert ("c1", "rna") not in mosaic.tiles
    rna = mosaic.features["rna"].index
    assert {"IL7R", "MS4A1", "NCAM1", "CD3E"} <= set(rna)  # genes of measured proteins
    assert 2000 < len(rna) < 2200
    assert column_stats(mosaic.tiles["ctrl", "rna"].source).cells[~mosaic.tiles["ctrl", "rna"].mask].sum() == 0
    assert len(mosaic.pattern().bridges()) == 1


def test_marrow_from_two_assays_has_three_modalities(build: Callable[..., Mosaic]) -> None:
    mosaic = build("bmmc_neurips_cite", "bmmc_neurips_multiome")
    assert mosaic.modalities == ("rna", "adt", "atac")
    assert len(mosaic.batches) == 4  # both files have s1d1 and s1d2, of other cells
    both = np.logical_and.reduce([mosaic.tiles[batch, "rna"].mask for batch in mosaic.batches])
    assert both.sum() == 90
    assert len(mosaic.features["rna"]) == 1510
    assert genome.compatible(mosaic.features["atac"]) == ("hg38",)
    assert all(sizes(mosaic)[batch, "rna"][0] > 200 for batch in mosaic.batches)


def test_a_sparse_cortex_keeps_its_peaks_and_stays_sparse(build: Callable[..., Mosaic]) -> None:
    mosaic = build("mop_snareseq_dev")
    assert mosaic.n_cells == 5232
    assert len(mosaic.batches) == 6
    peaks = mosaic.features["atac"]
    assert len(peaks) == Preparation().min_peaks
    chromosomes = list(dict.fromkeys(peaks["chrom"]))
    assert chromosomes == [*(f"chr{i}" for i in range(1, 20)), "chrX"]
    assert Layout.of(mosaic).chunks["atac"] == tuple(peaks["chrom"].value_counts()[chromosomes])
    assert genome.compatible(peaks) == ("mm10",)
    stored = 0
    for tile in mosaic.tiles.values():
        if tile.modality == "atac":
            assert isinstance(tile.source, MemoryRows)
            matrix = tile.source.matrix
            stored += matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    assert stored < 0.02 * mosaic.n_cells * len(peaks) * 4
    assert any("266 peaks are open in more than 4%" in note for note in mosaic.notes)


def test_the_published_peak_filter_can_be_had(build: Callable[..., Mosaic]) -> None:
    assert len(build("mop_snareseq_dev", min_peaks=0).features["atac"]) == 266


def test_two_tissues_with_one_panel(build: Callable[..., Mosaic]) -> None:
    mosaic = build("pbmc10k_cite", "malt_cite")
    assert sizes(mosaic)["malt", "adt"] == (2100, 14)
    assert mosaic.tiles["pbmc10k", "adt"].mask is None
    assert mosaic.tiles["malt", "adt"].mask is None
    assert set(mosaic.cells.loc[mosaic.cells["batch"] == "malt", "label"]) == {"unknown"}


def test_the_assembly_of_peaks_is_found_and_a_wrong_one_refused(build: Callable[..., Mosaic]) -> None:
    mosaic = build("scicar_a549")
    assert any("hg19" in note for note in mosaic.notes)
    assert mosaic.features["atac"]["chrom"].nunique() == 24
    with pytest.raises(MosaicError, match="hg38") as caught:
        build("scicar_a549", genome="hg38")
    assert caught.value.code == "data.wrong_genome"
    with pytest.raises(MosaicError, match="hg19 against hg38") as caught:
        build("scicar_a549", "bmmc_neurips_multiome")
    assert caught.value.code == "data.wrong_genome"


def test_mouse_and_human_are_not_mixed(build: Callable[..., Mosaic]) -> None:
    with pytest.raises(MosaicError) as caught:
        build("mop_snareseq_dev", "kang_pbmc_stim_rna")
    assert caught.value.code in ("data.no_shared_feature", "data.wrong_genome")


def test_quality_is_suggested_and_applied(references: References, shared_data: Path) -> None:
    parts = read_parts(references("malt_cite"), shared_data)
    tables = quality(parts)
    assert set(tables["malt", "rna"].columns) == {"counts", "features", "mito"}
    assert "isotype" in tables["malt", "adt"]
    limits = suggest_qc(tables)
    mosaic = assemble(parts, Preparation(qc=limits, n_top_genes=500, hvg_flavor="polynomial"))
    assert 1500 < mosaic.n_cells < 2100
    (report,) = pairing_reports(parts)
    assert (report.matched, report.n_cells, report.extra) == (2100, 2100, {"rna": 0, "adt": 0})


def test_matrices_may_stay_on_disk_and_files_are_not_touched(references: References, shared_data: Path) -> None:
    refs = references("midas_quickstart_pbmc")
    before = fingerprint(shared_data / "midas_quickstart_pbmc.h5mu")
    here = build_mosaic(refs, Preparation(), shared_data)
    there = build_mosaic(refs, Preparation(), shared_data, on_disk=True)
    assert isinstance(there.tiles["p3_0", "rna"].source, ZarrRows)
    pd.testing.assert_frame_equal(here.cells, there.cells)
    for key, tile in here.tiles.items():
        ours, theirs = (m.tiles[key].source.all_rows().to_scipy() for m in (here, there))
        theirs.sort_indices()
        assert (ours != theirs).nnz == 0, key
        np.testing.assert_array_equal(tile.cells, there.tiles[key].cells)
    assert fingerprint(shared_data / "midas_quickstart_pbmc.h5mu") == before


def test_a_column_that_is_absent_is_named_with_those_there_are(references: References, shared_data: Path) -> None:
    (ref,) = references("malt_cite")
    with pytest.raises(MosaicError, match="donor") as caught:
        build_mosaic([ref.model_copy(update={"batch_column": "donor"})], Preparation(), shared_data)
    assert caught.value.code == "data.no_column"
    assert "streak_split" in caught.value.hint
