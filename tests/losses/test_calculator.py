from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ditty_di.losses import CrossEntropyCalculator, CrossEntropyLoss, LossCalculator, LossOutput
from ditty_di.processors import Context
from ditty_di.processors.outputs import predicted
from tests.losses import as_batch


class RowMean(LossCalculator):
    """As a user writes one: `compute` alone, with a number among its metrics."""

    def compute(self, model_output, ctx):
        loss = (self.get_prediction(model_output) - self.get_target(ctx)).abs().mean()
        return LossOutput(loss=loss, metrics={"own": loss.item(), "two": 2})


def test_a_user_s_mean_weighs_by_rows():
    loss_fn = RowMean()
    prediction, target = torch.randn(7, 3), torch.randn(7, 3)
    count = loss_fn.num_valid(as_batch(target))
    assert (count, count.shape) == (7, ())
    whole, metrics = loss_fn(prediction, as_batch(Context(target=target)), count)
    parts = [
        loss_fn(prediction[a:b], as_batch(Context(target=target[a:b])), count)
        for a, b in ((0, 2), (2, 7))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(parts[0][1]["own"] + parts[1][1]["own"], metrics["own"])
    assert parts[0][1]["two"] + parts[1][1]["two"] == 2
    torch.testing.assert_close(whole, (prediction - target).abs().mean())


def test_rows_of_the_input_where_the_target_is_not_there_yet():
    loss_fn = RowMean(target_key="made_later")
    inputs = {"input": torch.ones(5, 2)}
    ctx = Context(target=torch.ones(5), original_batch=(inputs, torch.ones(5)))
    assert loss_fn.num_valid(as_batch(ctx, inputs)) == 5
    assert loss_fn.num_valid(as_batch(torch.ones(4), inputs)) == 5  # labels, but no such target


def test_plain_labels_are_the_target():
    loss_fn = RowMean()
    prediction, target = torch.randn(4, 3), torch.randn(4, 3)
    count = torch.tensor(4.0)
    assert (
        loss_fn(prediction, as_batch(target), count)[0]
        == loss_fn(prediction, as_batch(Context(target=target)), count)[0]
    )
    batch = as_batch(target)
    assert batch.context == {} and batch.full_context()["target"] is target
    assert batch.target is target and as_batch(Context(target=target)).target is target


def test_where_the_prediction_is():
    a, b = torch.zeros(1), torch.ones(1)
    from transformers.modeling_outputs import CausalLMOutput

    assert predicted(a, 0) is a
    assert predicted((a, b), 1) is b
    assert predicted([a, b], 0) is a
    assert predicted({"x": a, "logits": b}, "logits") is b
    assert predicted({"x": a, "logits": b}, 1) is b
    assert predicted(SimpleNamespace(logits=b), "logits") is b
    assert predicted(CausalLMOutput(loss=a, logits=b), "logits") is b
    assert predicted(CausalLMOutput(loss=a, logits=b), 1) is b


@pytest.mark.parametrize(
    "output, index, says",
    [
        # rows of a tensor would be taken for outputs, and train on the second row alone
        (torch.zeros(3, 2), 1, "output_index=1: the model returned one tensor"),
        ((torch.zeros(1),), 1, "tuple of 1 values"),
        ({"a": 1}, "logits", "dict with a"),
        (torch.zeros(3, 2), "shape", "output_index='shape': the model returned Tensor"),
        (SimpleNamespace(scores=1), "logits", "SimpleNamespace with scores"),
        (SimpleNamespace(scores=1), 0, "SimpleNamespace of no values"),
    ],
)
def test_a_prediction_that_is_not_there_is_explained(output, index, says):
    with pytest.raises(LookupError, match=says):
        predicted(output, index)


def test_missing_targets_and_masks_are_named():
    loss_fn = RowMean(target_key="noise", mask_key="forward_kwargs.mask")
    ctx = Context(target=1, forward_kwargs={"mask": 3})
    assert loss_fn.get_mask(ctx) == 3
    with pytest.raises(KeyError, match=r"no 'noise'.*it has target"):
        loss_fn.get_target(ctx)
    with pytest.raises(KeyError, match="has no 'mask'"):
        loss_fn.get_mask(Context(forward_kwargs={}))
    assert RowMean().get_mask(Context()) is None
    assert RowMean(target_key="forward_kwargs.mask").get_target(ctx) == 3


def test_a_loss_without_compute_says_so():
    with pytest.raises(NotImplementedError, match="LossCalculator has no compute"):
        LossCalculator()(torch.ones(1), as_batch(torch.ones(1)), torch.tensor(1))
    with pytest.raises(ValueError, match="from the front"):
        RowMean(output_index=-1)


# -- cross-entropy --------------------------------------------------------------------------------


def test_cross_entropy_of_the_second_output_by_valid_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :3] = -100
    ctx = Context(words=labels)
    loss_fn = CrossEntropyCalculator(output_index=1, target_key="words")
    count = loss_fn.num_valid(as_batch(ctx))
    assert count == 12
    loss, metrics = loss_fn((None, logits), as_batch(ctx), count)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(metrics["ce"], loss)
    plain, _ = CrossEntropyLoss()(logits, as_batch(labels), count)
    torch.testing.assert_close(loss, plain)


def test_cross_entropy_shifted_and_masked():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    mask = torch.ones(2, 6).bool()
    mask[0, :4] = False
    loss_fn = CrossEntropyCalculator(shift=True, mask_key="mask")
    ctx = Context(target=tokens, mask=mask)
    count = loss_fn.num_valid(as_batch(ctx))
    assert count == 2 + 5
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        tokens.masked_fill(~mask, -100)[:, 1:].flatten(),
    )
    torch.testing.assert_close(loss_fn(logits, as_batch(ctx), count)[0], expected)
    with pytest.raises(ValueError, match=r"ctx.mask has shape \[2, 5\]"):
        loss_fn.num_valid(as_batch(Context(target=tokens, mask=mask[:, 1:])))


def test_a_batch_without_a_valid_label_weighs_nothing():
    labels = torch.full((2, 3), -100)
    loss_fn = CrossEntropyCalculator()
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss, _ = loss_fn(logits, as_batch(labels), torch.tensor(5.0))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_contracts():
    assert str(CrossEntropyCalculator(output_index="logits").contract) == (
        "logits:n+1:f | ctx.target:n:i64 -> loss:0:f"
    )
    assert RowMean().contract is None
    assert str(RowMean(contract="a:1 -> loss:0").contract) == "a:1 -> loss:0"
