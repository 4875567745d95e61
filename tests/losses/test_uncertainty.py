from __future__ import annotations

import math

import pytest
import torch

from ditty_di.losses import MSELoss, UncertaintyWeightedLoss
from ditty_di.processors import Context
from tests.losses import as_batch
from tests.losses.test_composite import ROWS, check_splits, heads, two_headed


def test_the_formula():
    output, ctx = heads()
    loss_fn = two_headed(UncertaintyWeightedLoss)
    with torch.no_grad():
        loss_fn.log_variances.copy_(torch.tensor([0.3, -0.7]))
    loss, metrics = loss_fn(output, as_batch(ctx), loss_fn.num_valid(as_batch(ctx)))
    expected = (
        math.exp(-0.3) * metrics["cross_entropy_calculator/loss"]
        + 0.5 * math.exp(0.7) * metrics["mse_loss/loss"]
        + (0.3 - 0.7) / 2
    )
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(metrics["mse_loss/log_variance"], torch.tensor(-0.7))


@pytest.mark.parametrize("splits", ROWS)
def test_any_split_gives_the_same_gradients_also_of_the_variances(splits):
    output, ctx = heads()
    check_splits(two_headed(UncertaintyWeightedLoss, log_variance=0.4), output, ctx, splits)


def test_the_learned_variance_is_that_of_the_residuals():
    """With w = 1/2 the optimum of s is log(mean squared error), the noise's own log variance."""
    torch.manual_seed(0)
    target = 3.0 * torch.randn(2000)
    loss_fn = UncertaintyWeightedLoss([(MSELoss(), 0.5)])
    for _ in range(100):
        loss, _ = loss_fn(torch.zeros(2000), as_batch(target), torch.tensor([2000.0]))
        (gradient,) = torch.autograd.grad(loss, [loss_fn.log_variances])
        with torch.no_grad():
            loss_fn.log_variances -= 0.5 * gradient
    torch.testing.assert_close(
        loss_fn.log_variances.detach(), target.square().mean().log()[None], rtol=1e-2, atol=0
    )


def test_its_parameters_are_registered_and_saved():
    loss_fn = two_headed(UncertaintyWeightedLoss)
    assert [n for n, _ in loss_fn.named_parameters()] == ["log_variances"]
    assert loss_fn.log_variances.shape == (2,)
    assert "log_variances" in loss_fn.state_dict()


def test_a_part_without_anything_to_count_leaves_its_variance_alone():
    output, ctx = heads()
    ctx["target"] = torch.full_like(ctx["target"], -100)
    loss_fn = two_headed(UncertaintyWeightedLoss)
    loss_fn(output, as_batch(Context(ctx)), loss_fn.num_valid(as_batch(ctx)))[0].backward()
    assert loss_fn.log_variances.grad[0] == 0
    assert loss_fn.log_variances.grad[1] != 0
