"""The checks of fidelity to Multigrate: counts, limits, invariances, query mapping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from headless.data.covariates import Covariate
from headless.data.minibatch import Minibatch, MinibatchMaker
from headless.data.mosaic import Layout, Mosaic
from headless.data.samplers import TwoBatchSampler
from headless.errors import MosaicError
from headless.models import create
from headless.models.count_likelihoods import NegativeBinomial
from headless.models.likelihoods import SquaredError
from headless.models.multigrate.config import MultigrateConfig
from headless.models.multigrate.module import Expert, Multigrate
from headless.train.loop import fit

BATCH3 = (Covariate("site", ("a", "b", "c")),)


def layout(covariates: tuple[Covariate, ...] = (), batches: tuple[str, ...] = ("one",)) -> Layout:
    return Layout(
        batches,
        {"rna": tuple(f"g{i}" for i in range(2000)), "adt": tuple(f"p{i}" for i in range(134))},
        {"rna": batches, "adt": batches},
        {"rna": (2000,), "adt": (134,)},
        covariates,
    )


def made(mosaic: Mosaic, covariates: tuple[str, ...] = (), **settings: object) -> Multigrate:
    torch.manual_seed(0)
    config = MultigrateConfig.make(None, **{"dropout": 0.0, "hidden": 24, "covariates": covariates, **settings})
    module = create("multigrate", config, Layout.of(mosaic, covariates))
    assert isinstance(module, Multigrate)
    return module


def minibatch(mosaic: Mosaic, cells: np.ndarray | None = None, covariates: tuple[Covariate, ...] = ()) -> Minibatch:
    wanted = np.arange(0, mosaic.n_cells, 5) if cells is None else cells
    return MinibatchMaker(mosaic, covariates=covariates).make(wanted)


# Section 3.
@pytest.mark.parametrize(
    ("covariates", "shared", "expected"),
    [((), False, 593_286), ((), True, 591_110), (BATCH3, False, 601_526), (BATCH3, True, 601_398)],
)
def test_parameter_counts(covariates, shared, expected):
    module = Multigrate(MultigrateConfig(shared_decoder=shared), layout(covariates))
    assert sum(p.numel() for p in module.parameters()) == expected


def test_batches_count_like_a_covariate_of_as_many_levels():
    module = Multigrate(MultigrateConfig(), layout(batches=("a", "b", "c")))
    # The dispersion has one column a group of the alignment: two more than without groups.
    assert sum(p.numel() for p in module.parameters()) == 601_398 + 2 * 2000


def test_product_of_experts_known_answers(tiny_mosaic):
    module = made(tiny_mosaic, dim_z=2)
    one = Expert(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 0.5]]).log(), None)
    mean, log_variance = module._joint({"rna": one}, 1)
    torch.testing.assert_close(mean, torch.full((1, 2), 2 / 3))
    torch.testing.assert_close(log_variance.exp(), torch.full((1, 2), 1 / 3))
    prior_mean, prior_log = module._joint({}, 3)
    assert (prior_mean == 0).all()
    assert (prior_log == 0).all()


def test_average_of_two_equal_experts_has_half_the_variance(tiny_mosaic):
    module = made(tiny_mosaic, mix="mixture", dim_z=2)
    expert = Expert(torch.tensor([[0.7, -2.0]]), torch.tensor([[0.3, 1.1]]).log(), None)
    mean, log_variance = module._joint({"rna": expert, "adt": expert}, 1)
    torch.testing.assert_close(mean, expert.mean)
    torch.testing.assert_close(log_variance.exp(), torch.tensor([[0.15, 0.55]]))


@pytest.mark.parametrize("mix", ["product", "mixture"])
def test_a_missing_modality_changes_nothing(tiny_mosaic, mix):
    module = made(tiny_mosaic, mix=mix).eval()
    cells = np.flatnonzero(tiny_mosaic.measured("rna") & tiny_mosaic.measured("adt"))[:20]
    batch = minibatch(tiny_mosaic, cells)
    without = minibatch(tiny_mosaic.without({"adt": cells[::2]}), cells)
    alone = module.encode(without).mean
    both = module.encode(batch).mean
    assert torch.equal(alone[1::2], both[1::2])
    assert not torch.equal(alone[::2], both[::2])


def test_order_of_modalities_and_of_cells(tiny_mosaic):
    module = made(tiny_mosaic).eval()
    batch = minibatch(tiny_mosaic)
    turned = replace(batch, x=dict(reversed(batch.x.items())), cache={})
    torch.testing.assert_close(module.encode(turned).mean, module.encode(batch).mean, rtol=1e-5, atol=1e-6)
    cells = np.arange(0, tiny_mosaic.n_cells, 5)
    order = np.random.default_rng(0).permutation(len(cells))
    torch.testing.assert_close(
        module.encode(minibatch(tiny_mosaic, cells[order])).mean, module.encode(batch).mean[order],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_encoding_is_deterministic_and_independent_of_the_minibatch(tiny_mosaic):
    module = made(tiny_mosaic).eval()
    maker = MinibatchMaker(tiny_mosaic)
    small = torch.cat([module.encode(b).mean for b in maker.in_order(7)])
    large = module.encode(next(maker.in_order(1000))).mean
    assert torch.equal(large, module.encode(next(maker.in_order(1000))).mean)
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)


def test_proportions_and_size_factors(tiny_mosaic):
    module = made(tiny_mosaic, adt="nb").eval()
    module.get_buffer("_size_rna").fill_(1500.0)
    z, codes = torch.randn(9, 16), torch.zeros(9, dtype=torch.long)
    median = module.decode(z, "rna", codes)
    assert isinstance(median, NegativeBinomial)
    torch.testing.assert_close(median.mean.sum(1), torch.full((9,), 1500.0), rtol=1e-4, atol=1e-2)
    context = torch.full((9, 3), 3000.0)
    torch.testing.assert_close(module.decode(z, "rna", codes, context).mean, 2 * median.mean, rtol=1e-4, atol=1e-4)
    nothing = torch.full((9, 3), float("nan"))
    torch.testing.assert_close(module.decode(z, "rna", codes, nothing).mean, median.mean)


def test_translation_does_not_see_the_target(tiny_mosaic):
    module = made(tiny_mosaic, adt="nb").eval()
    cells = np.flatnonzero(tiny_mosaic.measured("rna") & tiny_mosaic.measured("adt"))[:15]
    found = []
    for scale in (1.0, 7.0):
        batch = minibatch(tiny_mosaic, cells)
        batch.x["adt"] = batch.x["adt"].with_values(batch.x["adt"].values * scale)
        p = module.encode(batch, ["rna"])
        found.append(module.decode(p.mean, "adt", batch.batch, p.context).mean)
    assert torch.equal(*found)


def test_no_alignment_without_weight_or_groups(tiny_mosaic):
    def run(**settings: object) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        module = made(tiny_mosaic, **settings)
        torch.manual_seed(5)
        terms = module.loss(minibatch(tiny_mosaic))
        sum(terms.values()).backward()
        return {k: float(v.detach()) for k, v in terms.items()}, {
            k: p.grad for k, p in module.named_parameters() if p.grad is not None
        }

    off, gradients = run(alignment="none")
    zero, same = run(weight_alignment=0.0)
    assert off == zero
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    on, _ = run(weight_alignment=500.0)
    assert on["mmd"] > 0
    module = made(tiny_mosaic)
    one_batch = np.flatnonzero(tiny_mosaic.batch_codes == 0)[:20]
    assert float(module.loss(minibatch(tiny_mosaic, one_batch))["mmd"].detach()) == 0


@pytest.mark.parametrize("alignment", ["latent", "marginal", "both"])
@pytest.mark.parametrize("kinds", [{}, {"rna": "zinb", "adt": "nb", "atac": "bce"}, {"rna": "mse"}])
def test_every_likelihood_and_alignment_trains(tiny_mosaic, alignment, kinds):
    module = made(tiny_mosaic, alignment=alignment, weight_pairs=1.0, **kinds)
    module.prepare(MinibatchMaker(tiny_mosaic).in_order(64))
    batch = minibatch(tiny_mosaic)
    terms = module.loss(batch)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
    for modality in tiny_mosaic.modalities:
        mean = module.decode(torch.zeros(4, 16), modality, torch.zeros(4, dtype=torch.long)).mean
        assert torch.isfinite(mean).all()
        assert (mean >= 0).all() or isinstance(module.decode(torch.zeros(1, 16), modality, torch.zeros(1).long()),
                                               SquaredError)  # fmt: skip


def test_warm_up_of_the_kl_term(tiny_mosaic):
    module = made(tiny_mosaic, max_epochs=200)
    weights = {}
    for epoch in (0, 33, 66, 150):
        module.start_epoch(epoch, epoch * 10, 2000)
        weights[epoch] = module.kl_warmth
    assert weights[0] == 0
    assert weights[33] == pytest.approx(0.5, abs=0.01)
    assert weights[66] == weights[150] == 1
    other = made(tiny_mosaic)
    other.load_extra_state(module.extra_state())
    assert other.kl_warmth == 1


def test_gradients_flow_from_measured_modalities_alone(tiny_mosaic):
    module = made(tiny_mosaic)
    cells = np.flatnonzero(tiny_mosaic.measured("rna"))[:20]
    hidden = {m: cells for m in tiny_mosaic.modalities if m != "rna"}
    sum(module.loss(minibatch(tiny_mosaic.without(hidden), cells)).values()).backward()
    assert module.shared is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.shared.hidden.parameters())
    assert all(p.grad is None for p in module.decoders["adt"].parameters())
    assert all(p.grad is None for p in module.encoders["adt"].parameters())


def test_unmeasured_features_take_no_share_and_no_gradient(tiny_mosaic):
    masked = next(
        tile for tile in tiny_mosaic.tiles.values() if tile.modality == "rna" and tile.mask is not None
        and not tile.mask.all()
    )  # fmt: skip
    module = made(tiny_mosaic, alignment="none")
    sum(module.loss(minibatch(tiny_mosaic, masked.cells[:10])).values()).backward()
    head = module.decoders["rna"].heads[0].weight.grad
    assert (head[torch.from_numpy(~masked.mask)] == 0).all()
    assert (head[torch.from_numpy(masked.mask)] != 0).any()


def test_several_covariates_categorical_and_continuous(tiny_mosaic):
    random = np.random.default_rng(0)
    cells = tiny_mosaic.cells.assign(
        sex=random.choice(["f", "m"], tiny_mosaic.n_cells), age=random.normal(50, 9, tiny_mosaic.n_cells),
        depth=random.random(tiny_mosaic.n_cells),
    )  # fmt: skip
    mosaic = replace(tiny_mosaic, cells=cells)
    names = ("sex", "age", "depth")
    for curve in ("sigmoid", "log sigmoid", "network"):
        module = made(mosaic, covariates=names, curve=curve)
        batch = minibatch(mosaic, covariates=module.layout.covariates)
        sum(module.loss(batch).values()).backward()
        assert all(p.grad is not None for p in module.conditions.parameters())
    module.eval()
    turned = replace(batch, covariates=batch.covariates + torch.tensor([0.0, 1.0, 0.0]), cache={})
    assert not torch.equal(module.encode(turned).mean, module.encode(replace(batch, cache={})).mean)
    posterior = module.encode(replace(batch, cache={}))
    named = module.decode(posterior.mean, "rna", batch.batch, posterior.context).mean
    assert not torch.equal(named, module.decode(posterior.mean, "rna", batch.batch).mean)


def test_covariates_that_cannot_be_used_are_errors_in_words(tiny_mosaic):
    with pytest.raises(MosaicError, match="No column 'sexx'") as unknown:
        Layout.of(replace(tiny_mosaic, cells=tiny_mosaic.cells.assign(sex="f")), ("sexx",))
    assert "sex" in unknown.value.hint
    with pytest.raises(MosaicError, match="same in every cell"):
        Layout.of(replace(tiny_mosaic, cells=tiny_mosaic.cells.assign(sex="f")), ("sex",))


def test_two_batch_sampler_joins_chunks_of_one_batch():
    batches = [np.arange(0, 1000), np.arange(1000, 1400), np.arange(1400, 1430)]
    sampler = TwoBatchSampler(batches, 100, 0)
    plan = sampler.plan(0)
    assert len(plan) == sampler.steps
    drawn = np.concatenate(plan)
    assert len(np.unique(drawn)) == len(drawn) == 1000 + 400 + 30  # a lone chunk smaller than half is kept whole
    code = np.digitize(drawn, [1000, 1400])
    assert set(code) == {0, 1, 2}
    for part in plan:
        assert len(np.unique(np.digitize(part, [1000, 1400]))) <= 2
    assert all(np.array_equal(a, b) for a, b in zip(plan, sampler.plan(0), strict=True))


def _query(mosaic: Mosaic) -> tuple[Mosaic, Mosaic]:
    """The last batch as a query under a new name, beside the reference batches (of which it has no cell)."""
    name = mosaic.batches[-1]
    here = np.flatnonzero((mosaic.cells["batch"] == name).to_numpy())
    kept = np.flatnonzero((mosaic.cells["batch"] != name).to_numpy())
    reference = replace(
        mosaic,
        cells=mosaic.cells.iloc[kept],
        batches=mosaic.batches[:-1],
        tiles={key: tile for key, tile in mosaic.tiles.items() if key[0] != name},
    )
    tiles = {
        key: replace(tile, cells=np.searchsorted(here, tile.cells)) for key, tile in mosaic.tiles.items()
        if key[0] == name
    }  # fmt: skip
    return reference, replace(mosaic, cells=mosaic.cells.iloc[here], tiles=tiles)


def test_query_mapping_leaves_the_reference_as_it_was(tiny_mosaic, tmp_path: Path):
    reference, query = _query(tiny_mosaic)
    module = made(reference, weight_decay=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    grown = module.for_query(Layout.of(query))
    assert grown.layout.batches == tiny_mosaic.batches
    batch = minibatch(reference)
    module.eval()
    expected = module.encode(batch).mean
    n_old = len(reference.batches)
    fresh = grown.conditions.batch.weight[n_old:].detach().clone()
    fit(grown, query, grown.config.model_copy(update={"max_epochs": 4, "validation_fraction": 0.0, "patience": 0}),
        seed=0, device="cpu", checkpoints=tmp_path, emit=lambda kind, **fields: None)  # fmt: skip
    assert not torch.equal(grown.conditions.batch.weight[n_old:], fresh)
    for name, value in grown.state_dict().items():
        if name == "_size_rna" or name.startswith("_size"):
            continue
        kept = value[: len(before[name])] if value.dim() else value
        assert torch.equal(kept, before[name]), name
    grown.eval()
    assert torch.equal(grown.encode(replace(batch, cache={})).mean, expected)
    later = replace(Layout.of(query), batches=("later",), measured_in={"rna": ("later",)})
    again = grown.for_query(later)
    assert again.layout.batches == (*tiny_mosaic.batches, "later")
    with pytest.raises(MosaicError, match="not those of the reference"):
        grown.for_query(replace(later, features={"rna": ("other",)}))


def test_mapping_needs_a_conditioned_model(tiny_mosaic):
    for told in ("none", "decoder"):
        with pytest.raises(MosaicError, match="do not know batches"):
            made(tiny_mosaic, conditions=told).for_query(Layout.of(tiny_mosaic))
    module = made(tiny_mosaic, conditions="decoder").eval()
    batch = minibatch(tiny_mosaic)
    turned = replace(batch, batch=(batch.batch + 1) % len(tiny_mosaic.batches), cache={})
    assert torch.equal(module.encode(turned).mean, module.encode(batch).mean)
    z = torch.zeros(2, 16)
    assert not torch.equal(module.decode(z, "rna", torch.tensor([0, 0])).mean,
                           module.decode(z, "rna", torch.tensor([1, 1])).mean)  # fmt: skip


SETTINGS = {"lr": 3e-3, "max_epochs": 40, "patience": 0, "batch_size": 128, "validation_fraction": 0.0, "hidden": 32}


@pytest.fixture(scope="module")
def blood() -> Mosaic:
    from headless.data.simulate import simulate

    return simulate(600, n_genes=200, n_proteins=30, n_peaks=40).to_mosaic()


def trained(mosaic: Mosaic, folder: Path, **settings: object) -> Multigrate:
    module = made(mosaic, **{**SETTINGS, **settings})
    fit(module, mosaic, module.config, seed=0, device="cpu", checkpoints=folder, emit=lambda kind, **fields: None)
    return module.eval()


@torch.no_grad()
def embedded(module: Multigrate, mosaic: Mosaic) -> np.ndarray:
    return torch.cat([module.encode(b).mean for b in MinibatchMaker(mosaic).in_order(500)]).numpy()


def test_alignment_mixes_batches_and_keeps_types(blood: Mosaic, tmp_path: Path):
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    batch, label = blood.cells["batch"].astype(str), blood.cells["label"].astype(str)
    apart = embedded(trained(blood, tmp_path / "apart", alignment="none"), blood)
    mixed = embedded(trained(blood, tmp_path / "mixed", weight_alignment=20.0), blood)
    assert silhouette_score(mixed, batch) < silhouette_score(apart, batch) - 0.05
    kept = [cross_val_score(KNeighborsClassifier(10), z, label, cv=3).mean() for z in (apart, mixed)]
    assert kept[1] > kept[0] - 0.1
    assert kept[1] > 2 * label.value_counts(normalize=True).iloc[0]


def test_imputation_of_hidden_protein_beats_the_feature_mean(blood: Mosaic, tmp_path: Path):
    hidden = np.flatnonzero(blood.measured("rna") & blood.measured("adt"))[::4]
    mosaic = blood.without({"adt": hidden})
    module = trained(mosaic, tmp_path, weight_alignment=20.0)
    with torch.no_grad():
        batch = MinibatchMaker(mosaic).make(hidden)
        posterior = module.encode(batch)
        found = module.decode(posterior.mean, "adt", batch.batch, posterior.context).mean.numpy()
    target = MinibatchMaker(blood).make(hidden).x["adt"].dense.numpy()
    r = pd.DataFrame(np.log1p(found)).corrwith(pd.DataFrame(np.log1p(target)))
    assert r.mean() > 0.2  # 0 for the feature mean


def test_a_batch_without_a_modality_decodes_it_with_the_mean_condition_of_those_that_have_it(tiny_mosaic: Mosaic):
    module = made(tiny_mosaic, adt="nb").eval()
    known = [tiny_mosaic.batches.index(b) for b in module.layout.measured_in["adt"]]
    lacking = [code for code in range(len(tiny_mosaic.batches)) if code not in known]
    assert lacking
    z = torch.randn(3, 16)
    with torch.no_grad():
        before = module.decode(z, "adt", torch.tensor([lacking[0]] * 3)).mean
        module.conditions.batch.weight[lacking[0]] += 5
        module.log_theta["adt"][lacking[0]] += 5
        assert torch.equal(module.decode(z, "adt", torch.tensor([lacking[0]] * 3)).mean, before)
        module.conditions.batch.weight[known[0]] += 5
        assert not torch.equal(module.decode(z, "adt", torch.tensor([lacking[0]] * 3)).mean, before)


def test_the_choice_none_is_a_word_and_not_the_absence_of_a_value():
    assert MultigrateConfig.make("fast", alignment=None).alignment == "none"
    assert MultigrateConfig.make(None, gradient_clip=None).gradient_clip is None
    with pytest.raises(MosaicError, match="rna"):
        MultigrateConfig.make(None, rna=None)
