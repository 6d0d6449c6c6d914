"""The checks of fidelity to scMM (sheet, section 8): counts, known answers, limits, invariances, planted factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import linear_sum_assignment

from headless.data.minibatch import Minibatch, MinibatchMaker
from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.pattern import Pattern, TilePattern
from headless.data.sources import MemoryRows
from headless.models import create, get
from headless.models.count_likelihoods import NegativeBinomial, ZeroInflatedNB
from headless.models.scmm.config import ScmmConfig
from headless.models.scmm.module import Scmm, gaussian_kl, laplace_kl
from headless.models.scmm.networks import SplitBatchNorm, take_rows
from headless.train.loop import fit, seed_all

SMALL = {"hidden_rna": 24, "hidden_other": 12, "dim": 4, "kl_warmup": 0}


def layout(**sizes: int) -> Layout:
    return Layout(
        ("b",),
        {m: tuple(f"{m}{i}" for i in range(n)) for m, n in sizes.items()},
        dict.fromkeys(sizes, ("b",)),
        {m: (n,) for m, n in sizes.items()},
    )


def small_mosaic(counts: dict[str, np.ndarray], batch: list[str] | None = None, **has: np.ndarray) -> Mosaic:
    """Counts of all cells by modality; ``has`` names the cells that have it, all by default."""
    n = len(next(iter(counts.values())))
    codes = np.array(batch or ["b"] * n)
    names = [f"c{i}" for i in range(n)]
    tiles = {}
    for m, x in counts.items():
        for b in dict.fromkeys(codes):
            cells = np.flatnonzero((codes == b) & has.get(m, np.ones(n, dtype=bool)))
            if len(cells):
                tiles[b, m] = Tile(b, m, MemoryRows(sp.csr_matrix(x[cells].astype(np.float32))), cells)
    features = {m: pd.DataFrame(index=[f"{m}{i}" for i in range(x.shape[1])]) for m, x in counts.items()}
    cells = pd.DataFrame({"batch": codes, "barcode": names}, index=names)
    return Mosaic(cells, tuple(dict.fromkeys(codes)), features, tiles)


@pytest.fixture
def paired() -> Mosaic:
    rng = np.random.default_rng(0)
    return small_mosaic({"rna": rng.poisson(1.0, (30, 40)), "adt": rng.poisson(5.0, (30, 6))})


@pytest.fixture
def three() -> Mosaic:
    """Cells with every combination of three modalities, in two batches."""
    rng = np.random.default_rng(1)
    n = 42
    pattern = np.arange(n) % 7 + 1
    counts = {"rna": rng.poisson(1.0, (n, 20)), "adt": rng.poisson(4.0, (n, 5)), "atac": rng.poisson(0.4, (n, 25)) + 0}
    counts["atac"][:, 0] += 1
    has = {m: (pattern >> i & 1).astype(bool) for i, m in enumerate(counts)}
    return small_mosaic(counts, ["a"] * 21 + ["b"] * 21, **has)


def make(mosaic: Mosaic, **settings: object) -> Scmm:
    torch.manual_seed(0)
    made = create("scmm", ScmmConfig(**(SMALL | settings)), Layout.of(mosaic))
    assert isinstance(made, Scmm)
    return made


def whole(mosaic: Mosaic, cells: np.ndarray | None = None) -> Minibatch:
    return MinibatchMaker(mosaic).make(np.arange(mosaic.n_cells) if cells is None else cells)


def loss_of(module: Scmm, batch: Minibatch, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.stack(list(module.loss(batch).values())).sum()


def without_noise(module: Scmm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_draw", lambda expert: expert.location)


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_number_of_parameters() -> None:
    module = Scmm(ScmmConfig(), layout(rna=5000, adt=25))
    parts = [module.encoders["rna"], module.decoders["rna"], module.encoders["adt"], module.decoders["adt"]]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [512_620, 1_021_600, 1_440, 1_770]
    assert sum(p.numel() for p in module.parameters()) == 1_537_430 + 10


def test_laplace_kl_known_answer() -> None:
    location, scale = torch.tensor([0.3, -1.2]), torch.tensor([0.5, 1.5])
    prior = torch.tensor([1.0, 0.7])
    found = laplace_kl(location, scale, prior)
    assert found.tolist() == pytest.approx([0.2676, 0.9150], abs=1e-4)
    laplace = torch.distributions.Laplace
    theirs = torch.distributions.kl_divergence(laplace(location, scale), laplace(torch.zeros(2), prior))
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(laplace_kl(torch.zeros(2), prior, prior), torch.zeros(2))


def test_gaussian_kl_known_answer() -> None:
    found = gaussian_kl(torch.tensor(0.3), torch.tensor(0.5), torch.tensor(1.0))
    assert found.item() == pytest.approx(0.3631, abs=1e-4)
    wide = torch.tensor(1.7)
    assert gaussian_kl(torch.tensor(0.0), wide, wide).item() == pytest.approx(0.0, abs=1e-6)


def test_likelihoods_known_answers(paired: Mosaic) -> None:
    logit = torch.tensor([[np.log(0.3 / 0.7)]], dtype=torch.float32)
    for x, expected in ((0.0, -0.891687), (4.0, -3.5078)):
        tile = whole(small_mosaic({"rna": np.array([[x]])})).x["rna"]
        assert -NegativeBinomial(torch.tensor([[2.5]]), logit).nll(tile).item() == pytest.approx(expected, abs=1e-4)
    tile = whole(small_mosaic({"rna": np.array([[0.0]])})).x["rna"]
    gate = torch.tensor([[np.log(0.2 / 0.8)]], dtype=torch.float32)
    inflated = ZeroInflatedNB(torch.tensor([[2.5]]), logit, gate)
    assert -inflated.nll(tile).item() == pytest.approx(-0.638714, abs=1e-5)
    shut = ZeroInflatedNB(torch.tensor([[2.5]]), logit, torch.tensor([[-40.0]]))
    assert -shut.nll(tile).item() == pytest.approx(-0.891687, abs=1e-5)


def test_atac_is_zero_inflated_and_the_others_are_not(three: Mosaic) -> None:
    module = make(three).eval()
    batch = whole(three)
    kinds = {m: type(module.decode(torch.zeros(2, 4), m, batch.batch[:2])) for m in three.modalities}
    assert kinds == {"rna": NegativeBinomial, "adt": NegativeBinomial, "atac": ZeroInflatedNB}


def test_scales_share_a_fixed_budget(paired: Mosaic) -> None:
    module = make(paired).eval()
    for expert in module._experts(whole(paired)).values():
        torch.testing.assert_close(expert.scale.sum(1), torch.full((30,), 4 * (1 + 1e-6)))
    raw = torch.randn(5, 4)
    torch.testing.assert_close(module._scale(raw), module._scale(raw + 3.0))
    gaussian = make(paired, posterior="gaussian")
    torch.testing.assert_close(gaussian._scale(raw), torch.exp(raw / 2))


def test_the_library_enters_the_shape(paired: Mosaic) -> None:
    module = make(paired).eval()
    z, codes = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    moments = []
    for library in (1000.0, 2000.0):
        found = module.decode(z, "rna", codes, torch.full((5, 2), library))
        p = torch.sigmoid(found.logits)
        moments.append((found.mean, found.mean / (1 - p)))
    torch.testing.assert_close(moments[1][0], 2 * moments[0][0])
    torch.testing.assert_close(moments[1][1], 2 * moments[0][1])


# ---- the objective ------------------------------------------------------------------------------------------------


def elbo_by_hand(module: Scmm, batch: Minibatch, source: str) -> torch.Tensor:
    """Reconstructions of everything from one expert's location, minus its KL, summed over cells, by dense torch."""
    expert = module._experts(batch)[source]
    z = expert.location
    total = -torch.distributions.kl_divergence(
        torch.distributions.Laplace(z, expert.scale), torch.distributions.Laplace(torch.zeros(()), module._prior())
    ).sum()
    for m, x in batch.x.items():
        log_r, logit = module.decoders[m](z, batch.batch)
        counts = torch.exp(log_r) * x.totals[:, None] / 1e4
        total = total + torch.distributions.NegativeBinomial(counts, logits=logit).log_prob(x.dense).sum()
    return total


