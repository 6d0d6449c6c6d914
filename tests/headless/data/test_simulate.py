"""The simulator: repeatable, realistic where it claims to be, and its truth is true."""

from __future__ import annotations

from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from headless.data.blood import CHROMOSOMES, PEAK_WIDTH, TYPES
from headless.data.mosaic import Layout
from headless.data.simulate import PATTERN, TRUTH_FILE, Simulated, simulate
from headless.errors import MosaicError


@pytest.fixture(scope="module")
def sample() -> Simulated:
    return simulate(1600, n_genes=600, n_proteins=30, n_peaks=1500, seed=3)


def embedding(x: object, n: int = 15) -> np.ndarray:
    """PCs of depth-normalised log counts."""
    x = x.tocsr().astype(float)  # type: ignore[attr-defined]
    total = np.maximum(np.asarray(x.sum(axis=1)).ravel(), 1)
    x = x.multiply(1e3 / total[:, None]).tocsr()
    return TruncatedSVD(n, random_state=0).fit_transform(x.log1p())


def accuracy(x: np.ndarray, y: pd.Series) -> float:
    return float(cross_val_score(KNeighborsClassifier(10), x, y.to_numpy(), cv=3).mean())


def test_the_same_seed_makes_the_same_sample_and_another_one_another() -> None:
    def size(seed: int) -> Simulated:
        return simulate(80, n_genes=40, n_proteins=8, n_peaks=60, seed=seed)

    assert size(1).fingerprint() == size(1).fingerprint()
    assert size(1).fingerprint() != size(2).fingerprint()


def test_leaving_out_what_is_hidden_does_not_change_what_is_shown() -> None:
    arguments = {"n_cells": 80, "n_genes": 40, "n_proteins": 8, "n_peaks": 60}
    whole, lean = simulate(**arguments), simulate(**arguments, complete=False)
    for key, tile in whole.to_mosaic().tiles.items():
        other = lean.to_mosaic().tiles[key]
        assert (tile.source.all_rows().to_scipy() != other.source.all_rows().to_scipy()).nnz == 0, key
    assert lean.counts["rna"].nnz < whole.counts["rna"].nnz
    with pytest.raises(ValueError, match="complete=False"):
        lean.to_mosaic(whole=True)


def test_density_and_values_are_those_of_real_counts(sample: Simulated) -> None:
    density = {m: x.nnz / np.prod(x.shape) for m, x in sample.counts.items()}
    assert 0.05 < density["rna"] < 0.15
    assert 0.02 < density["atac"] < 0.08
    assert density["adt"] > 0.8
    for x in sample.counts.values():
        assert x.dtype == np.float32
        assert (x.data == np.round(x.data)).all()
        assert x.data.min() >= 1
    assert sample.counts["atac"].max() == 1
    library = np.asarray(sample.counts["rna"].sum(axis=1)).ravel()
    assert library.max() / np.median(library) > 2  # log-normal, not constant


def test_cell_types_are_unequal_separable_and_batches_visible(sample: Simulated) -> None:
    shares = sample.cells["label"].value_counts(normalize=True)
    assert set(shares.index) <= set(TYPES)
    assert len(shares) >= 9
    assert shares.max() > 8 * shares.min()
    for modality, least in {"rna": 0.7, "adt": 0.8, "atac": 0.65}.items():
        z = embedding(sample.counts[modality])
        assert accuracy(z, sample.cells["label"]) > least, modality
        assert accuracy(z, sample.cells["batch"]) > 0.4, modality  # chance: 0.25
    pattern = dict.fromkeys("abcd", ("rna",))
    plain = simulate(1600, pattern, n_genes=600, n_proteins=0, n_peaks=0, batch_effect=0)
    assert accuracy(embedding(plain.counts["rna"]), plain.cells["batch"]) < 0.35


