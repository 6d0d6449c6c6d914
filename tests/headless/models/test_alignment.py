"""Maximum mean discrepancy: known answers of the sheets, invariances, gradients against autograd."""

from __future__ import annotations

import pytest
import torch

from headless.models.alignment import GAMMAS, INVERSE_GAMMAS, mmd

CLOUDS = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
TWO = torch.tensor([0, 0, 1, 1])


def naive(z: torch.Tensor, groups: torch.Tensor, gammas: tuple[float, ...]) -> torch.Tensor:
    """Pair by pair, cell by cell, in float64."""

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        distance = (a[:, None] - b[None]).square().sum(2)
        return torch.stack([torch.exp(-gamma * distance).mean() for gamma in gammas]).mean()

    clouds = [z[groups == code] for code in torch.unique(groups)]
    clouds = [cloud for cloud in clouds if len(cloud) > 1]
    total = z.new_zeros(())
    for i, a in enumerate(clouds):
        for b in clouds[i + 1 :]:
            total = total + mean(a, a) + mean(b, b) - 2 * mean(a, b)
    return total


def test_known_answers():
    assert float(mmd(CLOUDS, TWO)) == pytest.approx(0.728100, abs=1e-5)  # Multigrate's kernels
    assert float(mmd(CLOUDS, TWO, INVERSE_GAMMAS)) == pytest.approx(0.470103, abs=1e-5)  # scVAEIT's


def test_identical_clouds_symmetric_and_bounded():
    z = torch.randn(20, 4)
    twice, groups = torch.cat([z, z]), torch.arange(2).repeat_interleave(20)
    assert float(mmd(twice, groups)) == pytest.approx(0, abs=1e-6)
    other = torch.cat([z, z + 100])
    assert float(mmd(other, groups)) == pytest.approx(float(mmd(other, 1 - groups)))
    assert 0 < float(mmd(other, groups)) < 2


def test_a_group_of_one_cell_and_a_single_group_give_nothing():
    z = torch.randn(5, 3)
    assert float(mmd(z, torch.tensor([0, 0, 0, 0, 1]))) == 0
    assert float(mmd(z, torch.zeros(5, dtype=torch.long))) == 0
    three = torch.cat([z, torch.randn(1, 3)])
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    assert float(mmd(three, groups)) == pytest.approx(float(mmd(three[:5], groups[:5])), rel=1e-5)


def test_order_of_cells_does_not_matter():
    z, groups = torch.randn(30, 3), torch.randint(0, 3, (30,))
    order = torch.randperm(30)
    assert float(mmd(z, groups, average=True)) == pytest.approx(float(mmd(z, groups)) / 3)
    assert float(mmd(z[order], groups[order])) == pytest.approx(float(mmd(z, groups)), rel=1e-5)


@pytest.mark.parametrize("gammas", [GAMMAS, INVERSE_GAMMAS])
def test_value_and_gradient_equal_the_slow_way(gammas):
    torch.manual_seed(1)
    groups = torch.randint(0, 4, (40,))
    z = (0.3 * torch.randn(40, 5)).requires_grad_()
    slow = z.detach().double().requires_grad_()
    value, expected = mmd(z, groups, gammas), naive(slow, groups, gammas)
    value.backward()
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert z.grad is not None
    assert slow.grad is not None
    torch.testing.assert_close(z.grad.double(), slow.grad, rtol=1e-3, atol=1e-5)
