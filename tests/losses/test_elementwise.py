from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.losses import HuberLoss, L1Loss, MSELoss
from ditty_di.processors import Context
from tests.losses import as_batch

LOSSES = [
    (MSELoss(mask_key="mask"), F.mse_loss),
    (L1Loss(mask_key="mask"), F.l1_loss),
    (HuberLoss(mask_key="mask", delta=0.3), lambda x, y: F.huber_loss(x, y, delta=0.3)),
]


@pytest.mark.parametrize("loss_fn, reference", LOSSES)
def test_the_mean_is_torch_s(loss_fn, reference):
    prediction, target = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    plain = type(loss_fn)(**({"delta": 0.3} if isinstance(loss_fn, HuberLoss) else {}))
    count = plain.num_valid(as_batch(target))
    assert count == 60
    loss, metrics = plain(prediction, as_batch(target), count)
    torch.testing.assert_close(loss, reference(prediction, target))
    assert metrics == {plain.metric: loss}


@pytest.mark.parametrize("loss_fn, reference", LOSSES)
def test_a_mask_of_positions_counts_their_elements(loss_fn, reference):
    """[B, L, 1] on [B, L, 5]: divided by the positions, the loss would be five times too large."""
    prediction, target = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    mask = torch.tensor([1, 0, 1, 1]).view(4, 1, 1).expand(4, 3, 1)
    ctx = Context(target=target, mask=mask)
    count = loss_fn.num_valid(as_batch(ctx))
    assert count == 3 * 3 * 5
    expected = reference(prediction[[0, 2, 3]], target[[0, 2, 3]])
    torch.testing.assert_close(loss_fn(prediction, as_batch(ctx), count)[0], expected)
    torch.testing.assert_close(loss_fn.compute(prediction, ctx).loss, expected)
    ctx["mask"] = mask.bool()
    torch.testing.assert_close(
        loss_fn(prediction, as_batch(ctx), loss_fn.num_valid(as_batch(ctx)))[0], expected
    )


def test_a_mask_may_hold_weights():
    prediction, target = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    ctx = Context(target=target, mask=torch.tensor([0.5, 0.0, 0.25]))
    loss_fn = MSELoss(mask_key="mask")
    count = loss_fn.num_valid(as_batch(ctx))
    assert count == 0.75
    loss, _ = loss_fn(prediction, as_batch(ctx), count)
    torch.testing.assert_close(loss, torch.tensor((0.5 * 1 + 0.25 * 9) / 0.75))
    assert loss.dtype == torch.float32


def test_masked_targets_may_be_nan():
    prediction = torch.ones(2, 2, requires_grad=True)
    target = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan]])
    ctx = Context(target=target, mask=~target.isnan())
    loss_fn = MSELoss(mask_key="mask")
    loss, _ = loss_fn(prediction, as_batch(ctx), loss_fn.num_valid(as_batch(ctx)))
    loss.backward()
    assert loss == 1
    assert torch.equal(prediction.grad, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 6), cut=st.integers(1, 5), seed=st.integers(0, 9))
def test_parts_of_a_ragged_batch_add_up(rows, cut, seed):
    cut = min(cut, rows - 1)
    torch.manual_seed(seed)
    prediction = torch.randn(rows, 3, 5, requires_grad=True)
    target, mask = torch.randn(rows, 3, 5), torch.rand(rows, 3, 1) < 0.6
    loss_fn = MSELoss(mask_key="mask")
    whole = Context(target=target, mask=mask)
    parts = [Context(target=target[r], mask=mask[r]) for r in (slice(0, cut), slice(cut, None))]
    count = loss_fn.num_valid(as_batch(whole))
    assert sum(loss_fn.num_valid(as_batch(part)) for part in parts) == count
    if not count:
        return
    loss, metrics = loss_fn(prediction, as_batch(whole), count)
    (gradient,) = torch.autograd.grad(loss, prediction)
    shares = [
        loss_fn(p, as_batch(c), count)
        for p, c in zip(prediction.split([cut, rows - cut]), parts, strict=True)
    ]
    (summed,) = torch.autograd.grad(sum(share for share, _ in shares), prediction)
    torch.testing.assert_close(summed, gradient, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(m["mse"] for _, m in shares), metrics["mse"], rtol=1e-6, atol=0)


def test_shapes_that_would_broadcast_are_refused():
    """[8, 1] against [8] would compare every row with every other."""
    with pytest.raises(ValueError, match=r"shape \[8, 1\] and ctx.target \[8\]"):
        MSELoss()(torch.ones(8, 1), as_batch(torch.ones(8)), torch.tensor(8))
    for shape in ((8,), (8, 2), (1, 8, 3)):
        ctx = Context(target=torch.ones(8, 3), mask=torch.ones(shape))
        with pytest.raises(ValueError, match="cannot mask a target"):
            MSELoss(mask_key="mask").num_valid(as_batch(ctx))


def test_half_precision_is_compared_in_float32():
    loss, _ = MSELoss()(
        torch.ones(2).bfloat16(), as_batch(torch.zeros(2).bfloat16()), torch.tensor(2)
    )
    assert loss.dtype == torch.float32


def test_contracts_and_arguments():
    assert str(HuberLoss(output_index=1, target_key="noise", mask_key="m").contract) == (
        "1:n:f | ctx.noise:n:f, ctx.m:n -> loss:0:f"
    )
    with pytest.raises(ValueError, match="delta=0"):
        HuberLoss(delta=0)


def test_a_target_that_comes_too_late_to_be_counted_is_named():
    loss = MSELoss(target_key="later")
    batch = {"input": torch.ones(2, 3)}
    with pytest.raises(KeyError, match=r"no .later.; .*before the model runs"):
        loss.num_valid(as_batch(Context(target=torch.ones(2)), batch))