def test_related_types_lie_close_to_each_other(sample: Simulated) -> None:
    z = pd.DataFrame(embedding(sample.counts["rna"])).groupby(sample.cells["label"].to_numpy()).mean()

    def distance(a: str, b: str) -> float:
        return float(np.linalg.norm(z.loc[a] - z.loc[b]))

    assert distance("CD4 naive T", "CD8 naive T") < distance("CD4 naive T", "B")
    assert distance("CD8 effector T", "NK") < distance("CD8 effector T", "CD14 Mono")
    assert distance("CD14 Mono", "CD16 Mono") < distance("CD14 Mono", "CD4 memory T")


@pytest.mark.parametrize(
    ("modality", "feature", "where"),
    [
        ("rna", "MS4A1", "B"), ("rna", "PPBP", "Platelet"), ("rna", "S100A8", "CD14 Mono"), ("rna", "NCAM1", "NK"),
        ("adt", "CD19", "B"), ("adt", "CD14", "CD14 Mono"), ("adt", "CD56", "NK"),
    ],
)  # fmt: skip
def test_markers_mark_their_type(sample: Simulated, modality: str, feature: str, where: str) -> None:
    column = sample.features[modality].index.get_loc(feature)
    x = sample.counts[modality][:, [column]].toarray().ravel()
    means = pd.Series(x).groupby(sample.cells["label"].to_numpy()).mean()
    assert means.idxmax() == where
    assert means[where] > 4 * means.drop(where).median()


