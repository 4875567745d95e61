"""Chunks of logits: only valid labels, never the whole, and a clear word when there are none."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss, skip_lm_head
from tests.losses import as_batch
from tests.losses.families import VOCAB, batch, build


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("chunk_tokens", [64, 100])
def test_no_more_logits_than_a_chunk_s_exist_at_once(chunk_tokens):
    model = skip_lm_head(build("llama", vocab_size=4096, max_position_embeddings=512))
    ids = torch.randint(3, 4096, (1, 400))
    loss_fn = LinearCrossEntropyLoss(chunk_tokens=chunk_tokens)
    with Largest() as largest:
        loss_fn(model(ids), as_batch(ids), torch.tensor(400.0))[0].backward()
    assert largest.numel == chunk_tokens * 4096
    with Largest() as largest:
        CrossEntropyLoss()(model(ids).logits, as_batch(ids), torch.tensor(400.0))[0].backward()
    assert largest.numel == 400 * 4096


def test_positions_without_a_valid_label_cost_nothing_and_weigh_nothing():
    model = skip_lm_head(build("llama"))
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    inputs, labels = batch("llama")
    labels[:] = 7
    labels[0, 3] = labels[1, 5] = 11
    loss_fn = LinearCrossEntropyLoss(chunk_tokens=10, ignore_index=7)
    count = loss_fn.num_valid(as_batch(labels))
    assert count == 2
    output = model(**inputs)
    rows.clear()
    loss, _ = loss_fn(output, as_batch(labels), count)
    assert rows == [2]
    valid = output.logits[[0, 1], [3, 5]]
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(valid, torch.tensor([11, 11]))
    )


def test_without_a_valid_label_loss_and_gradients_are_zero_and_not_missing():
    model = skip_lm_head(build("llama"))
    inputs, labels = batch("llama")
    loss, _ = LinearCrossEntropyLoss()(
        model(**inputs), as_batch(torch.full_like(labels, -100)), torch.ones(())
    )
    loss.backward()
    assert loss == 0
    assert {float(p.grad.abs().max()) for p in model.parameters()} == {0.0}


def test_parts_of_a_window_add_up_to_the_whole():
    model = skip_lm_head(build("gemma2"))
    inputs, labels = batch("gemma2", rows=4)
    loss_fn = LinearCrossEntropyLoss(chunk_tokens=5)
    count = loss_fn.num_valid(as_batch(labels))
    whole = loss_fn(model(**inputs), as_batch(labels), count)[0]
    ids = inputs["input_ids"]
    parts = [
        loss_fn(model(ids[rows]), as_batch(labels[rows]), count)[0] for rows in ([0], [1, 2], [3])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_half_precision_logits_are_compared_in_float32():
    model = skip_lm_head(build("llama").bfloat16())
    inputs, labels = batch("llama")
    loss, _ = LinearCrossEntropyLoss()(model(**inputs), as_batch(labels), torch.tensor(9.0))
    assert loss.dtype == torch.float32


def test_logits_are_refused_with_what_to_write_instead():
    inputs, labels = batch("llama")
    loss_fn = LinearCrossEntropyLoss()
    with pytest.raises(TypeError, match=r"CausalLMOutputWithPast.*skip_lm_head\(model\)"):
        loss_fn(build("llama")(**inputs), as_batch(labels), torch.tensor(9.0))
    with pytest.raises(TypeError, match=r"Tensor.*loss=causal_lm"):
        loss_fn(torch.rand(2, 13, VOCAB), as_batch(labels), torch.tensor(9.0))


def test_a_chunk_has_at_least_one_token():
    with pytest.raises(ValueError, match=r"loss\.chunk_tokens=0"):
        LinearCrossEntropyLoss(chunk_tokens=0)
