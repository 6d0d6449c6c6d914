"""Negative binomial losses against torch.distributions in float64, at zeros and at non-zeros, masked and broadcast."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import NegativeBinomial as Reference

from headless.data.minibatch import TileRows
from headless.models.count_likelihoods import NegativeBinomial, ZeroInflatedNB
from headless.models.likelihoods import SquaredError, log_factorial

N, D = 7, 11


def tile(values: np.ndarray, mask: torch.Tensor | None = None) -> TileRows:
    rows = sp.csr_matrix(values.astype(np.float32))
    rows.sort_indices()
    return TileRows(
        None,
        torch.from_numpy(rows.indptr.astype(np.int64)),
        torch.from_numpy(rows.indices),
        torch.from_numpy(rows.data),
        values.shape[1],
        mask,
    )


@pytest.fixture
def counts() -> np.ndarray:
    random = np.random.default_rng(3)
    return random.poisson(2.0, (N, D)) * random.integers(0, 2, (N, D))


def masks() -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    one = (torch.rand(D, generator=generator) > 0.4).float()
    return [None, one, (torch.rand(N, D, generator=generator) > 0.4).float()]


SHAPES = [(N, D), (D,), (N, 1), (1, 1)]


@pytest.mark.parametrize("mask", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inflated", [False, True])
def test_value_and_gradients_equal_torch_distributions(counts, shape, mask, inflated):
    random = torch.Generator().manual_seed(7)
    chosen = masks()[mask]
    if chosen is not None:
        counts = counts * chosen.numpy().astype(int)  # a feature that was not measured stores nothing
    log_r = torch.randn(shape, generator=random)
    logits, gate = torch.randn(N, D, generator=random), torch.randn(N, D, generator=random)
    ours = [value.clone().requires_grad_() for value in (log_r, logits, gate)]
    x = tile(counts, chosen)
    law = (
        ZeroInflatedNB(ours[0].exp(), ours[1], ours[2]) if inflated else NegativeBinomial(ours[0].exp(), ours[1])
    )
    found = law.nll(x)
    law.loss(x).backward()

    theirs = [value.double().requires_grad_() for value in (log_r, logits, gate)]
    target = torch.from_numpy(counts).double()
    log_p = Reference(total_count=theirs[0].exp(), logits=theirs[1]).log_prob(target)
    if inflated:
        zero = torch.logaddexp(torch.nn.functional.logsigmoid(theirs[2]),
                               torch.nn.functional.logsigmoid(-theirs[2]) + log_p)  # fmt: skip
        log_p = torch.where(target == 0, zero, torch.nn.functional.logsigmoid(-theirs[2]) + log_p)
    expected = -(log_p if chosen is None else log_p * chosen).sum()
    expected.backward()

    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, reference in zip(ours[: 3 if inflated else 2], theirs, strict=False):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_known_answers():
    # scMM's sheet: R 2.5, p 0.3; Multigrate's and scVAEIT's: mean 3, theta 2 (phi 0.5).
    zero, four, five = tile(np.array([[0]])), tile(np.array([[4]])), tile(np.array([[5]]))
    law = NegativeBinomial(torch.tensor([[2.5]]), torch.tensor([[math.log(0.3 / 0.7)]]))
    assert float(law.nll(zero)) == pytest.approx(0.891687, abs=1e-5)
    assert float(law.nll(four)) == pytest.approx(3.5078, abs=1e-4)
    by_mean = NegativeBinomial.of_mean(torch.tensor([[math.log(3.0)]]), torch.tensor([math.log(2.0)]))
    assert float(by_mean.nll(zero)) == pytest.approx(1.832581, abs=1e-5)
    assert float(by_mean.nll(five)) == pytest.approx(2.5950, abs=1e-4)
    assert float(by_mean.mean) == pytest.approx(3.0)
    gated = ZeroInflatedNB(law.total_count, law.logits, torch.tensor([[math.log(0.2 / 0.8)]]))
    assert float(gated.nll(zero)) == pytest.approx(0.638714, abs=1e-5)
    assert float(gated.mean) == pytest.approx(0.8 * 2.5 * 0.3 / 0.7)


def test_no_gate_is_the_plain_law(counts):
    r, logits = torch.full((N, D), 1.7), torch.full((N, D), -0.3)
    closed = ZeroInflatedNB(r, logits, torch.full((N, D), -40.0))
    assert float(closed.nll(tile(counts))) == pytest.approx(float(NegativeBinomial(r, logits).nll(tile(counts))))


def test_great_theta_approaches_poisson():
    mean = torch.tensor([[0.5, 3.0, 8.0]])
    values = np.array([[0, 2, 11]])
    found = NegativeBinomial.of_mean(mean.log(), torch.full((3,), math.log(3e4))).nll(tile(values))
    expected = -torch.distributions.Poisson(mean).log_prob(torch.from_numpy(values)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-2)


def test_draws_have_the_mean_and_variance_of_the_law():
    generator = torch.Generator().manual_seed(1)
    law = NegativeBinomial(torch.full((40_000, 1), 2.5), torch.zeros(40_000, 1))
    drawn = law.sample(generator)
    assert float(drawn.mean()) == pytest.approx(2.5, abs=0.06)
    assert float(drawn.var()) == pytest.approx(5.0, abs=0.25)  # R p / (1 - p)^2
    again = law.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


def test_log_factorial_of_small_great_and_broken_numbers():
    for values in ([0.0, 1, 5, 170], [3.0, 5000], [0.5, 2]):
        x = torch.tensor(values)
        torch.testing.assert_close(log_factorial(x), torch.lgamma(x + 1))


def test_squared_error_reports_on_the_scale_of_the_data(counts):
    x = tile(counts)
    fitted = torch.log1p(torch.from_numpy(counts).float()) + 0.5
    law = SquaredError(fitted, lambda rows: rows.with_values(torch.log1p(rows.values)), torch.expm1)
    assert float(law.loss(x)) == pytest.approx(0.25 * N * D, rel=1e-5)
    torch.testing.assert_close(law.mean, torch.expm1(fitted))
