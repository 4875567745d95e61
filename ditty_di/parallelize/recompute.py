"""Activation checkpointing of one block: what is kept for backward, and what is computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def full(block: nn.Module, /, *, preserve_rng_state: bool = True) -> nn.Module:
    """Keeps the block's inputs only."""
    return checkpoint_wrapper(block, preserve_rng_state=preserve_rng_state)


def selective(
    block: nn.Module, /, *, matmul_every: int = 2, preserve_rng_state: bool = True
) -> nn.Module:
    """Keeps attention's output and every `matmul_every`-th matrix product, recomputes the rest.

    The policy is torchtitan's (`distributed/activation_checkpoint.py`): attention and products are
    dear to compute, norms and activations are cheap.
    """
    aten = torch.ops.aten
    attention = {
        op
        for name in (
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
        if (op := getattr(getattr(aten, name, None), "default", None)) is not None
    }
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default}

    def contexts() -> Any:
        seen = {"forward": 0, "recompute": 0}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op in products:
                when = "recompute" if context.is_recompute else "forward"
                seen[when] += 1
                keep = seen[when] % matmul_every != 0
            else:
                keep = op in attention
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return checkpoint_wrapper(block, context_fn=contexts, preserve_rng_state=preserve_rng_state)