def test_linked_peaks_follow_their_genes_and_lie_near_them(sample: Simulated) -> None:
    links = sample.links
    genes, peaks = sample.features["rna"], sample.features["atac"]
    assert links["gene"].isin(genes.index).all()
    assert (peaks.loc[links["peak"], "chrom"].to_numpy() == genes.loc[links["gene"], "chrom"].to_numpy()).all()
    assert (links.loc[links["kind"] == "promoter", "distance"].median()) < 1_000 < links["distance"].max() <= 120_000

    # Pseudo-bulks of thirty cells each, from counts alone.
    group = np.arange(len(sample.cells)) // 4
    order = np.lexsort((sample.truth.programs[:, 0], sample.cells["label"]))
    sums = [pd.DataFrame(sample.counts[m][order].toarray()).groupby(group).sum() for m in ("rna", "atac")]
    strong = np.abs(sample.truth.biology.loadings["rna"]).max(axis=0) > 2  # markers; others hardly vary
    of_marker = links[strong[genes.index.get_indexer(links["gene"])]]
    rna = sums[0].to_numpy()[:, genes.index.get_indexer(of_marker["gene"])]
    atac = sums[1].to_numpy()[:, peaks.index.get_indexer(of_marker["peak"])]

    def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        with np.errstate(invalid="ignore"):
            return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))

    linked = np.nanmedian(correlations(rna, atac))
    unlinked = np.nanmedian(np.abs(correlations(rna, np.roll(atac, len(of_marker) // 3, axis=1))))
    assert linked > 0.25
    assert linked > 2 * unlinked


def test_coordinates_are_of_hg38_and_peaks_do_not_overlap(sample: Simulated) -> None:
    genes, peaks = sample.features["rna"], sample.features["atac"]
    assert tuple(genes.loc["CD3D", ["chrom", "start"]]) == ("chr11", 118339073)
    assert tuple(genes.loc["CD8A", ["chrom", "strand"]]) == ("chr2", "-")
    assert (genes["end"] > genes["start"]).all()
    assert (peaks["end"] - peaks["start"] == PEAK_WIDTH).all()
    assert list(dict.fromkeys(peaks["chrom"])) == [c for c in CHROMOSOMES if c in set(peaks["chrom"])]
    for _, table in peaks.groupby("chrom"):
        assert (table["start"].to_numpy()[1:] > table["end"].to_numpy()[:-1]).all()
    assert peaks.index.is_unique
    assert sum(Layout.of(sample.to_mosaic()).chunks["atac"]) == len(peaks)


def test_proteins_know_their_genes_and_controls_are_background(sample: Simulated) -> None:
    proteins = sample.features["adt"]
    assert proteins.loc["CD3", "gene"] == "CD3E"
    controls = proteins["isotype_control"].to_numpy()
    assert controls.sum() == 3
    mean = np.asarray(sample.counts["adt"].mean(axis=0)).ravel()
    assert mean[controls].max() < np.median(mean[~controls])


def test_expected_values_are_the_means_of_the_counts(sample: Simulated) -> None:
    cells = np.arange(len(sample.cells))
    for modality, x in sample.counts.items():
        expected = sample.expected(modality, cells)
        assert expected.sum() == pytest.approx(x.sum(), rel=0.02)
        by_feature = np.corrcoef(expected.mean(axis=0), np.asarray(x.mean(axis=0)).ravel())[0, 1]
        assert by_feature > 0.99, modality


def test_the_mosaic_shows_the_pattern_and_hides_the_rest(sample: Simulated) -> None:
    mosaic = sample.to_mosaic()
    assert set(mosaic.tiles) == {(b, m) for b, names in PATTERN.items() for m in names}
    for (batch, modality), tile in mosaic.tiles.items():
        assert tile.mask is not None
        rows = tile.source.all_rows().to_scipy()
        assert rows[:, ~tile.mask].nnz == 0
        assert (mosaic.cells["batch"].iloc[tile.cells] == batch).all()
        measured = np.any([mosaic.tiles[b, modality].mask for b, names in PATTERN.items() if modality in names], axis=0)
        assert measured.all()
    whole = sample.to_mosaic(whole=True)
    assert len(whole.tiles) == 12
    assert all(tile.mask is None for tile in whole.tiles.values())


def test_files_hold_what_the_mosaic_shows_and_the_truth_lies_apart(sample: Simulated, tmp_path: Path) -> None:
    paths = sample.write(tmp_path)
    assert [path.name for path in paths] == ["cite.h5mu", "multiome.h5mu", "asap.h5mu", "tea.h5mu"]
    assert sorted(tmp_path.glob("*.h5mu")) == sorted(paths)
    mosaic = sample.to_mosaic()
    with mudata.set_options(pull_on_update=False):
        opened = {path.stem: mudata.read_h5mu(path) for path in paths}
    for (batch, modality), tile in mosaic.tiles.items():
        part: anndata.AnnData = opened[batch][modality]
        assert tile.mask is not None
        assert list(part.var_names) == list(sample.features[modality].index[tile.mask])
        assert (tile.source.all_rows().to_scipy()[:, tile.mask] != part.X).nnz == 0
        assert list(part.obs["cell_type"]) == list(mosaic.cells["label"].iloc[tile.cells])
    assert set(opened["multiome"].mod) == {"rna", "atac"}
    assert {"chrom", "start", "end"} <= set(opened["multiome"]["atac"].var)
    truth = mudata.read_h5mu(tmp_path / TRUTH_FILE)
    assert (sample.counts["rna"] != truth["rna"].X).nnz == 0
    assert len(truth["atac"].uns["links"]) == len(sample.links)
    assert truth["adt"].obs["measured"].sum() == mosaic.measured("adt").sum()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    sample = simulate(20, n_genes=10, n_proteins=3, n_peaks=0, pattern={"a": ("rna", "adt")})
    with pytest.raises(MosaicError) as caught:
        sample.write(blocked / "below")
    assert caught.value.code.startswith("disk.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": 2}, "each batch needs a cell"),
        ({"pattern": {"a": ("rna", "atac")}, "n_peaks": 0}, "no such modality here: atac"),
        ({"pattern": {"a": ()}}, "none given"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"n_cells": 30, "n_genes": 10, "n_proteins": 3, **arguments})  # type: ignore[arg-type]


def test_sizes_of_batches_follow_the_shares() -> None:
    sample = simulate(
        90, {"a": ("rna",), "b": ("rna", "adt")}, {"a": 2, "b": 1}, n_genes=12, n_proteins=4, n_peaks=0
    )
    assert sample.cells["batch"].value_counts().to_dict() == {"a": 60, "b": 30}
    assert sample.cells.index.is_unique
    assert sample.cells["barcode"].str.fullmatch(r"[ACGT]{16}-1").all()
