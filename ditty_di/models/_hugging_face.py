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
    attn_implementation: str | None,
    dtype: str,
    tokenizer: Any,
    pad_vocab_to_multiple_of: int | None,
    transforms: tuple[ModelTransform | None, ...],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The model on meta, changed by the transforms in their order.

    Args:
        auto_class: of transformers, such as `AutoModelForCausalLM`.
        attn_implementation: None is transformers' choice.
        prepare: changes the model before the transforms do.

    Raises:
        ValueError: the model has no such attention.
    """
    validate(pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)
    config = copy.deepcopy(config)
    config.use_cache = False
    _fit_to_tokenizer(config, tokenizer, pad_vocab_to_multiple_of)
    model = _on_meta(auto_class, config, _dtype(dtype), attn_implementation)
    prepare(model)
    if tokenizer is not None and getattr(model, "generation_config", None) is not None:
        end_with_turns(model.generation_config, tokenizer)
    for transform in transforms:
        if transform is not None:
            model = transform(model)
    return model


def _on_meta(
    auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> Any:
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"model: transformers has no model of type {config.model_type!r} for its "
            f"{auto_class.__name__}; give the folder of another model, such as the text model that "
            f"a multimodal one was made from"
        )

    def made(attention: str | None) -> Any:
        own = copy.deepcopy(config)
        with torch.device("meta"):
            return auto_class.from_config(own, dtype=dtype, attn_implementation=attention)

    try:
        model = made(attn_implementation)
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        other = made(None)  # what else may be wrong is raised here
        why = str(error).strip().partition(". ")[0]
        raise ValueError(
            f"attn_implementation={attn_implementation}: {type(other).__name__} cannot be "
            f"built with it ({why}); write model.attn_implementation=null, with which "
            f"transformers takes {other.config._attn_implementation}"
        ) from None
    _as_loaded(model, dtype)
    return model


def _as_loaded(model: Any, dtype: torch.dtype) -> None:
    """Give every tensor the device and dtype that `from_pretrained` would start from.

    Some constructors make tensors on the CPU whatever the default device is, and some parameters
    are never read in 16 bits.
    """
    from transformers.core_model_loading import build_glob_alternation

    patterns = list(model._get_dtype_plan(dtype))
    wide = build_glob_alternation(patterns)[0] if patterns else None
    new: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                to = torch.float32 if wide and wide.search(f"{path}.{name}") else tensor.dtype
                if tensor.is_meta and to == tensor.dtype:
                    continue
                made = torch.empty_like(tensor, dtype=to, device="meta")
                if isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
                table[name] = new.setdefault(id(tensor), made)


def validate(*, dtype: str | None = None, pad_vocab_to_multiple_of: int | None = None) -> None:
    """Raise ValueError for values that no model can be built with."""
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype}: no dtype; write float32, bfloat16 or float16")
    if pad_vocab_to_multiple_of is not None and pad_vocab_to_multiple_of < 1:
        raise ValueError(
            f"pad_vocab_to_multiple_of={pad_vocab_to_multiple_of}: write a number of at least 1"
        )


def rehearse(auto_class: Any, build: Callable[[str], Any], config: Any = None) -> list[str]:
    """Find the configuration and build the model on meta, without its transforms.

    Args:
        build: as in `ditty_di.protocols`.
        config: None reads that of the pretrained model at `path`.

    Raises:
        ValueError: the model does not exist, or it cannot be built as it is asked for.
    """
    if config is None:
        path = build("path")
        try:
            config = read_config(ModelFiles(path, build("revision")), {})
        except OSError as error:
            raise ValueError(f"path={path}: {error}") from None
    _on_meta(auto_class, config, _dtype(build("dtype")), build("attn_implementation"))
    return []


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


def prepare(files: ModelFiles, model: Any) -> None:
    """Take over which weights the pretrained model's files tie, and how it generates."""
    from ditty_di.models.conversion import fit_to_files

    fit_to_files(files, model)
    read_generation_config(files, model)


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
