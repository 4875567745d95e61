"""Make configurations of transformers, or read them, and fit them to a tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from ditty_di.models.files import ModelFiles
from ditty_di.models.mxfp4 import is_mxfp4

SPECIAL_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")

#: What `from_config` accepts as an architecture.
Config = PretrainedConfig | Mapping[str, Any] | Callable[..., PretrainedConfig]


def make_config(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    """Build a configuration; what is left out of it is taken from the tokenizer.

    Args:
        config: a class, a partial of one, or a mapping with `model_type`.
        tokenizer: None leaves transformers' defaults.
    """
    if isinstance(config, Mapping):
        given = dict(config)
        if "model_type" not in given:
            raise ValueError("config: a mapping needs model_type, such as model_type: llama")
        make: Any = type(AutoConfig.for_model(given.pop("model_type")))
    else:
        given, make = dict(getattr(config, "keywords", {})), getattr(config, "func", config)
    given = {k: v for k, v in given.items() if v is not None or k.endswith("_token_id")}
    taken: dict[str, Any] = {}
    if tokenizer is not None:
        taken = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
        taken["vocab_size"] = len(tokenizer)
        if tokenizer.model_max_length < LARGE_INTEGER:  # else it has no limit
            taken["max_position_embeddings"] = tokenizer.model_max_length
    if isinstance(text := given.get("text_config"), Mapping):  # of a multimodal model
        given["text_config"] = {**taken, **text}
    aliases = getattr(make, "attribute_map", {})
    known = inspect.signature(make).parameters
    for name, value in taken.items():
        own = aliases.get(name, name)
        if own in known and not {name, own} & given.keys():
            given[own] = value
    return make(*getattr(config, "args", ()), **given)


def read_config(files: ModelFiles, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration of a pretrained model, with some entries changed.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: the weights are quantized already, other than in MXFP4.
    """
    folder = files.config().parent
    config = AutoConfig.from_pretrained(folder, **changes)
    # As if transformers had been given the same path: model cards and adapters name it.
    config.name_or_path = files.path
    if files.folder is None:
        config._commit_hash = folder.name
    if is_mxfp4(config):
        del config.quantization_config  # dequantized while they are read
    elif getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model: the weights of {files.path} are quantized already; give the model that they "
            f"were made from, and let `quantize` do it"
        )
    return config


def fit_to_tokenizer(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    pad_vocab_to_multiple_of: int | None,
    special_tokens: Sequence[str],
) -> None:
    """Grow the vocabulary to the tokenizer's, and set those special tokens that are None."""
    text: Any = config.get_text_config()
    if tokenizer is not None:
        text.vocab_size = max(text.vocab_size, len(tokenizer))
        for name in special_tokens:
            if getattr(text, name, None) is None:
                setattr(text, name, getattr(tokenizer, name))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = text.pad_token_id
    if pad_vocab_to_multiple_of is not None:
        text.vocab_size += -text.vocab_size % pad_vocab_to_multiple_of
