"""Chunked cross-entropy on a GPU: the values and gradients of whole logits, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ditty_di.losses import (
    CrossEntropyLoss,
    LigerLinearCrossEntropyLoss,
    LinearCrossEntropyLoss,
    skip_lm_head,
)
from tests.losses import as_batch
from tests.losses.families import batch, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def liger() -> nn.Module:
    pytest.importorskip("liger_kernel")
    return LigerLinearCrossEntropyLoss()


def chunked() -> nn.Module:
    return LinearCrossEntropyLoss(chunk_tokens=4)


@pytest.mark.parametrize("make", [chunked, liger])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "granite"])
def test_loss_and_gradients_are_those_of_whole_logits(family, dtype, make):
    plain = build(family).to("cuda", dtype)
    deferred = skip_lm_head(copy.deepcopy(plain))
    inputs, labels = batch(family)
    inputs, labels = {k: v.cuda() for k, v in inputs.items()}, labels.cuda()
    whole, loss_fn = CrossEntropyLoss(output="logits"), make()
    count = whole.num_valid(as_batch(labels))
    losses = []
    for model, function in ((plain, whole), (deferred, loss_fn)):
        loss, _ = function(model(**inputs), as_batch(labels), count)
        loss.backward()
        losses.append(loss.detach())
    exact = dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-5 if exact else 1e-2, atol=1e-5)
    for expected, found in zip(plain.parameters(), deferred.parameters(), strict=True):
        difference = (found.grad - expected.grad).float().norm() / expected.grad.float().norm()
        assert difference < (1e-4 if exact else 5e-2)


@pytest.mark.parametrize("make", [lambda: LinearCrossEntropyLoss(chunk_tokens=256), liger])
def test_the_logits_never_exist_as_a_whole(make):
    vocab, tokens = 32768, 2048
    # float32 has no fused attention with shared key and value heads: the scores would be larger
    model = build(
        "llama", vocab_size=vocab, max_position_embeddings=tokens, num_key_value_heads=4
    ).to("cuda")
    ids = torch.randint(3, vocab, (1, tokens), device="cuda")
    count = torch.tensor(float(tokens), device="cuda")

    def peak(model: nn.Module, loss_fn: nn.Module) -> int:
        for _ in range(2):  # the first time kernels are compiled
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss_fn(model(ids), as_batch(ids), count)[0].backward()
        return torch.cuda.max_memory_allocated() - before

    whole = peak(model, CrossEntropyLoss(output="logits"))
    assert whole > 2 * vocab * tokens * 4
    assert peak(skip_lm_head(model), make()) < whole / 3
