from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ditty_di.losses import CompositeLoss, CrossEntropyCalculator, CrossEntropyLoss, L1Loss, MSELoss
from ditty_di.processors import Context
from tests.losses import as_batch


class Learned(MSELoss):
    """A loss with a parameter of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def elements(self, prediction, target):
        return super().elements(prediction * self.scale, target)


def heads(rows=6, seed=0):
    torch.manual_seed(seed)
    tokens = torch.randint(0, 7, (rows, 4))
    tokens[torch.rand(rows, 4) < 0.4] = -100
    tokens[0, 0] = 3
    mask = torch.rand(rows, 4, 1) < 0.6
    mask[0, 0] = True
    output = (
        torch.randn(rows, 4, 7, requires_grad=True),
        torch.randn(rows, 4, 5, requires_grad=True),
    )
    return output, Context(target=tokens, values=torch.randn(rows, 4, 5), mask=mask)


def cut(output, ctx, rows):
    return tuple(o[rows] for o in output), Context({k: v[rows] for k, v in ctx.items()})


def two_headed(kind=CompositeLoss, **options):
    return kind(
        [
            (CrossEntropyCalculator(output_index=0), 1.0),
            (MSELoss(output_index=1, target_key="values", mask_key="mask"), 0.5),
        ],
        **options,
    )


def check_splits(loss_fn, output, ctx, splits, tolerance=1e-6):
    """N x 1 equals 1 x N: loss, every metric, every gradient."""
    count = loss_fn.num_valid(as_batch(ctx))
    trained = [*output, *loss_fn.parameters()]
    loss, metrics = loss_fn(output, as_batch(ctx), count)
    gradients = torch.autograd.grad(loss, trained)
    parts = [cut(output, ctx, rows) for rows in splits]
    torch.testing.assert_close(sum(loss_fn.num_valid(as_batch(c)) for _, c in parts), count)
    shares = [loss_fn(o, as_batch(c), count) for o, c in parts]
    summed = torch.autograd.grad(sum(share for share, _ in shares), trained)
    options = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(sum(share for share, _ in shares), loss, **options)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in shares), value, **options, msg=name)
    for one, many in zip(gradients, summed, strict=True):
        torch.testing.assert_close(many, one, **options)
    return metrics


ROWS = [[slice(i, i + 1) for i in range(6)], [slice(0, 1), slice(1, 6)], [slice(0, 4), slice(4, 6)]]


@pytest.mark.parametrize("splits", ROWS)
@pytest.mark.parametrize("seed", range(3))
def test_token_cross_entropy_and_element_wise_mse_split_any_way(splits, seed):
    output, ctx = heads(seed=seed)
    metrics = check_splits(two_headed(), output, ctx, splits)
    valid = ctx["target"] != -100
    picked = output[0][valid].log_softmax(-1).gather(1, ctx["target"][valid][:, None])
    torch.testing.assert_close(metrics["cross_entropy_calculator/ce"], -picked.mean())
    error = (output[1] - ctx["values"])[ctx["mask"].expand(-1, -1, 5)]
    torch.testing.assert_close(metrics["mse_loss/mse"], error.square().mean())
    torch.testing.assert_close(
        metrics["total"],
        metrics["cross_entropy_calculator/loss"] + 0.5 * metrics["mse_loss/loss"],
    )


def test_each_part_is_divided_by_what_it_counts_itself():
    _, ctx = heads()
    count = two_headed().num_valid(as_batch(ctx))
    assert count.tolist() == [(ctx["target"] != -100).sum(), ctx["mask"].sum() * 5]
    assert count.device.type == "cpu"


def test_a_part_with_nothing_to_count_in_the_whole_window_adds_nothing():
    output, ctx = heads()
    ctx["target"] = torch.full_like(ctx["target"], -100)
    loss_fn = two_headed()
    count = loss_fn.num_valid(as_batch(ctx))
    loss, metrics = loss_fn(output, as_batch(ctx), count)
    torch.testing.assert_close(loss, 0.5 * metrics["mse_loss/mse"])
    loss.backward()
    assert not output[0].grad.any()


def test_losses_of_one_class_keep_their_metrics_apart():
    loss_fn = CompositeLoss([(MSELoss(name=n), 1) for n in (None, None, "a", "a", "a_2", None)])
    assert [name for name, _ in loss_fn.parts] == [
        "mse_loss", "mse_loss_2", "a", "a_2", "a_2_2", "mse_loss_3"
    ]  # fmt: skip
    _, metrics = loss_fn(torch.ones(3), as_batch(torch.zeros(3)), torch.full((6,), 3.0))
    assert len([name for name in metrics if name.endswith("/mse")]) == 6


def test_parameters_of_parts_are_those_of_the_composite():
    loss_fn = CompositeLoss([(Learned(name="a"), 1.0), (Learned(name="b"), 2.0), (L1Loss(), 1)])
    assert [n for n, _ in loss_fn.named_parameters()] == ["part_a.scale", "part_b.scale"]
    other = copy.deepcopy(loss_fn)
    with torch.no_grad():
        loss_fn.part_a.scale.fill_(7)
    assert other.parts[0][1].scale == 2
    other.load_state_dict(loss_fn.state_dict())
    assert other.parts[0][1].scale == 7
    check = torch.randn(4, requires_grad=True)
    loss_fn(check, as_batch(torch.zeros(4)), torch.full((3,), 4.0))[0].backward()
    assert all(p.grad is not None for p in loss_fn.parameters())


def test_a_weight_of_0_skips_the_part_entirely():
    class Never(Learned):
        def num_valid(self, batch):
            raise AssertionError

        forward = compute = num_valid

    loss_fn = CompositeLoss([(Never(), 0), (MSELoss(), 1)])
    assert not list(loss_fn.parameters())
    assert loss_fn.num_valid(as_batch(torch.ones(3))).tolist() == [3]
    _, metrics = loss_fn(torch.ones(3), as_batch(torch.zeros(3)), torch.tensor([3.0]))
    assert set(metrics) == {"mse_loss/loss", "mse_loss/mse", "total"}


def test_losses_on_labels_alone_get_the_target():
    output, ctx = heads()
    plain = CompositeLoss([(CrossEntropyLoss(), 1.0)])
    count = plain.num_valid(as_batch(ctx))
    logits = output[0]
    assert (
        plain(logits, as_batch(ctx), count)[0]
        == CrossEntropyLoss()(logits, as_batch(ctx["target"]), count[0])[0]
    )
    assert (
        plain(logits, as_batch(ctx["target"]), count)[0] == plain(logits, as_batch(ctx), count)[0]
    )


@pytest.mark.parametrize("splits", ROWS)
def test_composites_within_composites(splits):
    output, ctx = heads()
    inner = two_headed(name="inner")
    l1 = L1Loss(output_index=1, target_key="values")
    loss_fn = CompositeLoss([(l1, 1.0), (inner, 3.0), (CompositeLoss([(l1, 2.0)]), 1.0)])
    assert loss_fn.num_valid(as_batch(ctx)).shape == (4,)
    metrics = check_splits(loss_fn, output, ctx, splits)
    assert "inner/mse_loss/mse" in metrics
    expected = 3 * metrics["l1_loss/l1"] + 3 * metrics["inner/total"]
    torch.testing.assert_close(metrics["total"], expected)


@pytest.mark.parametrize(
    "losses, says",
    [
        ([], "a part whose weight is not 0"),
        ([(MSELoss(), 0)], "a part whose weight is not 0"),
        ([(MSELoss(), -1)], "mse_loss has weight -1"),
        ([(MSELoss(), float("nan"))], "has weight nan"),
        ([MSELoss()], "pairs of a loss and its weight"),
        ([(MSELoss(), "much")], "pairs of a loss and its weight"),
        ([(MSELoss(name="a.b"), 1)], "'a.b' cannot name a part"),
    ],
)
def test_what_is_no_composite(losses, says):
    with pytest.raises(ValueError, match=says):
        CompositeLoss(losses)
