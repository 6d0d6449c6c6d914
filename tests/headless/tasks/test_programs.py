"""Programs of latent dimensions: traversal, ranks, filters, files; enrichment of their lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import torch

from headless.data.mosaic import Layout, Mosaic
from headless.errors import MosaicError
from headless.models import create, get
from headless.tasks import answer
from headless.tasks.enrichment import enrichment, motif_enrichment, program_enrichment, read_gmt
from headless.tasks.programs import points, programs, pseudocells, spearman

PATTERN = {"a": ["rna"], "b": ["adt"], "c": ["rna", "adt"]}


@pytest.fixture
def module(linear: Any, make_mosaic: Any) -> Any:
    """Parts c (dimensions 0 and 1) and u; log rates are linear, and depend on the batch."""
    return linear(Layout.of(make_mosaic(PATTERN)))


# ---- the traversal --------------------------------------------------------------------------------------------------


def test_points_of_the_traversal() -> None:
    assert points("faithful").tolist() == [i * 0.5 for i in range(-10, 10)]
    assert len(points("faithful")) == 20
    assert (points("corrected")[0], points("corrected")[-1], len(points("corrected"))) == (-5.0, 5.0, 21)


@pytest.mark.parametrize("kind", ["faithful", "corrected"])
def test_one_dimension_moves_and_the_others_stay_at_zero(module: Any, kind: Any) -> None:
    seen = []
    decode = module.decode
    module.decode = lambda latent, *rest: seen.append(latent.clone()) or decode(latent, *rest)
    programs(module, kind=kind)
    moved = seen[0].view(2, -1, 3)
    for number in range(2):
        assert moved[number, :, number].tolist() == points(kind).tolist()  # a prior of unit variance
        others = [d for d in range(3) if d != number]
        assert (moved[number][:, others] == 0).all()


def test_scmm_moves_by_the_scale_of_its_prior(make_mosaic: Any) -> None:
    mosaic = make_mosaic({"c": ["rna", "adt"]})
    module = create("scmm", get("scmm").config.make(dim=3), Layout.of(mosaic))
    for kind, scale in (("faithful", 1.0), ("corrected", 2**0.5)):
        found = programs(module, kind=kind)
        assert found.facts["sd"] == pytest.approx([scale] * 3)
        assert (found.facts["traversal"], found.facts["library"]) == (kind, 10_000)


def test_pseudocells_are_the_mean_over_the_batches_that_measured_the_modality(module: Any) -> None:
    latent = torch.randn(4, 3)
    by_hand = [module.decode(latent, "adt", torch.full((4,), code)).mean.numpy() for code in (1, 2)]
    np.testing.assert_allclose(pseudocells(module, "adt", latent), np.mean(by_hand, axis=0), rtol=1e-5)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_spearman_as_a_product_of_ranks_is_scipys() -> None:
    rng = np.random.default_rng(0)
    smooth, tied = rng.normal(size=(3, 20, 7)), rng.integers(0, 4, (3, 20, 7)).astype(float)
    for x in (np.arange(20.0), rng.integers(0, 6, 20)):
        for y in (smooth, tied):
            rho, p = spearman(x, y)
            for i in range(3):
                for g in range(7):
                    theirs = scipy.stats.spearmanr(x, y[i, :, g])
                    assert rho[i, g] == pytest.approx(theirs.statistic, abs=1e-12)
                    assert p[i, g] == pytest.approx(theirs.pvalue, rel=1e-8)


def test_constant_and_monotone_columns() -> None:
    x = np.arange(20.0)
    rho, p = spearman(x, np.stack([np.exp(x), -(x**3), np.full(20, 3.0)], axis=1))
    assert rho.tolist() == [1.0, -1.0, 0.0]
    assert p.tolist() == [0.0, 0.0, 1.0]


def test_thresholds_of_the_faithful_filter() -> None:
    """Of 20 pseudocells, p < 1e-12 means |rho| above 0.9717 and p < 1e-2 above 0.5614 (sheet, section 6)."""
    t = scipy.stats.t
    for alpha, expected in ((1e-12, 0.9717), (1e-2, 0.5614)):
        limit = t.isf(alpha / 2, 18)
        assert limit / np.sqrt(18 + limit**2) == pytest.approx(expected, abs=1e-4)


def test_signs_sizes_and_ranks_are_those_of_the_decoder(module: Any) -> None:
    """A log rate that is linear: every feature follows its weight, ratio = 10 weights sd / log 2."""
    found = programs(module).tables["rna"]
    assert list(found.columns) == [
        "dimension", "feature", "rho", "p", "q", "kept", "log2_ratio", "rank_up", "rank_down",
    ]  # fmt: skip
    weights = module.get_buffer("v_rna").numpy()
    for number in (1, 2):
        own = found[found["dimension"] == number].set_index("feature")
        w = weights[number - 1]
        np.testing.assert_array_equal(own["rho"], np.sign(w))
        np.testing.assert_allclose(own["log2_ratio"], 10 * w / np.log(2), rtol=1e-4)
        up = own["rank_up"].dropna().sort_values().index
        down = own["rank_down"].dropna().sort_values().index
        names = list(own.index)
        assert list(up) == [names[i] for i in np.argsort(-w) if w[i] > 0]
        assert list(down) == [names[i] for i in np.argsort(w) if w[i] < 0]
    assert set(found["dimension"]) == {1, 2}  # u is no program


def test_features_that_do_not_follow_are_not_kept(module: Any) -> None:
    module.get_buffer("v_rna")[0, 2] = 0.0
    found = programs(module).tables["rna"].query("dimension == 1").iloc[2]
    assert (found["rho"], found["p"], found["kept"], found["log2_ratio"]) == (0.0, 1.0, False, 0.0)
    assert found[["rank_up", "rank_down"]].isna().all()
    strict = programs(module, alpha={"rna": 0.0}).tables
    assert not strict["rna"]["kept"].any()
    assert strict["adt"]["rank_up"].notna().any()


def test_q_is_benjamini_hochberg_within_a_dimension(linear: Any, make_mosaic: Any) -> None:
    module = linear(Layout.of(make_mosaic(PATTERN)))
    noise = torch.Generator().manual_seed(0)
    mean = module.standard_mean
    module.standard_mean = lambda *args: mean(*args) * torch.rand(mean(*args).shape, generator=noise)
    for _, own in programs(module).tables["rna"].groupby("dimension"):
        assert own["p"].between(1e-9, 1, inclusive="neither").any()
        np.testing.assert_allclose(own["q"], scipy.stats.false_discovery_control(own["p"]))


def test_features_can_be_ranked_by_effect(make_mosaic: Any) -> None:
    module = create("scmm", get("scmm").config.make(dim=3), Layout.of(make_mosaic({"c": ["rna", "adt"]})))
    table = programs(module, rank_by="log2_ratio", alpha={"rna": 1.1}).tables["rna"]
    up = table[table["rank_up"].notna()].sort_values(["dimension", "rank_up"])
    for _, own in up.groupby("dimension"):
        assert own["log2_ratio"].is_monotonic_decreasing


@pytest.mark.parametrize("method", ["midas", "multigrate", "scmm"])
def test_every_method_with_pseudocells_has_programs(method: str, tiny_mosaic: Mosaic) -> None:
    torch.manual_seed(0)
    module = create(method, get(method).config.make(), Layout.of(tiny_mosaic))
    found = programs(module)
    part = module.parts[module.biological]
    for m, table in found.tables.items():
        assert len(table) == (part.stop - part.start) * len(tiny_mosaic.features[m])
        assert np.isfinite(table[["rho", "p", "q", "log2_ratio"]]).all().all()
        assert table["rho"].between(-1, 1).all()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_programs_are_written_and_read_back(module: Any, make_mosaic: Any, answered: Any) -> None:
    results = answered(module, make_mosaic(PATTERN), ["programs"], traversal="faithful")
    expected = programs(module, kind="faithful")
    for m in ("rna", "adt"):
        pd.testing.assert_frame_equal(results.programs(m), expected.tables[m], rtol=1e-6)
    assert results.programs("rna")["feature"].iloc[0] == "NA"  # a gene's name, not a missing value
    facts = results.index["programs"]
    assert facts == dict(expected.facts)
    assert "not that cells differ" in facts["note"]
    assert results.index["outputs"]["programs"] == {"state": "done"}
    with pytest.raises(MosaicError) as caught:
        results.programs("atac")
    assert caught.value.code == "run.no_result"
    (results.folder / "programs" / "rna.csv").write_text("nothing")
    with pytest.raises(MosaicError) as caught:
        results.programs("rna")
    assert caught.value.code == "run.damaged"


def test_without_being_asked_there_are_none(module: Any, make_mosaic: Any, answered: Any) -> None:
    answered(module, make_mosaic(PATTERN), ["programs"])
    results = answered(module, make_mosaic(PATTERN), [])
    assert not (results.folder / "programs").exists()
    with pytest.raises(MosaicError, match="no programs"):
        results.programs("rna")


def test_a_method_that_needs_the_data_of_a_cell_says_so(module: Any, make_mosaic: Any, tmp_path: Path) -> None:
    module.needs_context = True
    with pytest.raises(MosaicError, match="no pseudocells") as caught:
        programs(module)
    assert caught.value.code == "model.cannot"
    answer(module, make_mosaic(PATTERN), ["programs"], tmp_path / "results", lambda kind, **fields: None)
    from headless.results import Results

    assert Results(tmp_path / "results").index["outputs"]["programs"]["state"] == "cannot"


# ---- enrichment -----------------------------------------------------------------------------------------------------


def test_enrichment_is_the_hypergeometric_test(tmp_path: Path) -> None:
    background = [f"g{i}" for i in range(100)]
    chosen = [*background[:10], "not decoded"]
    sets = {"hit": [*background[:6], "elsewhere"], "miss": background[50:70], "outside": ["x", "y"]}
    table = enrichment(chosen, background, sets).set_index("set")
    assert list(table.index) == ["hit", "miss"]
    assert (table.loc["hit", "size"], table.loc["hit", "chosen"], table.loc["hit", "overlap"]) == (6, 10, 6)
    # All six among ten of a hundred: C(94, 4) / C(100, 10).
    assert table.loc["hit", "p"] == pytest.approx(scipy.special.comb(94, 4) / scipy.special.comb(100, 10))
    assert table.loc["hit", "q"] == pytest.approx(2 * table.loc["hit", "p"])
    assert table.loc["miss", ["overlap", "p", "expected"]].tolist() == [0, 1.0, 2.0]
    assert table.loc["hit", "features"] == "g0;g1;g2;g3;g4;g5"
    file = tmp_path / "sets.gmt"
    file.write_text("hit\thttp://x\t" + "\t".join(sets["hit"]) + "\n\nmiss\t\t" + "\t".join(sets["miss"]) + "\n")
    assert read_gmt(file)["hit"] == tuple(sets["hit"])
    pd.testing.assert_frame_equal(enrichment(chosen, background, file), table.reset_index())
    assert len(enrichment(chosen, background, {})) == 0


def test_faults_of_a_gmt_file(tmp_path: Path) -> None:
    with pytest.raises(MosaicError) as caught:
        read_gmt(tmp_path / "absent.gmt")
    assert caught.value.code == "data.missing_file"
    bad = tmp_path / "bad.gmt"
    bad.write_text("one\tx\tA\ntwo\tx\n")
    with pytest.raises(MosaicError, match="Line 2") as caught:
        read_gmt(bad)
    assert caught.value.code == "data.unreadable"


def test_enrichment_of_programs_finds_the_planted_set(module: Any) -> None:
    table = programs(module).tables["rna"]
    own = table[table["dimension"] == 1]
    rising = list(own["feature"][own["rank_up"].notna()])
    found = program_enrichment(table, {"rising": rising})
    best = found.sort_values("p").iloc[0]
    assert (best["dimension"], best["direction"], best["overlap"]) == (1, "up", len(rising))
    assert set(found["direction"]) == {"up", "down"}
    few = program_enrichment(table, {"rising": rising}, top=1)
    assert (few["chosen"] <= 1).all()


def test_motifs_are_tested_against_peaks_of_the_same_gc_content() -> None:
    """A motif that only follows GC content is found by a plain test and not by the matched one; a real one stays."""
    rng = np.random.default_rng(0)
    n = 4000
    gc = rng.uniform(0.3, 0.7, n)
    names = [f"p{i}" for i in range(n)]
    chosen = rng.random(n) < np.clip((gc - 0.45) * 0.8, 0, 1)
    rich = rng.random(n) < np.clip((gc - 0.3) * 2, 0, 1)
    real = rng.random(n) < np.where(chosen, 0.5, 0.2)
    motifs = pd.DataFrame({"GC-rich": rich, "real": real}, index=names)
    picked = [name for name, here in zip(names, chosen, strict=True) if here]
    plain = enrichment(picked, names, {m: motifs.index[motifs[m]] for m in motifs}).set_index("set")
    matched = motif_enrichment(picked, motifs, pd.Series(gc, index=names)).set_index("set")
    assert plain.loc["GC-rich", "p"] < 1e-8
    assert matched.loc["GC-rich", "p"] > 0.01
    assert matched.loc["real", "p"] < 1e-10
    with pytest.raises(MosaicError, match="GC content") as caught:
        motif_enrichment(picked, motifs, None)
    assert caught.value.code == "model.cannot"