def test_one_modality_is_the_plain_bound_and_two_are_the_mean_of_both(
    paired: Mosaic, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(paired).eval()
    without_noise(module, monkeypatch)
    batch = whole(paired)
    expected = -(elbo_by_hand(module, batch, "rna") + elbo_by_hand(module, batch, "adt")) / 2
    assert (loss_of(module, batch) * batch.n).item() == pytest.approx(expected.item(), rel=1e-5)

    alone = small_mosaic({"rna": batch.x["rna"].dense.numpy()})
    one = make(alone).eval()
    without_noise(one, monkeypatch)
    expected = -elbo_by_hand(one, whole(alone), "rna")
    assert (loss_of(one, whole(alone)) * 30).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_is_a_sum_over_cells(three: Mosaic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported per cell; times cells, a doubled minibatch costs twice, and a minibatch the sum of its cells."""
    module = make(three).eval()
    without_noise(module, monkeypatch)
    cells = np.arange(three.n_cells)
    once = loss_of(module, whole(three)) * len(cells)
    twice = loss_of(module, whole(three, np.concatenate([cells, cells]))) * 2 * len(cells)
    assert twice.item() == pytest.approx(2 * once.item(), rel=1e-5)
    each = sum(loss_of(module, whole(three, np.array([cell]))).item() for cell in cells)
    assert each == pytest.approx(once.item(), rel=1e-5)


def test_every_cell_weighs_its_experts_alike(three: Mosaic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell's share of the objective is the mean over its experts: |A_n|^2 reconstructions, each 1/|A_n|."""
    module = make(three).eval()
    without_noise(module, monkeypatch)
    for cell in range(7):
        batch = whole(three, np.array([cell]))
        experts = module._experts(batch)
        expected = 0.0
        for source in experts.values():
            for m, target in experts.items():
                found = module.decoders[m](source.location, batch.batch)
                expected += module._likelihood(m, found, target.library).nll(target.x).item()
            expected += laplace_kl(source.location, source.scale, module._prior()).sum().item()
        assert loss_of(module, batch).item() == pytest.approx(expected / len(experts), rel=1e-5)


def test_sampled_cross_terms_are_right_on_average(three: Mosaic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all experts that can be drawn, the sampled objective has the mean of the whole one."""
    module = make(three, cross="sampled").train()
    without_noise(module, monkeypatch)
    # The statistics of BatchNorm depend on who was drawn; those of evaluation do not.
    monkeypatch.setattr(SplitBatchNorm, "forward", lambda self, x, sizes=None: self._norm(x, False))
    found = []
    for number in range(3):
        monkeypatch.setattr(torch, "randint", lambda high, size, number=number: torch.tensor(number))
        found.append(loss_of(module, whole(three)).item())
    assert len(set(found)) == 3
    assert np.mean(found) == pytest.approx(loss_of(module.eval(), whole(three)).item(), rel=1e-5)


def test_warm_up(paired: Mosaic) -> None:
    module = make(paired, kl_warmup=25)
    found = {}
    for epoch in (1, 25, 26, 40):
        module.start_epoch(epoch - 1, 0, 100)  # the loop counts from 0, the paper from 1
        found[epoch] = module.beta
    assert found == {1: 0.0, 25: pytest.approx(24 / 25), 26: 1.0, 40: 1.0}
    module.start_epoch(0, 0, 100)
    assert module.train().loss(whole(paired))["kl_rna"].item() == 0.0
    assert module.eval().loss(whole(paired))["kl_rna"].item() > 0.0  # epochs can be compared
    other = make(paired, kl_warmup=25)
    module.start_epoch(5, 0, 100)
    other.load_extra_state(module.extra_state())
    assert other.beta == module.beta == 0.2


def test_what_is_not_there_changes_nothing(paired: Mosaic) -> None:
    """A cell without protein: no gradient to the protein networks; a full mosaic is the published objective."""
    rna_only = replace(paired, tiles={k: t for k, t in paired.tiles.items() if k[1] == "rna"})
    module = make(paired).train()
    loss_of(module, whole(rna_only)).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (".adt." in name), name
    terms = module.loss(whole(rna_only))
    assert set(terms) == {"recon_rna_to_rna", "kl_rna"}


def test_stored_zeros_of_a_cell_make_the_modality_missing() -> None:
    rng = np.random.default_rng(3)
    counts = {"rna": rng.poisson(1.0, (12, 20)), "adt": rng.poisson(4.0, (12, 5))}
    counts["adt"][:4] = 0
    empty = small_mosaic(counts)
    lacking = small_mosaic(counts, adt=np.arange(12) >= 4)
    module = make(empty).eval()
    assert loss_of(module, whole(empty)).item() == loss_of(module, whole(lacking)).item()
    with torch.no_grad():
        found, expected = module.encode(whole(empty)), module.encode(whole(lacking))
        assert torch.equal(found.mean, expected.mean)
        assert torch.isfinite(found.mean).all()
        assert torch.isnan(found.context[:4, 1]).all()
        nothing = module.encode(whole(empty), ["adt"])
    assert (nothing.mean[:4] == 0).all()
    torch.testing.assert_close(nothing.log_variance[:4].exp(), torch.full((4, 4), 2.0))


def test_a_minibatch_with_a_single_cell_of_a_kind_trains(three: Mosaic) -> None:
    module = make(three).train()
    loss = loss_of(module, whole(three, np.array([0, 1, 3, 6])))
    loss.backward()
    assert torch.isfinite(loss)


def test_batchnorm_sees_each_expert_apart() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(6, 3), 5 + 2 * torch.randn(4, 3)])
    ours, theirs = SplitBatchNorm(3), torch.nn.BatchNorm1d(3)
    found = ours(x, (6, 4))
    torch.testing.assert_close(found, torch.cat([theirs(x[:6]), theirs(x[6:])]))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_rows_are_taken_in_the_order_asked_for(three: Mosaic) -> None:
    x = whole(three).x["rna"]
    rows = torch.tensor([5, 0, 5, 2])
    found = take_rows(x, rows)
    torch.testing.assert_close(found.dense, x.dense[rows])
    assert torch.equal(found.rows, x.rows[rows])


# ---- invariances --------------------------------------------------------------------------------------------------


def test_permuted_cells_give_permuted_latents(three: Mosaic) -> None:
    module = make(three).eval()
    order = np.random.default_rng(0).permutation(three.n_cells)
    with torch.no_grad():
        one, other = module.encode(whole(three)), module.encode(whole(three, order))
    torch.testing.assert_close(other.mean, one.mean[order])
    torch.testing.assert_close(other.log_variance, one.log_variance[order])
    torch.testing.assert_close(other.context, one.context[order], equal_nan=True)


def test_dimensions_can_be_permuted(paired: Mosaic, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(paired).eval()
    without_noise(module, monkeypatch)
    before = loss_of(module, whole(paired)).item()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for m in ("rna", "adt"):
            for head in (module.encoders[m].location, module.encoders[m].raw):
                head.weight.copy_(head.weight[order])
                head.bias.copy_(head.bias[order])
            module.decoders[m].first.weight.copy_(module.decoders[m].first.weight[:, order])
    assert loss_of(module, whole(paired)).item() == pytest.approx(before, rel=1e-6)


def test_the_embedding_is_the_mean_of_the_experts(paired: Mosaic) -> None:
    module = make(paired).eval()
    with torch.no_grad():
        batch = whole(paired)
        rna, adt, both = (module.encode(batch, chosen) for chosen in (["rna"], ["adt"], None))
    torch.testing.assert_close(both.mean, (rna.mean + adt.mean) / 2)
    torch.testing.assert_close(both.log_variance.exp(), (rna.log_variance.exp() + adt.log_variance.exp()) / 2)
    torch.testing.assert_close(rna.context[:, 0], batch.x["rna"].totals)
    assert torch.isnan(rna.context[:, 1]).all()


@pytest.mark.parametrize("library", ["observed", "median", "ratio", "number"])
def test_translation_never_sees_the_target(paired: Mosaic, library: str) -> None:
    module = make(paired, library=library).eval()
    module.prepare([whole(paired)])
    batch = whole(paired)
    x = batch.x["rna"]
    changed = replace(batch, x=batch.x | {"rna": x.with_values(x.values * 7)}, cache={})
    with torch.no_grad():
        found = []
        for one in (batch, changed):
            posterior = module.encode(one, ["adt"])
            found.append(module.decode(posterior.mean, "rna", one.batch, posterior.context).mean)
    assert torch.equal(*found)


def test_library_choices(paired: Mosaic) -> None:
    batch = whole(paired)
    own = {m: batch.x[m].totals for m in ("rna", "adt")}
    adt_context = torch.stack([torch.full((30,), torch.nan), own["adt"]], dim=1)
    full = torch.stack([own["rna"], own["adt"]], dim=1)

    def library(kind: str, context: torch.Tensor | None) -> torch.Tensor:
        module = make(paired, library=kind, library_size=777.0)
        module.prepare([batch])
        return module._library("rna", 30, context)

    median = own["rna"].median().expand(30)
    torch.testing.assert_close(library("observed", full), own["rna"])
    torch.testing.assert_close(library("observed", adt_context), median)
    torch.testing.assert_close(library("median", full), median)
    torch.testing.assert_close(library("number", full), torch.full((30,), 777.0))
    torch.testing.assert_close(library("ratio", adt_context), own["adt"] * own["rna"].sum() / own["adt"].sum())
    for kind in ("observed", "ratio"):
        torch.testing.assert_close(library(kind, None), median)


def test_unmeasured_features_teach_nothing_and_do_not_inflate_the_rest() -> None:
    """Two batches of one tissue, one measured on half of the features: libraries are put on one scale."""
    rng = np.random.default_rng(5)
    rates = np.concatenate([np.full(10, 3.0), np.full(10, 1.0)])
    counts = rng.poisson(rates, (400, 20)).astype(np.float32)
    counts[200:, 10:] = 0
    mosaic = small_mosaic({"rna": counts, "adt": rng.poisson(4.0, (400, 5))}, ["a"] * 200 + ["b"] * 200)
    tile = mosaic.tiles["b", "rna"]
    masked = replace(mosaic, tiles={**mosaic.tiles, ("b", "rna"): replace(tile, mask=np.arange(20) < 10)})
    module = make(masked)
    module.prepare(MinibatchMaker(masked).in_order(128))
    assert module.measured_share[0].tolist() == pytest.approx([1.0, 0.75], abs=0.02)
    library = module._experts(whole(masked))["rna"].library
    assert library[200:].mean().item() == pytest.approx(library[:200].mean().item(), rel=0.05)

    only = np.arange(200, 400)
    loss_of(module.train(), whole(masked, only)).backward()
    for head in (module.decoders["rna"].log_r, module.decoders["rna"].logit):
        assert (head.weight.grad[10:] == 0).all()
        assert (head.bias.grad[:10] != 0).all()


def test_batches_enter_where_they_are_told_to(three: Mosaic) -> None:
    for where, encoder, decoder in (("none", False, False), ("decoder", False, True), ("both", True, True)):
        batch = whole(three)
        other = replace(batch, batch=1 - batch.batch, cache={})
        module = make(three, batch_in=where).eval()
        with torch.no_grad():
            moved = not torch.equal(module.encode(batch).mean, module.encode(other).mean)
            z = torch.zeros(batch.n, 4)
            decoded = [module.decode(z, "rna", one.batch).mean for one in (batch, other)]
        assert (moved, not torch.equal(*decoded)) == (encoder, decoder), where


def test_a_batch_that_never_had_a_modality_decodes_it_as_the_others_do(tiny_mosaic: Mosaic) -> None:
    module = make(tiny_mosaic).eval()
    code = module.decoders["adt"].code
    assert code is not None
    seen = [b in module.layout.measured_in["adt"] for b in module.layout.batches]
    assert not all(seen)
    with torch.no_grad():
        rows = code(torch.arange(len(seen)))
    torch.testing.assert_close(rows[seen.index(False)], code.weight[torch.tensor(seen)].mean(0))
    torch.testing.assert_close(rows[seen.index(True)], code.weight[seen.index(True)])


def test_starting_at_the_means_of_the_data(paired: Mosaic) -> None:
    module = make(paired, data_bias=True).eval()
    batch = whole(paired)
    module.prepare([batch])
    for m in ("rna", "adt"):
        x = batch.x[m]
        bias = module.decoders[m].log_r.bias
        expected = x.dense.sum(0) / x.dense.sum() * 1e4
        torch.testing.assert_close(bias.exp(), expected, rtol=1e-3, atol=1e-2)
    plain = make(paired)
    before = plain.decoders["rna"].log_r.bias.clone()
    plain.prepare([batch])
    assert torch.equal(plain.decoders["rna"].log_r.bias, before)


def test_alignment_pulls_the_experts_together_and_is_off_by_default(three: Mosaic) -> None:
    batch = whole(three)
    assert "alignment" not in make(three).loss(batch)
    module = make(three, alignment=2.0).eval()
    experts = module._experts(batch)
    place = {m: {int(c): i for i, c in enumerate(e.cells)} for m, e in experts.items()}
    expected = 0.0
    for cell in range(batch.n):
        at = [experts[m].location[place[m][cell]] for m in experts if cell in place[m]]
        if len(at) > 1:
            at = torch.stack(at)
            expected += (at - at.mean(0)).square().sum().item() / len(at)
    assert module.loss(batch)["alignment"].item() == pytest.approx(2.0 * expected / batch.n, rel=1e-5)


def test_hidden_input_touches_the_training_of_large_modalities_alone(three: Mosaic) -> None:
    """RNA and ATAC values are hidden at random while training; proteins, and everything in evaluation, are seen."""
    module = make(three, input_dropout=0.9)
    seen: dict[str, list[torch.Tensor]] = {}
    for m in three.modalities:
        encoder = module.encoders[m].first
        encoder.register_forward_pre_hook(lambda _, x, m=m: seen.setdefault(m, []).append(x[0].values))
    for mode in (True, False):
        module.train(mode)
        module._experts(whole(three))
    hidden = {m: (first == 0).float().mean().item() for m, (first, _) in seen.items()}
    assert hidden["adt"] == 0.0
    assert hidden["rna"] > 0.7
    assert hidden["atac"] > 0.7
    assert all((last > 0).all() for _, last in seen.values())


def test_prior_and_traversal_scales(paired: Mosaic) -> None:
    module = make(paired)
    torch.testing.assert_close(module.prior_sd("corrected"), torch.full((4,), 2**0.5))
    torch.testing.assert_close(module.prior_sd("faithful"), torch.ones(4))
    with torch.no_grad():
        module.prior_raw.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    torch.testing.assert_close(module.prior_sd("faithful"), module.prior_raw.detach().exp().sqrt())
    drawn = torch.distributions.Laplace(torch.zeros(4), module._prior().detach()).sample((200_000,))
    torch.testing.assert_close(module.prior_sd("corrected"), drawn.std(0), rtol=0.02, atol=0.02)
    assert not make(paired, learn_prior=False).prior_raw.requires_grad


def test_draws_follow_the_posterior(paired: Mosaic) -> None:
    for kind, factor in (("laplace", 2.0), ("gaussian", 1.0)):
        module = make(paired, posterior=kind).eval()
        expert = module._experts(whole(paired))["rna"]
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = torch.stack([module._draw(expert) for _ in range(4000)])
        sd = factor**0.5 * expert.scale
        error = 5 * sd.detach() / 4000**0.5
        assert ((drawn.mean(0) - expert.location).abs() < error + 1e-3).all()
        torch.testing.assert_close(drawn.std(0), sd.detach(), rtol=0.15, atol=0.01)


# ---- training, the table, the verdict -------------------------------------------------------------------------------


def planted(n: int, seed: int = 0) -> tuple[Mosaic, np.ndarray]:
    """Three factors of different strength shared by both modalities, each with genes and proteins of its own."""
    rng = np.random.default_rng(seed)
    factors = rng.laplace(size=(n, 3))
    rna, adt = np.zeros((3, 60)), np.zeros((3, 9))
    for k, strength in enumerate((1.0, 0.65, 0.4)):
        rna[k, 20 * k : 20 * (k + 1)] = strength * np.tile([1.0, -1.0], 10)
        adt[k, 3 * k : 3 * (k + 1)] = strength * np.array([1.0, -1.0, 1.0])
    counts = {
        "rna": rng.poisson(np.exp(0.5 + np.clip(factors, -3, 3) @ rna)),
        "adt": rng.poisson(np.exp(3.0 + np.clip(factors, -3, 3) @ adt)),
    }
    return small_mosaic(counts), factors


def trained(mosaic: Mosaic, folder: Path, **settings: object) -> Scmm:
    config = ScmmConfig(**settings)
    seed_all(0)
    module = create("scmm", config, Layout.of(mosaic))
    fit(module, mosaic, config, seed=0, device="cpu", checkpoints=folder, emit=lambda kind, **fields: None)
    assert isinstance(module, Scmm)
    return module.eval()


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.corrcoef(one.T, other.T)[: one.shape[1], one.shape[1] :]


def test_planted_factors_come_back(tmp_path: Path) -> None:
    """Each shared factor appears in one dimension of its own, and translation beats the mean."""
    mosaic, factors = planted(1200)
    module = trained(
        mosaic, tmp_path, dim=6, lr=4e-3, batch_size=128, max_epochs=30, kl_warmup=10, patience=0, data_bias=True,
        hidden_rna=40, hidden_other=30, validation_fraction=0.0, log_input=True,
    )  # fmt: skip
    batch = whole(mosaic)
    with torch.no_grad():
        joint = module.encode(batch).mean.numpy()
        posterior = module.encode(batch, ["rna"])
        guessed = module.decode(posterior.mean, "adt", batch.batch, posterior.context).mean.numpy()
    found = np.abs(correlation(joint, factors))
    dimensions, planted_ones = linear_sum_assignment(-found)
    assert len(set(dimensions)) == 3
    assert found[dimensions, planted_ones].min() > 0.8, found
    truth = batch.x["adt"].dense.numpy()
    each = np.diag(correlation(np.log1p(guessed), np.log1p(truth)))
    assert each.min() > 0.5


def test_a_saved_model_answers_the_same(paired: Mosaic, tmp_path: Path) -> None:
    from headless.models.store import load_model, save_model

    module = make(paired, data_bias=True, kl_warmup=9)
    module.prepare([whole(paired)])
    save_model(tmp_path, module.eval(), "scmm")
    again = load_model(tmp_path)
    with torch.no_grad():
        one, other = module.encode(whole(paired)), again.encode(whole(paired))
        assert torch.equal(one.mean, other.mean)
        codes = torch.zeros(30, dtype=torch.int64)
        assert torch.equal(module.decode(one.mean, "adt", codes).mean, again.decode(other.mean, "adt", codes).mean)


def test_every_task_is_answered(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    from headless.results import Results
    from headless.tasks import OUTPUTS, answer

    module = make(tiny_mosaic)
    module.prepare(MinibatchMaker(tiny_mosaic).in_order(64))
    answer(module, tiny_mosaic, tuple(OUTPUTS), tmp_path / "results", lambda kind, **fields: None)
    results = Results(tmp_path / "results")
    assert {entry["state"] for entry in results.index["outputs"].values()} == {"done"}
    assert np.isfinite(results.latents("joint.z")).all()
    for name in results.layers:
        values = results.rows(*name.split("/"), slice(None))
        assert np.isfinite(values).any()
        assert (values[np.isfinite(values)] >= 0).all(), name
    assert set(results.programs("rna")["dimension"]) == {1, 2, 3, 4}


def pattern(n: int = 100, **batches: dict[str, int]) -> Pattern:
    tiles = tuple(
        TilePattern(batch=b, modality=m, n_cells=k, n_features=9) for b, ms in batches.items() for m, k in ms.items()
    )
    used = dict.fromkeys(t.modality for t in tiles)
    return Pattern(
        batches=tuple(batches), n_cells=dict.fromkeys(batches, n), n_features=dict.fromkeys(used, 9), tiles=tiles
    )


@pytest.mark.parametrize(
    ("given", "level", "word"),
    [
        (pattern(a={"rna": 100, "adt": 100}), "fits", ""),
        (pattern(a={"rna": 100, "adt": 100}, b={"rna": 100}), "limits", "paired cells"),
        (pattern(a={"rna": 100, "adt": 100}, b={"rna": 100, "atac": 100}), "limits", "paired cells"),
        (pattern(a={"rna": 100}, b={"adt": 100}), "cannot", "adt"),
        (pattern(a={"rna": 50, "adt": 50}), "cannot", "No cell has both"),
        (pattern(a={"rna": 100, "adt": 100}, b={"atac": 100}), "cannot", "atac"),
        (pattern(a={"rna": 100}), "limits", "single modality"),
        (pattern(a={"rna": 100, "methylation": 100}), "cannot", "methylation"),
        (pattern(), "cannot", "tile"),
    ],
)
def test_supports(given: Pattern, level: str, word: str) -> None:
    verdict = ScmmConfig.supports(given)
    assert verdict.level == level
    assert word in " ".join(verdict.reasons)


def test_settings_of_the_paper() -> None:
    paper = ScmmConfig.make("paper")
    assert (paper.batch_size, paper.max_epochs, paper.kl_warmup, paper.lr) == (32, 50, 25, 1e-4)
    assert (paper.dim, paper.layers, paper.hidden_rna, paper.hidden_other) == (10, 2, 100, 20)
    assert (paper.posterior, paper.learn_prior, paper.data_bias, paper.alignment) == ("laplace", True, False, 0.0)
    assert ScmmConfig.make("fast").data_bias
    spec = Scmm(paper, layout(rna=5, adt=3)).optimizers()["model"]
    assert (spec.amsgrad, spec.weight_decay, spec.betas) == (True, 0.0, (0.9, 0.999))
    assert get("scmm").config is ScmmConfig


