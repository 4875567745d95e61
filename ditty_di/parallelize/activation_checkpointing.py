"""Activation checkpointing of one block: what is saved for backward, and what is recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def full(block: nn.Module, /, *, preserve_rng_state: bool = True) -> nn.Module:
    """Save only the block's inputs, and recompute all of it in the backward pass.

    Args:
        block: one of the repeated blocks.
        preserve_rng_state: recompute dropout with the same random numbers.
    """
    return checkpoint_wrapper(block, preserve_rng_state=preserve_rng_state)


def offload(block: nn.Module, /, *, recompute: bool = False) -> nn.Module:
    """Keep the block's activations in host memory until the backward pass, pinned beside a GPU.

    Args:
        block: one of the repeated blocks.
        recompute: keep only the block's inputs there, and recompute the rest as `full` does.
    """
    return offload_wrapper(full(block) if recompute else block)


def selective(
    block: nn.Module, /, *, recompute_every_nth_matmul: int = 2, preserve_rng_state: bool = True
) -> nn.Module:
    """Save attention outputs and all but every n-th matrix product, and recompute the rest.

    The policy is torchtitan's (`distributed/activation_checkpoint.py`): attention and products are
    expensive to compute, norms and activations are cheap.

    Args:
        block: one of the repeated blocks.
        recompute_every_nth_matmul: every so many matrix products one is recomputed.
        preserve_rng_state: recompute dropout with the same random numbers.
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
                keep = seen[when] % recompute_every_nth_matmul != 0
            else:
                keep = op in attention
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return checkpoint_wrapper(block, context_fn=contexts, preserve_rng_state=preserve_rng_state)


#: torch lets its caches be read once: a backward pass for inputs and one for weights are two.
vars(selective)["one_backward_pass"] = True
