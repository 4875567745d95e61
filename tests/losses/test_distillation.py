from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from ditty_di.losses import CompositeLoss, CrossEntropyCalculator, DistillationLoss
from ditty_di.processors import Context
from tests.losses import as_batch
from tests.losses.test_composite import ROWS, check_splits


def batch(seed=0, rows=6):
    torch.manual_seed(seed)
    labels = torch.randint(0, 7, (rows, 4))
    labels[torch.rand(rows, 4) < 0.4] = -100
    labels[0, 0] = 1
    student = torch.randn(rows, 4, 7, requires_grad=True)
    return student, Context(target=labels, teacher_logits=torch.randn(rows, 4, 7))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_divergences_are_those_of_torch_s_distributions(temperature, weights):
    student, ctx = batch()
    valid = ctx["target"] != -100
    p = Categorical(logits=ctx["teacher_logits"][valid] / temperature)
    q = Categorical(logits=student[valid] / temperature)
    forward, backward = kl_divergence(p, q).mean(), kl_divergence(q, p).mean()
    loss_fn = DistillationLoss(
        forward_weight=weights[0], backward_weight=weights[1], temperature=temperature
    )
    count = loss_fn.num_valid(as_batch(ctx))
    assert count == valid.sum()
    loss, metrics = loss_fn(student, as_batch(ctx), count)
    expected = temperature**2 * (weights[0] * forward + weights[1] * backward)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, value, weight in zip(("forward_kl", "backward_kl"), (forward, backward), weights,
                                   strict=True):  # fmt: skip
        assert (name in metrics) == (weight > 0)
        if weight:
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", ROWS)
def test_a_composite_with_cross_entropy_splits_any_way(splits):
    student, ctx = batch()
    loss_fn = CompositeLoss(
        [
            (CrossEntropyCalculator(), 0.5),
            (DistillationLoss(temperature=2.0, backward_weight=0.5), 0.5),
        ]
    )
    check_splits(loss_fn, (student,), ctx, splits)


def test_without_labels_every_position_weighs():
    student, ctx = batch()
    del ctx["target"]
    loss_fn = DistillationLoss(labels=False)
    assert loss_fn.num_valid(as_batch(ctx)) == 24
    masked = DistillationLoss(labels=False, mask_key="mask", shift=True)
    ctx["mask"] = torch.ones(6, 4)
    ctx["mask"][0] = 0
    assert masked.num_valid(as_batch(ctx)) == 5 * 3
    whole = DistillationLoss(labels=False, shift=True)
    assert whole.num_valid(as_batch(ctx)) == 6 * 3
    loss, _ = loss_fn(student, as_batch(ctx), torch.tensor(24.0))
    p, q = Categorical(logits=ctx["teacher_logits"]), Categorical(logits=student)
    torch.testing.assert_close(loss, kl_divergence(p, q).mean())


def test_shifted_labels_weigh_the_position_before():
    student, ctx = batch()
    shifted = Context(ctx)
    padding = torch.full((6, 1), -100)
    shifted["target"] = torch.cat([ctx["target"][:, 1:], padding], 1)
    inside, outside = DistillationLoss(shift=True), DistillationLoss()
    count = inside.num_valid(as_batch(ctx))
    assert count == outside.num_valid(as_batch(shifted))
    torch.testing.assert_close(
        inside(student, as_batch(ctx), count), outside(student, as_batch(shifted), count)
    )


def test_no_gradient_reaches_the_teacher():
    student, ctx = batch()
    ctx["teacher_logits"].requires_grad_()
    loss_fn = DistillationLoss(backward_weight=1.0)
    loss_fn(student, as_batch(ctx), loss_fn.num_valid(as_batch(ctx)))[0].backward()
    assert ctx["teacher_logits"].grad is None
    assert student.grad.any()


def test_errors():
    student, ctx = batch()
    with pytest.raises(ValueError, match=r"\[6, 4, 6\] and the teacher's \[6, 4, 7\]"):
        DistillationLoss()(student[..., :6], as_batch(ctx), torch.tensor(1.0))
    with pytest.raises(KeyError, match="no 'teacher_logits'"):
        DistillationLoss()(student, as_batch(ctx["target"]), torch.tensor(1.0))
    with pytest.raises(ValueError, match="temperature=0"):
        DistillationLoss(temperature=0)
    with pytest.raises(ValueError, match="not 0 for both"):
        DistillationLoss(forward_weight=0)


def test_its_contract_reads_the_teacher():
    text = str(DistillationLoss(output_index="logits").contract)
    assert text == "logits:n+1:f | ctx.teacher_logits:n+1:f, ctx.target:n:i64 -> loss:0:f"
    assert "target" not in str(DistillationLoss(labels=False).contract)
