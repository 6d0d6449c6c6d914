"""The checks of fidelity to scVAEIT: counts, known answers, masks that hide, flow of gradients, recovery."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from headless.data.covariates import Covariate
from headless.data.minibatch import Minibatch, MinibatchMaker, TileRows
from headless.data.mosaic import Layout, Mosaic, Tile
from headless.data.pattern import Pattern, TilePattern
from headless.data.sources import MemoryRows
from headless.errors import MosaicError
from headless.models import create
from headless.models.alignment import INVERSE_GAMMAS, mmd
from headless.models.count_likelihoods import NegativeBinomial
from headless.models.likelihoods import Bernoulli
from headless.models.scvaeit.config import ScVaeitConfig
from headless.models.scvaeit.masking import Hidden, bank_of, draw, take
from headless.models.scvaeit.module import TOP, ScVaeit
from headless.models.scvaeit.networks import SplitNorm
from headless.models.scvaeit.objective import kl_between
from headless.models.scvaeit.prepare import commonest_visible, learn
from headless.models.scvaeit.scoring import Counts, Mask, Peaks
from headless.models.store import load_model, save_model
from headless.train.loop import fit, seed_all

SMALL: dict[str, Any] = {
    "n_latent": 6, "hidden": (24,), "rna_width": 16, "adt_width": 12, "chunk_width": 5, "rna_mask": 6, "adt_mask": 4,
}  # fmt: skip
TWO = (Covariate("stim", ("ctrl", "stim")), Covariate("dataset", ("cite", "dogma")))


def layout(covariates: tuple[Covariate, ...] = (), chunks: int = 1, **sizes: int) -> Layout:
    """One batch; ATAC cut into ``chunks`` chromosomes of about the same size."""
    cut = {m: (n,) for m, n in sizes.items()}
    if "atac" in sizes:
        ends = np.linspace(0, sizes["atac"], chunks + 1).astype(int)
        cut["atac"] = tuple(np.diff(ends).tolist())
    names = {m: tuple(f"{m}{i}" for i in range(n)) for m, n in sizes.items()}
    return Layout(("b",), names, dict.fromkeys(sizes, ("b",)), cut, covariates)


def small(mosaic: Mosaic, **settings: Any) -> ScVaeit:
    torch.manual_seed(0)
    made = create("scvaeit", ScVaeitConfig(**SMALL | settings), Layout.of(mosaic))
    assert isinstance(made, ScVaeit)
    made.prepare(MinibatchMaker(mosaic).in_order(64))
    return made


@pytest.fixture
def module(tiny_mosaic: Mosaic) -> ScVaeit:
    return small(tiny_mosaic)


def all_cells(mosaic: Mosaic) -> Minibatch:
    return MinibatchMaker(mosaic).make(np.arange(mosaic.n_cells))


def one(mosaic: Mosaic, **counts: np.ndarray) -> Mosaic:
    """A mosaic of one batch from dense counts."""
    n = len(next(iter(counts.values())))
    cells = pd.DataFrame({"batch": ["b"] * n, "barcode": [str(i) for i in range(n)]}, index=[f"c{i}" for i in range(n)])
    features = {m: pd.DataFrame(index=[f"{m}{j}" for j in range(x.shape[1])]) for m, x in counts.items()}
    tiles = {
        ("b", m): Tile("b", m, MemoryRows(sp.csr_matrix(x.astype(np.float32))), np.arange(n)) for m, x in counts.items()
    }
    return Mosaic(cells, ("b",), features, tiles)


def sparse(values: Tensor, mask: Tensor | None = None) -> TileRows:
    """Rows from a dense matrix."""
    rows, columns = values.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=len(values)).cumsum(0)])
    return TileRows(None, indptr, columns.to(torch.int32), values[rows, columns], values.shape[1], mask)


def nothing(n: int, d: int, rows: Tensor | None = None) -> TileRows:
    """``n`` rows of zeros."""
    indptr = torch.zeros(n + 1, dtype=torch.int64)
    return TileRows(rows, indptr, torch.zeros(0, dtype=torch.int32), torch.zeros(0), d, None)


def changed(batch: Minibatch, m: str, where: Tensor, factor: float = 5.0) -> Minibatch:
    """Stored values of a modality multiplied where ``where`` (over its stored values) holds."""
    x = batch.x[m]
    values = torch.where(where, x.values * factor, x.values)
    return replace(batch, x=batch.x | {m: x.with_values(values)}, cache={})


# Section 3: exact numbers of parameters. Ours has a dispersion bias more for each gene and protein.
MOSAIC = {"rna": 3660, "adt": 227, "atac": 38_711}


@pytest.mark.parametrize(
    ("shape", "settings", "total"),
    [
        (layout((), 22, **MOSAIC), {}, 7_570_794),
        (layout(TWO, 22, **MOSAIC), {}, 7_590_310),
        (layout((Covariate("constant"),), rna=4686, adt=227), {}, 2_949_442),
        (layout((Covariate("constant"),), rna=4686, adt=227), {"norm_shift": False}, 2_948_898),
        (layout(adt=227), {"adt_mask": 64, "adt_width": 64, "hidden": (32,), "n_latent": 8}, 55_171),
    ],
    ids=["mosaic", "mosaic with covariates", "PBMC", "PBMC, paper's code", "tutorial"],
)
def test_parameter_counts(shape: Layout, settings: dict[str, Any], total: int) -> None:
    module = ScVaeit(ScVaeitConfig(**settings), shape)
    bias = sum(p.numel() for p in module.dispersion_bias.parameters())
    assert bias == sum(shape.n_features(m) for m in shape.modalities if m != "atac")
    assert sum(p.numel() for p in module.parameters()) - bias == total
    without = ScVaeit(ScVaeitConfig(**settings, skip=False), shape)
    assert sum(p.numel() for p in without.parameters()) - bias == total


def test_parts_of_the_mosaic_network() -> None:
    module = ScVaeit(ScVaeitConfig(), layout(TWO, 22, **MOSAIC))

    def count(*names: str) -> int:
        return sum(p.numel() for name in names for p in getattr(module, name).parameters())

    heads = count("mean_head", "mean_norm", "variance_head")
    parts = [count("masks"), count("encoders"), count("trunk"), heads, count("decoder_trunk"), count("outputs")]
    assert parts == [3_919_108, 1_599_280, 189_184, 16_512, 33_536, 1_817_142]
    assert count("dispersion") == 15_548


def test_kl_known_answers() -> None:
    a, b = (torch.tensor([[0.2]]), torch.tensor([[-0.5]])), (torch.tensor([[-0.4]]), torch.tensor([[0.3]]))
    assert kl_between(*b, *a).item() == pytest.approx(0.50954, abs=1e-5)
    assert kl_between(*a, *b).item() == pytest.approx(0.25801, abs=1e-5)
    assert kl_between(*a, *a).item() == 0.0
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(*(normal(m, (v / 2).exp()) for m, v in (a, b))).item()
    assert kl_between(*a, *b).item() == pytest.approx(theirs, rel=1e-5)


def test_zero_of_the_negative_binomial() -> None:
    phi, top, depth = torch.tensor([[0.5]]), TOP, 1.0
    output = torch.logit(torch.tensor([[log(1 + 3.0)]]) / top)
    zero = nothing(1, 1)
    found = Counts(output, phi, torch.tensor([1e4 * depth]), top)
    assert found.mean.item() == pytest.approx(3.0, rel=1e-5)
    assert -found.nll(zero).item() == pytest.approx(-1.832581, abs=1e-5)
    theta = torch.tensor(2.0)
    theirs = torch.distributions.NegativeBinomial(theta, logits=torch.log(torch.tensor(3.0) / theta))
    assert theirs.log_prob(torch.tensor(0.0)).item() == pytest.approx(-1.832581, abs=1e-5)


@pytest.mark.parametrize("lognorm", [False, True])
@pytest.mark.parametrize("by_cell", [False, True])
def test_counts_agree_with_float64(lognorm: bool, by_cell: bool) -> None:
    """Values and gradients of each row, scored entries only, against torch in float64."""
    torch.manual_seed(1)
    n, d = 7, 11
    counts = torch.poisson(torch.full((n, d), 1.5))
    mask = (torch.rand(n, d) < 0.7).float()
    counts = counts * mask
    library = counts.sum(1) * 3 + 5
    output, raw = torch.randn(n, d).requires_grad_(), torch.randn(3 if by_cell else 1, d).requires_grad_()
    group = torch.tensor([0, 2, 1, 1, 0, 2, 2]) if by_cell else None
    weight = torch.rand(n)
    x = sparse(counts)
    phi = torch.nn.functional.softplus(raw)
    ours = Counts(output, phi, library, TOP, lognorm, group)
    each = ours.rows(x, Mask(3, mask[:3], mask[3:])) + ours.constants(x)
    (each * weight).sum().backward()
    mine = output.grad.clone(), raw.grad.clone()

    o, r = output.detach().double().requires_grad_(), raw.detach().double().requires_grad_()
    level = TOP * torch.sigmoid(o)
    depth = library.double()[:, None] / 1e4
    mean = level if lognorm else torch.expm1(level) * depth
    value = torch.log1p(counts.double() / depth) if lognorm else counts.double()
    f = torch.nn.functional.softplus(r if group is None else r[group])
    nll = -(
        torch.lgamma(value + 1 / f) - torch.lgamma(1 / f) - torch.lgamma(value + 1)
        - torch.log1p(f * mean) / f + value * torch.log(f * mean / (1 + f * mean))
    )  # fmt: skip
    theirs = (nll * mask).sum(1)
    (theirs * weight).sum().backward()
    torch.testing.assert_close(each.double(), theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mine[0].double(), o.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine[1].double(), r.grad, rtol=1e-4, atol=1e-4)
    if not lognorm:
        shared = NegativeBinomial.of_mean(mean.float().log(), -f.float().log())
        masked = TileRows(None, x.indptr, x.columns, x.values, d, mask)
        assert ours.nll(masked).item() == pytest.approx(shared.nll(masked).item(), rel=1e-4)


def test_peaks_agree_with_the_bernoulli_and_stay_off_the_ends() -> None:
    torch.manual_seed(2)
    logit, mask = torch.randn(5, 9).requires_grad_(), (torch.rand(5, 9) < 0.6).float()
    x = sparse(torch.poisson(torch.full((5, 9), 0.6)) * mask, mask)
    Peaks(logit).loss(x).backward()
    mine = logit.grad.clone()
    logit.grad = None
    theirs = Bernoulli(logit).loss(x)
    theirs.backward()
    assert Peaks(logit).loss(x).item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(mine, logit.grad)
    assert Peaks(torch.tensor([[50.0]])).mean.item() == pytest.approx(1 - 1e-5, abs=1e-6)


def test_counts_head_reaches_from_zero_to_the_library() -> None:
    library = torch.tensor([777.0])
    assert Counts(torch.tensor([[-100.0]]), torch.ones(1, 1), library, TOP).mean.item() == 0.0
    assert Counts(torch.tensor([[100.0]]), torch.ones(1, 1), library, TOP).mean.item() == pytest.approx(777.0, rel=1e-5)
    made = [ScVaeit(ScVaeitConfig(**SMALL, nb_target=t), layout(rna=9, adt=4)) for t in ("counts", "lognorm")]
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in made]
    assert shapes[0] == shapes[1]


def test_mmd_known_answer() -> None:
    z = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert mmd(z, torch.tensor([0, 0, 1, 1]), INVERSE_GAMMAS).item() == pytest.approx(0.470103, abs=1e-5)


# Section 4.1: rates of masks.
def test_rates_of_masks() -> None:
    n = 100_000
    sizes = {"rna": 4, "adt": 3, "atac": 2}
    x = {m: nothing(n, d) for m, d in sizes.items()}
    batch = Minibatch(torch.arange(n), torch.zeros(n, dtype=torch.int64), x)
    torch.manual_seed(0)
    hidden = draw(batch, tuple(sizes), 0.2, "one hidden")
    whole = torch.stack([hidden[m].whole for m in sizes], 1)
    assert bool((whole.sum(1) == 1).all())
    for k, m in enumerate(sizes):
        rate = whole[:, k].float().mean().item()
        assert rate == pytest.approx(1 / 3, abs=4 * (2 / 9 / n) ** 0.5)
        assert not bool(whole[hidden[m].partial, k].any())
        bits = hidden[m].bits
        assert bits.float().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / bits.numel()) ** 0.5)
        left = n - int(whole[:, k].sum())
        assert len(hidden[m].partial) / left == pytest.approx(0.5, abs=4 * (0.25 / left) ** 0.5)
    # Features of a cell are masked in all its modalities or in none.
    both = torch.zeros(n, dtype=torch.int64)
    for m in sizes:
        both[hidden[m].partial] += 1
    assert set(both.tolist()) == {0, 2}
    torch.manual_seed(0)
    again = draw(batch, tuple(sizes), 0.2, "one hidden")
    assert all(torch.equal(again[m].bits, hidden[m].bits) for m in sizes)
    for p, expected in ((0.0, 0), (1.0, 4)):
        bits = draw(batch, tuple(sizes), p, "all")["rna"].bits
        assert set(bits.sum(1).tolist()) <= {expected}


def test_any_visible_set_is_as_likely_as_another() -> None:
    n = 60_000
    starts = {"rna": 0, "adt": 0, "atac": n // 2}
    x = {m: nothing(n - start, 2, torch.arange(start, n)) for m, start in starts.items()}
    torch.manual_seed(0)
    hidden = draw(Minibatch(torch.arange(n), torch.zeros(n, dtype=torch.int64), x), tuple(x), 0.0, "any")
    visible = torch.zeros(n, 3, dtype=torch.bool)
    for k, m in enumerate(x):
        visible[x[m].rows, k] = ~hidden[m].whole
    code = (visible * torch.tensor([1, 2, 4])).sum(1)
    for cells, sets in ((slice(0, n // 2), 3), (slice(n // 2, n), 7)):
        counts = torch.bincount(code[cells], minlength=8).float()[1 : sets + 1]
        assert counts.sum() == n // 2
        assert bool(((counts / (n // 2) - 1 / sets).abs() < 4 * (1 / sets / (n // 2)) ** 0.5).all())


def test_a_cell_keeps_its_only_modality() -> None:
    x = {"rna": nothing(4, 3), "adt": nothing(2, 3, torch.tensor([1, 2]))}
    for seed in range(20):
        torch.manual_seed(seed)
        hidden = draw(Minibatch(torch.arange(4), torch.zeros(4, dtype=torch.int64), x), ("rna", "adt"), 0, "one hidden")
        assert hidden["rna"].whole[[0, 3]].tolist() == [False, False]
        assert bool((hidden["rna"].whole[1:3] ^ hidden["adt"].whole).all())


def test_patterns_of_one_modality_are_drawn_from_real_ones() -> None:
    """Section 4.1, step 4: what another batch did not measure is hidden, and is never true missingness twice."""
    x = {"adt": nothing(400, 4)}
    x["adt"].mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]]).repeat(400, 1)
    table = torch.tensor([[True, True, False, True], [False, True, True, True]])
    torch.manual_seed(0)
    hidden = draw(Minibatch(torch.arange(400), torch.zeros(400, dtype=torch.int64), x), ("adt",), 0.0, "one hidden",
                  {"adt": table})["adt"]  # fmt: skip
    assert set(map(tuple, hidden.bits.int().tolist())) == {(1, 0, 0, 0)}
    assert 140 < len(hidden.partial) < 260


def test_bank_splits_rows_into_visible_and_hidden(tiny_mosaic: Mosaic) -> None:
    batch = all_cells(tiny_mosaic)
    torch.manual_seed(3)
    hidden = draw(batch, tuple(batch.x), 0.3, "one hidden")
    for m, x in batch.x.items():
        d = x.n_columns
        bank = bank_of(x, batch.n, torch.full((d,), 1 / d), hidden[m])
        measured = torch.ones(x.n_rows, d) if x.mask is None else x.mask.expand(x.n_rows, d)
        for view in ("visible", "hidden"):
            cells = (bank.views[view] >= 0).nonzero().flatten()
            rows = bank.views[view][cells]
            order = bank.order(rows)
            cells, rows = cells[order], rows[order]
            found = bank.masks(rows)
            mask = torch.ones(len(rows), d)
            if found.head is not None:
                mask[: found.start] = found.head
            if found.tail is not None:
                mask[found.start :] = found.tail
            values = take(bank.x, rows).dense
            assert bool((values[mask == 0] == 0).all())
            own = bank.views["full"][cells]
            torch.testing.assert_close(values, x.dense[own] * mask)
            gone = torch.zeros(x.n_rows, d)
            gone[hidden[m].whole] = 1
            gone[hidden[m].partial] = hidden[m].bits.float()
            wanted = measured * (gone if view == "hidden" else 1 - gone)
            assert torch.equal(mask, wanted[own])


def split_entries(batch: Minibatch, hidden: dict[str, Hidden], m: str) -> Tensor:
    """Which stored values of a modality are hidden."""
    x = batch.x[m]
    gone = torch.zeros(x.n_rows, x.n_columns, dtype=torch.bool)
    gone[hidden[m].whole] = True
    gone[hidden[m].partial] = hidden[m].bits
    return gone.reshape(-1)[x.flat]


def views_of(module: ScVaeit, batch: Minibatch, hidden: dict[str, Hidden]) -> Any:
    banks = {m: bank_of(x, batch.n, module.get_buffer(f"share_{m}"), hidden[m]) for m, x in batch.x.items()}
    return module._encode(batch, banks, ("full", "visible"))


def test_hidden_values_never_reach_the_visible_posterior_or_the_decoder(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    batch = all_cells(tiny_mosaic)
    torch.manual_seed(4)
    hidden = draw(batch, tuple(batch.x), 0.3, "one hidden")
    before = views_of(module.eval(), batch, hidden)
    for m in ("rna", "adt"):
        gone = split_entries(batch, hidden, m)
        assert 0 < int(gone.sum()) < len(gone)
        after = views_of(module, changed(batch, m, gone), hidden)
        of = before.of("visible")
        assert torch.equal(after.mean[of], before.mean[of])
        assert torch.equal(after.log_variance[of], before.log_variance[of])
        assert torch.equal(after.embedding[of], before.embedding[of])
        for name in before.activations:
            assert torch.equal(after.activations[name][of], before.activations[name][of])
        assert not torch.equal(after.mean[before.of("full")], before.mean[before.of("full")])
        seen = views_of(module, changed(batch, m, ~gone), hidden)
        assert not torch.equal(seen.mean[of], before.mean[of])


def test_missing_features_change_nothing_and_get_no_loss(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    """Output weights of a feature that no cell of the minibatch measured get no gradient; the mask tells it missing."""
    name, m = next((b, m) for (b, m), t in tiny_mosaic.tiles.items() if t.mask is not None and m == "rna")
    tile = tiny_mosaic.tiles[name, m]
    missing = np.flatnonzero(~tile.mask)
    batch = MinibatchMaker(tiny_mosaic).make(tile.cells)
    torch.manual_seed(5)
    sum(module.train().loss(batch).values()).backward()
    outputs: Any = module.outputs[m]
    assert bool((outputs.last.grad[:, missing] == 0).all())
    assert bool((outputs.last_bias.grad[missing] == 0).all())
    assert bool((module.encoders[m].x.grad[missing] == 0).all())
    assert bool((outputs.last_bias.grad[np.flatnonzero(tile.mask)] != 0).any())
    dense = batch.x[m].with_values(batch.x[m].values)
    dense.mask = None
    told = module.eval().encode(batch).mean
    assert not torch.equal(module.encode(replace(batch, x=batch.x | {m: dense}, cache={})).mean, told)


def test_mask_embedding_is_the_plain_product(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    batch = all_cells(tiny_mosaic)
    torch.manual_seed(6)
    hidden = draw(batch, tuple(batch.x), 0.3, "one hidden")
    views = views_of(module.eval(), batch, hidden)
    rows = []
    for m in module.layout.modalities:
        x = batch.x[m]
        missing = torch.ones(batch.n, x.n_columns)
        at = torch.arange(batch.n) if x.rows is None else x.rows
        own = torch.zeros(x.n_rows, x.n_columns) if x.mask is None else 1 - x.mask.expand(x.n_rows, x.n_columns)
        own[hidden[m].whole] = 1
        own[hidden[m].partial] = torch.maximum(own[hidden[m].partial], hidden[m].bits.float())
        missing[at] = own
        rows.append(missing @ module.masks.weights[m])
    wanted = torch.tanh(sum(rows) + module.masks.bias)
    torch.testing.assert_close(views.embedding[views.of("visible")], wanted, rtol=1e-4, atol=1e-5)


def parts_of(module: ScVaeit, batch: Minibatch, **weights: float) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return module.train().loss(batch)


def test_ends_of_beta(tiny_mosaic: Mosaic) -> None:
    batch = all_cells(tiny_mosaic)
    for beta, silent, loud in ((1.0, "visible", ("hidden", "kl")), (0.0, "hidden", ("visible",))):
        module = small(tiny_mosaic, beta=beta)
        terms = parts_of(module, batch)
        off = [v for k, v in terms.items() if k.startswith(silent) or (beta == 0 and k == "kl")]
        assert off
        sum(off).backward(retain_graph=True)
        assert all(p.grad is None or not bool(p.grad.any()) for p in module.parameters())
        on = [v for k, v in terms.items() if k.startswith(loud)]
        sum(on).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_objective_is_what_the_sheet_says(tiny_mosaic: Mosaic, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms of section 4.2, recomputed view by view, dense, with the networks in evaluation mode."""
    module = small(tiny_mosaic, modality_weights={"rna": 0.2, "adt": 0.7, "atac": 0.1}).eval()
    batch = all_cells(tiny_mosaic)
    torch.manual_seed(8)
    hidden = draw(batch, tuple(batch.x), 0.3, "one hidden")
    banks = {m: bank_of(x, batch.n, module.get_buffer(f"share_{m}"), hidden[m]) for m, x in batch.x.items()}
    monkeypatch.setattr("headless.models.scvaeit.module.reparametrise", lambda mean, log_variance: mean)
    found = module._objective(batch, banks)
    n, beta = batch.n, module.config.beta
    full, visible = (module._encode(batch, banks, (name,)) for name in ("full", "visible"))
    codes, wanted = batch.batch, {}
    for m, x in batch.x.items():
        at = torch.arange(n) if x.rows is None else x.rows
        mask = torch.ones(x.n_rows, x.n_columns) if x.mask is None else x.mask.expand(x.n_rows, x.n_columns)
        gone = torch.zeros_like(mask)
        gone[hidden[m].whole] = 1
        gone[hidden[m].partial] = hidden[m].bits.float()
        share = (mask @ module.get_buffer(f"share_{m}")).clamp(min=1e-6)
        for term, z, part, weight in (
            ("hidden", full, mask * gone, beta),
            ("visible", visible, mask * (1 - gone), 1 - beta),
        ):
            covariates = module._decoder_covariates(codes, None)
            trunk = module._decoder_trunk(z.mean, visible.embedding, covariates, 1)
            output = module.outputs[m](trunk[at], visible.activations[m][at])
            likelihood = module._likelihood(m, output, x.totals / share, codes[at], None)
            rows = sparse(x.dense * part, part)
            scale = module.config.modality_weights[m] * weight / n
            wanted[f"{term}_{m}"] = likelihood.nll(rows).item() * scale
    anything = torch.zeros(n, dtype=torch.bool)
    for bank in banks.values():
        anything |= bank.views["hidden"] >= 0
    kl = kl_between(full.mean, full.log_variance, visible.mean, visible.log_variance)
    wanted["kl"] = (beta * kl[anything].sum() / n).item()
    assert {k: v.item() for k, v in found.items()} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("settings", [
    {"hidden_sample": "visible"}, {"hidden_sample": "both"}, {"visible_sets": "any"}, {"visible_sets": "all"},
    {"objective": "package"}, {"objective": "package", "beta_reverse": 0.5, "skip": False}, {"mmd_weight": 2.0},
    {"weight_prior": 1.0}, {"skip": False}, {"nb_target": "lognorm", "head_range": "largest value"},
    {"batch_covariate": "decoder"}, {"batch_covariate": "none"}, {"p_feat": 1.0}, {"hidden": (24, 16)},
    {"informed_start": True}, {"rna_width": 7, "skip": True}, {"norm_shift": False},
], ids=str)  # fmt: skip
def test_every_setting_trains(tiny_mosaic: Mosaic, settings: dict[str, Any]) -> None:
    module = small(tiny_mosaic, **settings)
    batch = all_cells(tiny_mosaic)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    values = []
    for _ in range(20):
        terms = module.train().loss(batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        values.append(sum(v.item() for v in terms.values()))
    assert np.isfinite(values).all()
    if settings.get("p_feat") != 1.0:
        assert np.mean(values[-5:]) < np.mean(values[:5])
    module.eval()
    posterior = module.encode(batch)
    for m in module.layout.modalities:
        assert bool(torch.isfinite(module.decode(posterior.mean, m, batch.batch, posterior.context).mean).all())


def test_one_modality_with_nothing_hidden_is_reconstruction_alone() -> None:
    rng = np.random.default_rng(0)
    mosaic = one(None, adt=rng.poisson(3.0, (30, 6)))  # type: ignore[arg-type]
    module = small(mosaic, p_feat=0.0)
    assert set(module.train().loss(all_cells(mosaic))) == {"visible_adt"}


def test_skip_decides_what_the_decoder_sees(tiny_mosaic: Mosaic) -> None:
    """Off: the same z gives the same output whatever the data. On: visible data matter, those not encoded never do."""
    batch = all_cells(tiny_mosaic)
    other = changed(batch, "rna", torch.ones(len(batch.x["rna"].values), dtype=torch.bool), 2.0)
    keep = torch.arange(len(batch.x["rna"].values)) % 2 == 0
    other = changed(other, "rna", keep, 3.0)
    for skip in (False, True):
        module = small(tiny_mosaic, skip=skip).eval()
        with torch.no_grad():
            both = [module.encode(b) for b in (batch, other)]
            z = both[0].mean
            first, second = (module.decode(z, "adt", batch.batch, p.context).mean for p in both)
            assert torch.equal(first, second)  # the skip of a block is of its own modality
            rna = [module.decode(z, "rna", batch.batch, _same_depth(module, p.context)).mean for p in both]
            assert torch.equal(rna[0], rna[1]) is not skip
            alone = [module.encode(b, ["adt"]) for b in (batch, other)]
            assert torch.equal(alone[0].mean, alone[1].mean)
            assert torch.equal(alone[0].context.nan_to_num(-1), alone[1].context.nan_to_num(-1))


def _same_depth(module: ScVaeit, context: Tensor) -> Tensor:
    context = context.clone()
    start = module.masks.total
    context[:, start : start + len(module.layout.modalities)] = 1000.0
    return context


def test_context_knows_nothing_of_modalities_that_were_not_encoded(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    batch = all_cells(tiny_mosaic)
    alone = module.eval().encode(batch, ["adt"])
    less = replace(batch, x={"adt": batch.x["adt"]}, cache={})
    assert torch.equal(alone.mean, module.encode(less).mean)
    assert torch.equal(alone.context.nan_to_num(-1), module.encode(less).context.nan_to_num(-1))
    start = module.masks.total
    library = alone.context[:, start : start + 3]
    assert bool(torch.isnan(library[:, [0, 2]]).all())
    with pytest.raises(MosaicError) as caught:
        module.decode(alone.mean, "rna", batch.batch)
    assert caught.value.code == "model.cannot"


def test_what_is_visible_most_often_is_typical(tiny_mosaic: Mosaic) -> None:
    """Two modalities, numbered 1 and 2, both 3: six cells with both, one with the second alone."""
    present = torch.tensor([0, 0, 1, 6])
    assert commonest_visible(present, "one hidden").tolist() == [False, True]
    assert commonest_visible(present, "all").tolist() == [True, True]
    assert commonest_visible(torch.tensor([0] * 7 + [5]), "one hidden").sum() == 2
    module = small(tiny_mosaic, skip=False).eval()
    assert not module.needs_context
    z, codes = torch.randn(3, 6), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        for number, m in enumerate(module.layout.modalities):
            likelihood = module.decode(z, m, codes)
            assert bool(torch.isfinite(likelihood.mean).all())
            if isinstance(likelihood, Counts):
                assert likelihood.library.tolist() == [module.get_buffer("library")[number].item()] * 3


def test_a_batch_without_a_modality_borrows_the_code_of_one_that_has_it(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    for m in module.layout.modalities:
        has = set(module.layout.measured_in[m])
        codes = module.get_buffer(f"code_{m}").tolist()
        for number, batch in enumerate(module.layout.batches):
            assert module.layout.batches[codes[number]] in has
            assert (codes[number] == number) or batch not in has


def test_order_of_cells_does_not_matter_and_repeats_are_equal(tiny_mosaic: Mosaic, module: ScVaeit) -> None:
    module.eval()
    maker, cells = MinibatchMaker(tiny_mosaic), np.random.default_rng(0).permutation(tiny_mosaic.n_cells)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        first = module.encode(maker.make(np.arange(tiny_mosaic.n_cells)))
        for m in module.layout.modalities:
            batch = all_cells(tiny_mosaic)
            a, b = (module.decode(first.mean, m, batch.batch, first.context).mean for _ in range(2))
            assert torch.equal(a, b)
        again = module.encode(maker.make(np.arange(tiny_mosaic.n_cells)))
        assert torch.equal(first.mean, again.mean)
        shuffled = module.encode(maker.make(cells))
        torch.testing.assert_close(shuffled.mean, first.mean[cells], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shuffled.context, first.context[cells], rtol=1e-4, atol=1e-5, equal_nan=True)
        single = module.encode(maker.make(np.array([5])))
        torch.testing.assert_close(single.mean[0], first.mean[5], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_split_normalisation_is_one_group_at_a_time() -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 5) * 3 + 1
    ours, theirs = SplitNorm(5, True), torch.nn.BatchNorm1d(5, eps=1e-3, momentum=0.01)
    out = ours.train()(x, 3)
    torch.testing.assert_close(out, torch.cat([theirs(part) for part in x.chunk(3)]))
    torch.testing.assert_close(ours.get_buffer("running_var"), theirs.running_var)
    assert torch.equal(ours(x[:1], 1), ours.eval()(x[:1], 1))


def test_weights_of_modalities_settle_and_are_kept(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    module = small(tiny_mosaic, weights_after=5)
    batch = all_cells(tiny_mosaic)
    assert module.get_buffer("modality_weights").tolist() == pytest.approx([1 / 3] * 3)
    sums = torch.zeros(3)
    for _ in range(5):
        terms = module.train().loss(batch)
        for k, m in enumerate(module.layout.modalities):
            sums[k] += 3 * (terms[f"hidden_{m}"].item() * 1.5 + terms[f"visible_{m}"].item() * 3)
    weights = module.get_buffer("modality_weights").clone()
    torch.testing.assert_close(weights, 1 / sums / (1 / sums).sum(), rtol=1e-3, atol=1e-5)
    module.loss(batch)
    assert torch.equal(module.get_buffer("modality_weights"), weights)
    named = dict(zip(module.layout.modalities, weights.tolist(), strict=True))
    assert module.extra_state()["modality_weights"] == named
    save_model(tmp_path / "model", module.eval(), "scvaeit")
    assert torch.equal(load_model(tmp_path / "model").get_buffer("modality_weights"), weights)
    given = small(tiny_mosaic, modality_weights={"rna": 0.05, "adt": 0.95})
    assert given.get_buffer("modality_weights").tolist() == pytest.approx([0.05, 0.95, 1.0])


def test_a_saved_model_does_not_depend_on_the_extremes_of_new_data(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    module = small(tiny_mosaic, head_range="largest value", nb_target="lognorm").eval()
    save_model(tmp_path / "model", module, "scvaeit")
    again = load_model(tmp_path / "model")
    batch = all_cells(tiny_mosaic)
    first = int(batch.x["rna"].indptr[1])
    extreme = changed(batch, "rna", torch.arange(len(batch.x["rna"].values)) >= first, 1000.0)
    with torch.no_grad():
        one_, other = module.encode(batch), again.encode(extreme)
        torch.testing.assert_close(one_.mean[0], other.mean[0], rtol=1e-5, atol=1e-6)
        a, b = (m.decode(p.mean, "rna", batch.batch, p.context).mean[0] for m, p in ((module, one_), (again, other)))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert again.get_buffer("top").tolist() == module.get_buffer("top").tolist()


def test_shares_of_features_are_found_through_gaps() -> None:
    """Two batches with the same composition, one of which lacks half of the features."""
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.ones(8))
    counts = rng.multinomial(5000, share, size=200).astype(np.float32)
    mask = np.ones((200, 8), np.float32)
    mask[100:, :4] = 0
    csr = sp.csr_matrix(counts * mask)
    x = TileRows(None, torch.from_numpy(csr.indptr.astype(np.int64)), torch.from_numpy(csr.indices.astype(np.int32)),
                 torch.from_numpy(csr.data), 8, torch.from_numpy(mask))  # fmt: skip
    shape = Layout(("a", "b"), {"rna": tuple("12345678")}, {"rna": ("a", "b")}, {"rna": (8,)})
    facts = learn([Minibatch(torch.arange(200), torch.arange(200) // 100, {"rna": x})], shape)[0]["rna"]
    np.testing.assert_allclose(facts.share.numpy(), share, atol=0.01)
    assert facts.library == pytest.approx(5000, rel=0.05)
    assert facts.measured.tolist() == [[True] * 8, [False] * 4 + [True] * 4]


def test_covariates_are_told_to_both_networks(tiny_mosaic: Mosaic) -> None:
    cells = tiny_mosaic.cells.assign(
        stim=["ctrl", "stim"] * (tiny_mosaic.n_cells // 2), age=np.arange(tiny_mosaic.n_cells, dtype=float)
    )
    mosaic = replace(tiny_mosaic, cells=cells)
    shape = Layout.of(mosaic, ("stim", "age"))
    torch.manual_seed(0)
    module = ScVaeit(ScVaeitConfig(**SMALL, covariates=("stim", "age")), shape).eval()
    batch = MinibatchMaker(mosaic, covariates=shape.covariates).make(np.arange(40))
    with torch.no_grad():
        posterior = module.encode(batch)
        other = replace(batch, covariates=batch.covariates * torch.tensor([1.0, 2.0]), cache={})
        assert not torch.equal(module.encode(other).mean, posterior.mean)
        codes = module.decode(posterior.mean, "rna", batch.batch, posterior.context).mean
        unlike = module.decode(posterior.mean, "rna", batch.batch, module.encode(other).context).mean
        assert not torch.equal(codes, unlike)


def planted(n_batches: int = 5, n: int = 120) -> tuple[Mosaic, np.ndarray, np.ndarray]:
    """A mosaic of low-rank RNA and protein whose batches each lack a fifth of the genes; gaps; rates of all genes."""
    rng = np.random.default_rng(0)
    total, d = n_batches * n, 60
    z = rng.normal(size=(total, 3))
    rates = np.exp(z @ rng.normal(0, 0.6, (3, d)) + 0.5)
    counts = {"rna": rng.poisson(rates), "adt": rng.poisson(np.exp(z @ rng.normal(0, 0.5, (3, 12)) + 2.0))}
    batches = tuple(f"b{i}" for i in range(n_batches))
    names = [f"c{i}" for i in range(total)]
    cells = pd.DataFrame({"batch": np.repeat(batches, n), "barcode": names}, index=names)
    gaps = np.stack([np.isin(np.arange(d), rng.permutation(d)[: d // 5]) for _ in batches])
    tiles = {}
    for number, b in enumerate(batches):
        own = np.arange(number * n, (number + 1) * n)
        seen = counts["rna"][own] * ~gaps[number]
        tiles[b, "rna"] = Tile(b, "rna", MemoryRows(sp.csr_matrix(seen.astype(np.float32))), own, ~gaps[number])
        tiles[b, "adt"] = Tile(b, "adt", MemoryRows(sp.csr_matrix(counts["adt"][own].astype(np.float32))), own)
    features = {m: pd.DataFrame(index=[f"{m}{j}" for j in range(x.shape[1])]) for m, x in counts.items()}
    return Mosaic(cells, batches, features, tiles), gaps, rates


def test_planted_structure_is_recovered(tmp_path: Path) -> None:
    """A fifth of the features missing: expected values nearer to the truth than the mean's and the neighbours'."""
    from sklearn.neighbors import KNeighborsRegressor

    mosaic, gaps, rates = planted()
    settings = SMALL | {
        "rna_width": 64, "hidden": (64,), "max_steps": 450, "batch_size": 128, "lr": 6e-3, "batch_covariate": "none",
        "mmd_weight": 0.0, "weight_kl": 0.25, "modality_weights": {"rna": 1.0, "adt": 1.0},
    }  # fmt: skip
    config = ScVaeitConfig.make("fast", **settings)
    seed_all(0)
    module = create("scvaeit", config, Layout.of(mosaic))
    fit(module, mosaic, config, seed=0, device="cpu", checkpoints=tmp_path / "ck", emit=lambda kind, **fields: None)
    batch = all_cells(mosaic)
    with torch.no_grad():
        posterior = module.encode(batch)
        found = module.decode(posterior.mean, "rna", batch.batch, posterior.context).mean.numpy()
    codes, counts = mosaic.batch_codes, batch.x["rna"].dense.numpy()
    errors: dict[str, list[np.ndarray]] = {"ours": [], "mean": [], "knn": []}
    for code in range(len(gaps)):
        own = np.flatnonzero(codes == code)
        for gene in np.flatnonzero(gaps[code]):
            able = np.flatnonzero(~gaps[codes, gene])
            both = ~gaps[code] & ~gaps[np.unique(codes[able])].any(axis=0)
            x = np.log1p(counts[:, both])
            # On the scale of the logarithm, of expected counts all three.
            near = KNeighborsRegressor(25).fit(x[able], counts[able, gene]).predict(x[own])
            truth = np.log1p(rates[own, gene])
            errors["ours"].append(np.log1p(found[own, gene]) - truth)
            errors["mean"].append(np.log1p(counts[able, gene].mean()) - truth)
            errors["knn"].append(np.log1p(near) - truth)
    rmse = {name: float(np.sqrt(np.mean(np.concatenate(parts) ** 2))) for name, parts in errors.items()}
    assert rmse["ours"] < rmse["knn"] < rmse["mean"], rmse


def test_training_goes_on_where_it_stopped(tiny_mosaic: Mosaic, tmp_path: Path) -> None:
    """A run that is paused and resumed ends bit-equal to one that is not: masks are drawn with torch's numbers."""
    config = ScVaeitConfig(**SMALL, max_epochs=4, batch_size=64, weights_after=6)
    ends = []
    for name, stop in (("whole", None), ("parts", 7)):
        steps = 0

        def control(stop: int | None = stop) -> str | None:
            nonlocal steps
            steps += 1
            return "pause" if steps == stop else None

        def run(resume: bool, name: str = name) -> ScVaeit:
            seed_all(1)
            made = create("scvaeit", config, Layout.of(tiny_mosaic))
            assert isinstance(made, ScVaeit)
            fit(made, tiny_mosaic, config, seed=1, device="cpu", checkpoints=tmp_path / name,
                emit=lambda kind, **fields: None, control=control, resume=resume)  # fmt: skip
            return made

        module = run(False)
        if stop is not None:
            module = run(True)
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_supports_says_its_limits() -> None:
    def pattern(n_features: int = 9, **batches: tuple[str, ...]) -> Pattern:
        tiles = tuple(
            TilePattern(batch=b, modality=m, n_cells=60, n_features=n_features) for b, ms in batches.items() for m in ms
        )
        used = {m for ms in batches.values() for m in ms}
        return Pattern(
            batches=tuple(batches), n_cells=dict.fromkeys(batches, 60), n_features=dict.fromkeys(used, 9), tiles=tiles
        )

    assert ScVaeitConfig.supports(pattern(a=("rna", "adt"), b=("rna",))).level == "fits"
    assert "links" in ScVaeitConfig.supports(pattern(a=("rna",), b=("adt",))).reasons[0]
    assert "visible_sets" in ScVaeitConfig.supports(pattern(a=("rna", "adt", "atac"))).reasons[0]
    assert ScVaeitConfig.supports(pattern()).level == "cannot"
    assert ScVaeitConfig.supports(pattern(a=("methylation",))).level == "cannot"
    assert ScVaeitConfig.supports(pattern(1, a=("adt",))).level == "cannot"


@pytest.mark.parametrize("preset", sorted(ScVaeitConfig.presets()))
def test_presets_are_valid(preset: str) -> None:
    assert ScVaeitConfig.make(preset).n_latent == 32
