"""The checks of fidelity to MIDAS: counts, known answers, invariances, flow of gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headless.data.minibatch import Minibatch, MinibatchMaker, TileRows
from headless.data.mosaic import Layout, Mosaic
from headless.data.pattern import Pattern, TilePattern
from headless.errors import MosaicError
from headless.models import create, get, names
from headless.models.experts import gaussian_kl, keep_some, product_of_experts
from headless.models.midas.config import MidasConfig
from headless.models.midas.module import Midas

SMALL = {"data_hidden": 32, "trunk_hidden": (16,), "chunk_hidden": (12,), "chunk_out": 4, "dim_c": 6, "dropout": 0.0}
TEADOG = (2897, 2007, 1531, 851, 1201, 1644, 1318, 1028, 1137, 1251, 1520, 1477, 511, 1024, 927, 1284, 1920, 413, 2106,
          836, 324, 764)  # fmt: skip


def layout(n_batches: int, measured: int, chunks: tuple[int, ...] = (), **sizes: int) -> Layout:
    batches = tuple(f"b{i}" for i in range(n_batches))
    chunked = {m: (n,) for m, n in sizes.items()} | ({"atac": chunks} if chunks else {})
    return Layout(
        batches,
        {m: tuple(f"{m}{i}" for i in range(sum(c))) for m, c in chunked.items()},
        dict.fromkeys(chunked, batches[:measured]),
        chunked,
    )


@pytest.fixture
def module(tiny_mosaic: Mosaic) -> Midas:
    torch.manual_seed(0)
    made = create("midas", MidasConfig(**SMALL), Layout.of(tiny_mosaic))
    assert isinstance(made, Midas)
    return made


def batch_of(mosaic: Mosaic, name: str, n: int = 12) -> Minibatch:
    cells = np.flatnonzero(mosaic.cells["batch"].to_numpy() == name)[:n]
    return MinibatchMaker(mosaic).make(cells)


def gradients(module: Midas) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# Section 3: exact numbers of parameters (network, discriminators).
@pytest.mark.parametrize(
    ("shape", "network", "discriminators"),
    [
        (layout(4, 3, TEADOG, rna=4045, adt=224), 17_869_212, 52_301),
        (layout(8, 8, rna=3617, adt=224), 8_157_617, 40_152),
    ],
    ids=["teadog", "wnn"],
)
def test_parameter_counts(shape: Layout, network: int, discriminators: int) -> None:
    module = Midas(MidasConfig(), shape)
    found = sum(p.numel() for p in module.discriminators.parameters())
    assert found == discriminators
    assert sum(p.numel() for p in module.parameters()) - found == network


def test_parts_of_the_teadog_network() -> None:
    module = Midas(MidasConfig(), layout(4, 3, TEADOG, rna=4045, adt=224))
    parts = ("encoders", "trunk", "batch_encoder", "decoder", "batch_decoder")
    counts = [sum(p.numel() for p in getattr(module, part).parameters()) for part in parts]
    assert counts == [8_782_528, 140_228, 1_572, 8_944_432, 452]


# Section 8: product of experts.
def test_product_of_experts_known_answers() -> None:
    def product(*experts: tuple[float, float]) -> tuple[float, float]:
        t = [torch.tensor([[1 / variance]]) for _, variance in experts]
        weighted = [torch.tensor([[mean / variance]]) for mean, variance in experts]
        mean, log_variance = product_of_experts(weighted, t)
        return mean.item(), log_variance.exp().item()

    assert product((1.0, 0.5)) == pytest.approx((2 / 3, 1 / 3))
    assert product((1.0, 0.5), (-1.0, 2.0)) == pytest.approx((3 / 7, 2 / 7))
    assert product((-1.0, 2.0), (1.0, 0.5)) == pytest.approx((3 / 7, 2 / 7))
    assert product((1.0, 0.5), (5.0, float("inf"))) == pytest.approx((2 / 3, 1 / 3))
    zero = torch.zeros(1, 1)
    mean, log_variance = product_of_experts([zero], [zero])
    assert (mean.item(), log_variance.item()) == (0.0, 0.0)


def test_kl_known_answer() -> None:
    mean, log_variance = torch.tensor([[0.5, -0.2]]), torch.tensor([[-1.0, 0.3]])
    found = gaussian_kl(mean, log_variance).item()
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).sum()
    assert found == pytest.approx(0.3539, abs=1e-4)
    assert found == pytest.approx(theirs.item(), rel=1e-5)


def test_dropped_batch_expert_hides_the_batch(tiny_mosaic: Mosaic) -> None:
    torch.manual_seed(0)
    module = Midas(MidasConfig(**SMALL, batch_expert_dropout=1.0), Layout.of(tiny_mosaic)).train()
    batch = batch_of(tiny_mosaic, tiny_mosaic.batches[0])
    other = replace(batch, batch=torch.full_like(batch.batch, 1), cache={})
    results = []
    for one in (batch, other):
        torch.manual_seed(1)
        results.append(module._objective(one))
    assert torch.equal(results[0][1]["joint"], results[1][1]["joint"])
    assert "batch" not in results[0][0]
    sum(results[0][0].values()).backward()
    for part in (module.batch_encoder, module.batch_decoder):
        assert all(p.grad is None for p in part.parameters())


def test_features_that_were_not_measured_change_nothing(tiny_mosaic: Mosaic, module: Midas) -> None:
    """A masked feature gives no gradient to its output weight, and a change of its value changes no loss."""
    name, modality = next((b, m) for (b, m), tile in tiny_mosaic.tiles.items() if tile.mask is not None)
    tile = tiny_mosaic.tiles[name, modality]
    hidden = np.flatnonzero(~tile.mask)
    assert len(hidden)
    batch = batch_of(tiny_mosaic, name)
    torch.manual_seed(5)
    sum(module.loss(batch).values()).backward()
    weight = module.decoder.heads[modality]
    if modality not in module.decoder.tails:
        assert torch.all(weight.weight.grad[hidden] == 0)
        assert torch.all(weight.bias.grad[hidden] == 0)
    likelihood = module.decode(torch.zeros(batch.n, 8), modality, batch.batch)
    before = likelihood.loss(batch.x[modality])
    parameters = getattr(likelihood, "log_rate", getattr(likelihood, "logit", None)).detach().clone()
    parameters[:, hidden] += 3.0
    assert type(likelihood)(parameters).loss(batch.x[modality]).item() == pytest.approx(before.item(), rel=1e-6)


def test_missing_modality_is_absent(tiny_mosaic: Mosaic) -> None:
    """Losses of a batch equal those of a mosaic in which the other modality never was."""
    config = MidasConfig(**SMALL)
    whole = Midas(config, Layout.of(tiny_mosaic))
    name = next(b for b in tiny_mosaic.batches if len([m for (x, m) in tiny_mosaic.tiles if x == b]) == 2)
    missing = next(m for m in tiny_mosaic.modalities if (name, m) not in tiny_mosaic.tiles)
    features = {m: f for m, f in tiny_mosaic.features.items() if m != missing}
    tiles = {k: t for k, t in tiny_mosaic.tiles.items() if k[1] != missing}
    without = replace(tiny_mosaic, features=features, tiles=tiles)
    less = Midas(config, Layout.of(without))
    shared = {k: v for k, v in whole.state_dict().items() if k in less.state_dict() and "discriminators" not in k}
    less.load_state_dict(shared, strict=False)
    terms, grads = [], []
    for module, mosaic in ((whole, tiny_mosaic), (less, without)):
        torch.manual_seed(2)
        batch = batch_of(mosaic, name)
        module.eval()
        found, _ = module._objective(batch)
        sum(found.values()).backward()
        terms.append({k: v.item() for k, v in found.items()})
        grads.append({k: g for k, g in gradients(module).items() if "discriminators" not in k})
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)
    assert not [k for k in grads[0] if missing in k]
    for key, value in grads[1].items():
        torch.testing.assert_close(grads[0][key], value, rtol=1e-4, atol=1e-5)


def test_alignment_is_zero_for_one_modality_and_for_agreement() -> None:
    z = torch.randn(5, 4)
    from headless.models.midas.module import Expert

    expert = Expert(z, z, None)
    assert Midas._spread({"rna": z, "adt": z.clone()}, {"rna": expert, "adt": expert}).item() == 0.0
    here = Expert(z, z, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    other = torch.randn(5, 4)
    found = Midas._spread({"rna": z, "adt": other}, {"rna": expert, "adt": here}).item()
    assert found == pytest.approx(((z[:2] - other[:2]).square().sum() / 2).item(), rel=1e-5)


def test_gradients_flow_where_they_should(tiny_mosaic: Mosaic, module: Midas) -> None:
    batch = batch_of(tiny_mosaic, tiny_mosaic.batches[-1])
    steps = module.train().training_step(batch)
    for _ in range(module.config.discriminator_steps):
        update = next(steps)
        assert update.optimizer == "discriminator"
        module.zero_grad(set_to_none=True)
        sum(update.terms.values()).backward()
        assert gradients(module)
        assert all(name.startswith("discriminators") for name in gradients(module))
    update = next(steps)
    assert update.optimizer == "model"
    module.zero_grad(set_to_none=True)
    sum(update.terms.values()).backward()
    assert not [name for name in gradients(module) if name.startswith("discriminators")]
    assert next(steps, None) is None


def test_adversary_pushes_c_against_the_discriminators(tiny_mosaic: Mosaic, module: Midas) -> None:
    batch = batch_of(tiny_mosaic, tiny_mosaic.batches[0])
    module.eval()
    _, c = module._objective(batch)
    leaf = {name: value.detach().requires_grad_() for name, value in c.items()}
    module._discriminate(batch, leaf).backward()
    towards = {name: value.grad.clone() for name, value in leaf.items()}
    loss = module.train(False).loss(batch)
    assert loss["adversarial"].item() < 0
    again = {name: value.detach().requires_grad_() for name, value in c.items()}
    (-module._discriminate(batch, again)).backward()
    for name, value in again.items():
        torch.testing.assert_close(value.grad, -towards[name])


def test_evaluation_is_equivariant_and_repeatable(tiny_mosaic: Mosaic, module: Midas) -> None:
    module.eval()
    maker = MinibatchMaker(tiny_mosaic)
    cells = np.random.default_rng(0).permutation(tiny_mosaic.n_cells)
    with torch.no_grad():
        first = module.encode(maker.make(np.arange(tiny_mosaic.n_cells))).mean
        assert torch.equal(first, module.encode(maker.make(np.arange(tiny_mosaic.n_cells))).mean)
        torch.testing.assert_close(module.encode(maker.make(cells)).mean, first[cells], rtol=1e-5, atol=1e-6)


def test_unimodal_posterior_sees_only_its_modality(tiny_mosaic: Mosaic, module: Midas) -> None:
    module.eval()
    name = next(b for b in tiny_mosaic.batches if {("rna"), ("adt")} <= {m for (x, m) in tiny_mosaic.tiles if x == b})
    batch = batch_of(tiny_mosaic, name)
    with torch.no_grad():
        alone = module.encode(batch, ["rna"]).mean
        x = batch.x["adt"]
        changed = replace(batch, x=batch.x | {"adt": x.with_values(x.values * 7)}, cache={})
        assert torch.equal(module.encode(changed, ["rna"]).mean, alone)
        assert not torch.equal(module.encode(changed).mean, module.encode(batch).mean)


def test_standard_noise_correction() -> None:
    """u of every cell becomes the mean u of the batch nearest to the overall mean; c stays."""
    module = Midas(MidasConfig(**SMALL), layout(3, 3, rna=5))
    latent = torch.randn(30, 8)
    batch = torch.arange(30) % 3
    latent[:, 6:] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])[batch]
    corrected, code = module.corrected(latent, batch)
    assert torch.equal(corrected[:, :6], latent[:, :6])
    torch.testing.assert_close(corrected[:, 6:], torch.ones(30, 2))
    assert set(code.tolist()) == {1}


def test_mixed_minibatch_equals_its_parts(tiny_mosaic: Mosaic, module: Midas) -> None:
    """Modality sets a cell: the posterior of a cell does not depend on its neighbours in the minibatch."""
    module.eval()
    maker = MinibatchMaker(tiny_mosaic)
    cells = np.arange(0, tiny_mosaic.n_cells, 7)
    with torch.no_grad():
        together = module.encode(maker.make(cells))
        for row, cell in enumerate(cells[:12]):
            alone = module.encode(maker.make(np.array([cell])))
            torch.testing.assert_close(alone.mean[0], together.mean[row], rtol=1e-4, atol=1e-5)


def test_supports_says_its_limits() -> None:
    def pattern(**batches: tuple[str, ...]) -> Pattern:
        tiles = tuple(
            TilePattern(batch=b, modality=m, n_cells=6000, n_features=9) for b, ms in batches.items() for m in ms
        )
        used = {m for ms in batches.values() for m in ms}
        return Pattern(
            batches=tuple(batches),
            n_cells=dict.fromkeys(batches, 6000),
            n_features=dict.fromkeys(used, 9),
            tiles=tiles,
        )

    assert MidasConfig.supports(pattern(a=("rna", "adt"), b=("rna",))).level == "fits"
    diagonal = MidasConfig.supports(pattern(a=("rna",), b=("adt",)))
    assert diagonal.level == "limits"
    assert "bridges" in diagonal.reasons[0]
    assert MidasConfig.supports(pattern()).level == "cannot"
    assert MidasConfig.supports(pattern(a=("methylation",))).level == "cannot"


def test_the_table_of_methods() -> None:
    assert "midas" in names()
    assert get("midas").config is MidasConfig
    with pytest.raises(MosaicError) as caught:
        get("midass")
    assert "midas" in caught.value.hint
    with pytest.raises(MosaicError) as caught:
        MidasConfig.make("fast", max_epoch=3)
    assert caught.value.code == "model.unknown_setting"
    assert "max_epochs" in caught.value.hint


def test_atac_is_binarised_everywhere(module: Midas) -> None:
    values = torch.tensor([0.4, 1.0, 7.0])
    rows = TileRows(None, torch.tensor([0, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), values, 3, None)
    assert module._input("atac", rows).values.tolist() == [0.0, 1.0, 1.0]


def test_cells_shown_one_modality_keep_one_of_their_own() -> None:
    torch.manual_seed(0)
    present = torch.rand(40_000, 3) > 0.4
    present[~present.any(1), 0] = True
    kept = keep_some(present, 0.5)
    assert ((kept == 0) | (kept == 1)).all()
    assert (kept <= present).all()
    assert (kept.sum(1) >= 1).all()
    several = present.sum(1) > 1
    alone = (kept.sum(1) == 1) & several
    assert alone.sum() / several.sum() == pytest.approx(0.5, abs=0.03)
    full = several & ~alone
    assert torch.equal(kept[full], present[full].float())
    three = alone & (present.sum(1) == 3)
    torch.testing.assert_close(kept[three].mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert torch.equal(keep_some(present, 0.0), present.float())


def test_modality_dropout_changes_training_and_nothing_else(tiny_mosaic: Mosaic) -> None:
    torch.manual_seed(0)
    module = create("midas", MidasConfig(**SMALL, modality_dropout=1.0), Layout.of(tiny_mosaic))
    torch.manual_seed(0)
    plain = create("midas", MidasConfig(**SMALL), Layout.of(tiny_mosaic))
    batch = batch_of(tiny_mosaic, tiny_mosaic.batches[0])
    assert len(batch.x) > 1
    torch.manual_seed(1)
    one = module.train().loss(batch)
    torch.manual_seed(1)
    other = plain.train().loss(batch)
    assert float(one["kl_c"]) != float(other["kl_c"])
    batch.cache.clear()
    first = module.eval().encode(batch).mean
    batch.cache.clear()
    assert torch.equal(first, plain.eval().encode(batch).mean)
