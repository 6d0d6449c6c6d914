"""Losses at the non-zeros only, against torch.distributions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from headless.data.minibatch import TileRows
from headless.models.blocks import ChunkedSparseLinear, SparseLinear, _MishDropout, mish_dropout
from headless.models.likelihoods import Bernoulli, Poisson


def rows_of(dense: np.ndarray, mask: torch.Tensor | None = None) -> TileRows:
    matrix = sp.csr_matrix(dense.astype(np.float32))
    return TileRows(
        None,
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices),
        torch.from_numpy(matrix.data),
        matrix.shape[1],
        mask,
    )


@pytest.mark.parametrize("kind", ["poisson", "bernoulli"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_agree_with_torch(kind: str, masked: bool) -> None:
    random = np.random.default_rng(1)
    x = random.poisson(0.4, (9, 13)).astype(float)
    mask = torch.from_numpy((random.random(13) < 0.7).astype(np.float32)) if masked else None
    if mask is not None:
        x = x * mask.numpy()
    if kind == "bernoulli":
        x = (x > 0).astype(float)
    eta = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    reference = (
        torch.distributions.Poisson(eta.exp()) if kind == "poisson" else torch.distributions.Bernoulli(logits=eta)
    ).log_prob(torch.from_numpy(x))
    weight = torch.ones(13, dtype=torch.float64) if mask is None else mask.double()
    expected = -(reference * weight).sum()
    expected.backward()
    ours = eta.detach().float().requires_grad_()
    likelihood = Poisson(ours) if kind == "poisson" else Bernoulli(ours)
    rows = rows_of(x, mask)
    found = likelihood.nll(rows)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    likelihood.loss(rows).backward()
    torch.testing.assert_close(ours.grad.double(), eta.grad, rtol=1e-5, atol=1e-5)


def test_poisson_known_answers() -> None:
    for x, expected in ((0, 1.64872), (1, 1.14872), (3, 1.94048)):
        found = Poisson(torch.tensor([[0.5]])).nll(rows_of(np.array([[float(x)]]))).item()
        assert found == pytest.approx(expected, abs=1e-5)


def test_mean_and_draws() -> None:
    log_rate = torch.full((4000, 1), 1.2)
    drawn = Poisson(log_rate).sample(torch.Generator().manual_seed(0))
    assert torch.equal(drawn, Poisson(log_rate).sample(torch.Generator().manual_seed(0)))
    assert drawn.mean().item() == pytest.approx(Poisson(log_rate).mean[0].item(), rel=0.05)
    open_peaks = Bernoulli(torch.full((4000, 1), -1.0)).sample(torch.Generator().manual_seed(0))
    assert set(open_peaks.unique().tolist()) == {0.0, 1.0}
    assert open_peaks.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item(), abs=0.03)


def test_mish_agrees_with_torch_both_ways() -> None:
    x = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    _MishDropout.apply(x, 0.0).sum().backward()
    gradient, x.grad = x.grad.clone(), None
    expected = torch.nn.functional.mish(x)
    expected.sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_MishDropout.apply(x, 0.0), expected, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_its_share_and_the_expectation() -> None:
    torch.manual_seed(0)
    x = torch.full((400, 500), 2.0)
    y = mish_dropout(x, 0.2, training=True)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert y.mean().item() == pytest.approx(torch.nn.functional.mish(x).mean().item(), rel=0.01)
    assert torch.equal(mish_dropout(x, 0.2, training=False), torch.nn.functional.mish(x))


def test_sparse_layers_equal_dense_ones() -> None:
    torch.manual_seed(0)
    dense = np.random.default_rng(0).poisson(0.05, (11, 30)).astype(float)
    rows, x = rows_of(dense), torch.from_numpy(dense).float()
    layer = SparseLinear(30, 8)
    chunked = ChunkedSparseLinear((10, 5, 15), 4)
    assert len(rows.values) / dense.size < SparseLinear.sparse_below
    expected = x @ layer.weight + layer.bias
    torch.testing.assert_close(layer(rows), expected)
    parts = [p @ w for p, w in zip(x.split([10, 5, 15], 1), chunked.weight.split([10, 5, 15], 0), strict=True)]
    torch.testing.assert_close(chunked(rows), torch.stack(parts, 1) + chunked.bias)
    upstream = torch.randn(11, 8)
    (gradient,) = torch.autograd.grad(layer(rows), layer.weight, upstream)
    torch.testing.assert_close(gradient, x.T @ upstream)
