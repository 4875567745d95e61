"""Hugging Face causal language models, built on the meta device: shapes, no memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def from_config(
    config: PretrainedConfig, *, attn_implementation: str = "sdpa", dtype: str = "float32"
) -> PreTrainedModel:
    """A causal LM with the architecture of `config`; its values come from the `weights` slot.

    Args:
        config: any transformers configuration that has a causal LM class.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...
        dtype: of the parameters, a name in torch.

    The copy of `config` that the model keeps says `use_cache=False`: while training, a key-value
    cache costs memory and lets packed documents see each other.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )


def from_folder(
    path: str, *, attn_implementation: str = "sdpa", dtype: str = "float32", **changes: Any
) -> PreTrainedModel:
    """The causal LM of a local folder or hub id: its architecture now, its values by `weights`.

    Args:
        path: a folder with a `config.json`, or the hub's `user/name`.
        changes: entries of the configuration to override, such as `attention_dropout`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **changes)
    return from_config(config, attn_implementation=attn_implementation, dtype=dtype)
