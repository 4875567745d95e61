"""Liger's loss: what it needs is asked for in words, and on CUDA it is the same loss."""

from __future__ import annotations

import copy

import pytest
import torch

from ditty_di.losses import CrossEntropyLoss, LigerLinearCrossEntropyLoss, skip_lm_head
from ditty_di.losses.liger import plain_linear, scale_and_softcap
from tests.losses import as_batch
from tests.losses.families import batch, build


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without one")
def test_without_an_accelerator_it_says_what_to_use():
    with pytest.raises(RuntimeError, match=r"CUDA device.*loss=chunked"):
        LigerLinearCrossEntropyLoss()


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("llama", {}, (1.0, None)),
        ("gemma2", {}, (1.0, 3.0)),
        ("cohere", {}, (0.3, None)),
        ("granite", {}, (0.25, None)),
    ],
)
def test_what_a_model_does_to_its_logits_is_recognized(family, changes, expected):
    output = skip_lm_head(build(family, **changes))(**batch(family)[0])
    assert scale_and_softcap(output.head) == expected


def test_anything_else_is_refused_and_not_left_out():
    output = skip_lm_head(build("bart"))(**batch("bart")[0])
    with pytest.raises(ValueError, match=r"applies .*add to its logits.*loss=chunked"):
        scale_and_softcap(output.head)


def test_only_a_plain_linear_projection_will_do():
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    weight, bias = plain_linear(model.lm_head)
    assert weight is model.lm_head.weight and bias is None
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lora_A.*loss=chunked"):
        plain_linear(adapted.get_output_embeddings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "granite"])
def test_on_cuda_loss_and_gradients_are_those_of_whole_logits(family):
    pytest.importorskip("liger_kernel")
    plain = build(family).cuda()
    deferred = skip_lm_head(copy.deepcopy(plain))
    inputs, labels = batch(family)
    inputs, labels = {k: v.cuda() for k, v in inputs.items()}, labels.cuda()
    whole, fused = CrossEntropyLoss(output="logits"), LigerLinearCrossEntropyLoss()
    count = whole.num_valid(as_batch(labels))
    losses = []
    for model, loss_fn in ((plain, whole), (deferred, fused)):
        loss, _ = loss_fn(model(**inputs), as_batch(labels), count)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for expected, found in zip(plain.parameters(), deferred.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
