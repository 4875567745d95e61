"""What causal and sequence-to-sequence models of transformers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ditty_di.models.files import ModelFiles
from ditty_di.models.generation import end_with_turns

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from ditty_di.protocols import ModelTransform

SPECIAL_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")


def build(
    auto_class: Any,
    config: PretrainedConfig,
    *,
    attn_implementation: str,
    dtype: str,
    tokenizer: Any,
    pad_vocab_to_multiple_of: int | None,
    transforms: tuple[ModelTransform | None, ...],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The model on meta, changed by the transforms in their order.

    Args:
        auto_class: of transformers, such as `AutoModelForCausalLM`.
        prepare: changes the model before the transforms do.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    _fit_to_tokenizer(config, tokenizer, pad_vocab_to_multiple_of)
    with torch.device("meta"):
        model = auto_class.from_config(
            config, dtype=_dtype(dtype), attn_implementation=attn_implementation
        )
    prepare(model)
    if tokenizer is not None and getattr(model, "generation_config", None) is not None:
        end_with_turns(model.generation_config, tokenizer)
    for transform in transforms:
        if transform is not None:
            model = transform(model)
    return model


def read_config(files: ModelFiles, changes: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a pretrained model.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: its weights are quantised already.
    """
    from transformers import AutoConfig

    folder = files.config().parent
    config = AutoConfig.from_pretrained(folder, **changes)
    # As if transformers had been given the same path: model cards and adapters name it.
    config.name_or_path = files.path
    if files.folder is None:
        config._commit_hash = folder.name
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model: the weights of {files.path} are quantised already; give the model that they "
            f"were made from, and let `quantize` do it"
        )
    return config


def read_generation_config(files: ModelFiles, model: Any) -> None:
    """Takes over how the pretrained model generates: its stop tokens, say."""
    from ditty_di.models import generation

    generation.take_over(files, model)


def _fit_to_tokenizer(
    config: PretrainedConfig, tokenizer: Any, pad_vocab_to_multiple_of: int | None
) -> None:
    """Grows the vocabulary to hold the tokenizer's, and names the special tokens it lacks."""
    text: Any = config.get_text_config()
    if tokenizer is not None:
        text.vocab_size = max(text.vocab_size, len(tokenizer))
        for name in SPECIAL_TOKENS:
            if getattr(text, name, None) is None:
                setattr(text, name, getattr(tokenizer, name))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = text.pad_token_id
    if pad_vocab_to_multiple_of is not None:
        text.vocab_size += -text.vocab_size % pad_vocab_to_multiple_of


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model.dtype={name!r} is no dtype; write float32, bfloat16 or float16")
    return dtype
