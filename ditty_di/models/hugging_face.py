"""Build models of transformers on the meta device, of any auto class."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

import ditty_di.models.modeling  # noqa: F401

# isort: split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ditty_di.adapters.values import initialize as initialize_adapters
from ditty_di.dtypes import dtype_by_name
from ditty_di.models import generation
from ditty_di.models.configuration import (
    SPECIAL_TOKENS,
    Config,
    fit_to_tokenizer,
    make_config,
    read_config,
)
from ditty_di.models.conversion import fit_to_files, kept_in_float32, require_experts
from ditty_di.models.files import ModelFiles
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.routers import require_enough_experts
from ditty_di.models.weights import InitModule, hugging_face, initialize, meta_like, own_tensors
from ditty_di.protocols import ModelTransform, early_checks

#: Choices of the group `model` that open a folder, to name in a message.
_CHOICES = (
    (AutoModelForCausalLM, "hf_causal_lm"),
    (AutoModelForSeq2SeqLM, "hf_seq2seq"),
    (AutoModelForMaskedLM, "hf_masked_lm"),
    (AutoModelForImageTextToText, "hf_image_text"),
)


def builders(
    auto_class: Any,
    *,
    contract: str,
    pipeline_tag: str = "text-generation",
    prepare: ModelTransform | None = None,
    head_task: str | None = None,
    unused: Sequence[str] = (),
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Return `from_config` and `from_pretrained` for one auto class of transformers.

    The models they build carry two attributes that the trainer falls back on: `contract`, and
    `default_weights`, the function that fills the model. Exports read `auto_class`, its name, and
    `pipeline_tag`; adapters and pretrained weights `head_task`.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        contract: inputs and outputs of its models (`ditty_di.contracts.grammar`).
        pipeline_tag: task of its models on the Hub.
        head_task: task type of peft, for models whose head the files may lack: it is initialized
            then, and trained whole beside adapters.
        unused: modules that the outputs in `contract` do not depend on; they are not trained.
        prepare: transform of every model, applied first.
    """
    attributes: dict[str, Any] = {"contract": contract, "auto_class": auto_class.__name__}
    attributes |= {"pipeline_tag": pipeline_tag, "head_task": head_task}

    def rehearse_config(build: Callable[[str], Any]) -> list[str]:
        config = build("config")
        if not isinstance(config, PretrainedConfig):
            config = make_config(config, build("tokenizer"))
        return rehearse_build(config, build)

    def rehearse_pretrained(build: Callable[[str], Any]) -> list[str]:
        path = build("path")
        try:
            files = ModelFiles(path, build("revision"))
            config = read_config(files, {})
        except OSError as error:
            raise ValueError(f"path={path}: {error}") from None
        # The headers of a folder's files are read, and nothing of the hub's.
        return rehearse_build(config, build, files if files.folder is not None else None)

    def rehearse_build(
        config: PretrainedConfig, build: Callable[[str], Any], files: ModelFiles | None = None
    ) -> list[str]:
        model: Any = _build_on_meta(
            auto_class, config, build("dtype"), build("attn_implementation")
        )
        if files is not None:
            require_experts(files, model)
        model.head_task = head_task
        _freeze(model, build("freeze") or ())
        for name in ("quantize", "adapter"):  # they log what they leave out
            transform = build(name)
            model = model if transform is None else transform(model)
        return []

    @early_checks(validate=_validate, rehearse=rehearse_config)
    def from_config(
        config: Config,
        *,
        attn_implementation: str | None = None,
        dtype: str = "float32",
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: Sequence[str] | None = None,
        pad_vocab_to_multiple_of: int | None = None,
        freeze: Sequence[str] = (),
        quantize: ModelTransform | None = None,
        adapter: ModelTransform | None = None,
        convert: ModelTransform | None = None,
        neftune: ModelTransform | None = None,
        head: ModelTransform | None = None,
        init: Callable[[nn.Module], InitModule] = hugging_face,
    ) -> nn.Module:
        """Build a model with the architecture of `config`, on the meta device.

        The model keeps a copy of `config` with `use_cache=False`: in training, a key-value cache
        costs memory and lets packed documents see each other. Its `default_weights` draw random
        values, as transformers does unless `init` is another.

        Args:
            config: a configuration of transformers; or its class, a partial of it, or a mapping
                with `model_type`, which take what they leave out from `tokenizer`: `vocab_size`,
                the pad, eos and bos ids, and `max_position_embeddings`. An id `..._token_id` that
                is None means none; other entries that are None are left out.
            attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None leaves the choice
                to transformers: `sdpa`, or `eager` for models without it.
            dtype: of the parameters, a name in torch. Rotary frequencies stay float32.
            tokenizer: the vocabulary grows to its size, and its pad, eos and bos ids are taken
                where `config` has none. A decoder without a start token starts with padding.
            labels: names of the classes of a classifier, which become `id2label` and `label2id` of
                the configuration; None keeps those that it has.
            pad_vocab_to_multiple_of: rounds the vocabulary up, in tokens.
            freeze: parameters that are not trained, by a part of their path (`vision_tower`), its
                end, or a pattern (`model.layers.[01].*`).
            quantize: transform of the model, applied first.
            adapter: transform that adds adapters.
            convert: transform of layers, such as to float8.
            neftune: transform that adds noise to the input embeddings.
            head: transform of the output head, applied last.
            init: initializer of `default_weights` (`ditty_di.models.weights.initialize`).

        Raises:
            ValueError: the model cannot be built with these arguments.
        """
        given = isinstance(config, PretrainedConfig)
        return _build(
            auto_class,
            config if given else make_config(config, tokenizer),  # type: ignore[arg-type]
            special_tokens=SPECIAL_TOKENS if given else (),
            attn_implementation=attn_implementation,
            dtype=dtype,
            tokenizer=tokenizer,
            labels=labels,
            pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
            freeze=freeze,
            transforms=(prepare, quantize, adapter, convert, neftune, head),
            default_weights=partial(initialize, init=init),
            unused=unused,
            **attributes,
        )

    @early_checks(validate=_validate_pretrained, rehearse=rehearse_pretrained)
    def from_pretrained(
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        attn_implementation: str | None = None,
        dtype: str = "float32",
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: Sequence[str] | None = None,
        pad_vocab_to_multiple_of: int | None = None,
        freeze: Sequence[str] = (),
        quantize: ModelTransform | None = None,
        adapter: ModelTransform | None = None,
        convert: ModelTransform | None = None,
        neftune: ModelTransform | None = None,
        head: ModelTransform | None = None,
        **changes: Any,
    ) -> nn.Module:
        """Build the model of a folder or hub id on the meta device.

        Its `default_weights` read the values of the same folder or hub id, and initialize
        adapters (`ditty_di.adapters.initialize`).

        Args:
            path: a folder with a `config.json`, or the hub's `user/name`.
            revision: branch, tag or commit on the hub; None is its main branch.
            attn_implementation: as for `from_config`.
            dtype: as for `from_config`.
            tokenizer: as for `from_config`.
            labels: as for `from_config`.
            pad_vocab_to_multiple_of: as for `from_config`.
            freeze: as for `from_config`.
            quantize: as for `from_config`.
            adapter: as for `from_config`.
            convert: as for `from_config`.
            neftune: as for `from_config`.
            head: as for `from_config`.
            **changes: entries of the configuration to override, such as `attention_dropout`.

        Raises:
            FileNotFoundError: no such folder, model or revision, or no `config.json`.
            PermissionError: a gated model whose license was not accepted.
            ConnectionError: the hub cannot be reached and its cache lacks the model.
            ValueError: the weights are quantized already, or a file is damaged.
        """
        files = ModelFiles(path, revision)
        return _build(
            auto_class,
            read_config(files, changes),
            attn_implementation=attn_implementation,
            dtype=dtype,
            tokenizer=tokenizer,
            labels=labels,
            pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
            freeze=freeze,
            transforms=(prepare, quantize, adapter, convert, neftune, head),
            files=files,
            unused=unused,
            default_weights=Pretrained(path, revision=revision, init_missing=initialize_adapters),
            **attributes,
        )

    for function in (from_config, from_pretrained):
        vars(function)["contract"] = contract
    return from_config, from_pretrained


def _build(
    auto_class: Any,
    config: PretrainedConfig,
    /,
    *,
    attn_implementation: str | None,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase | None,
    labels: Sequence[str] | None,
    pad_vocab_to_multiple_of: int | None,
    freeze: Sequence[str],
    transforms: tuple[ModelTransform | None, ...],
    unused: Sequence[str] = (),
    files: ModelFiles | None = None,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    **attributes: Any,
) -> nn.Module:
    """Return the model on meta, changed by the transforms in their order.

    `special_tokens` are taken from the tokenizer where the configuration has none. The files of a
    pretrained model may untie weights, and say how the model generates. Attributes are set on the
    model; one that a transform changes keeps the changed value.
    """
    _validate(dtype=dtype, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    fit_to_tokenizer(config, tokenizer, pad_vocab_to_multiple_of, special_tokens)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    model = _build_on_meta(auto_class, config, dtype, attn_implementation)
    if files is not None:
        fit_to_files(files, model)
        generation.take_over(files, model)
    if tokenizer is not None and getattr(model, "generation_config", None) is not None:
        generation.end_with_turns(model.generation_config, tokenizer)
    for name, value in attributes.items():
        setattr(model, name, value)
    _freeze(model, freeze)
    for name in unused:
        if (module := getattr(model, name, None)) is not None:
            module.requires_grad_(False)
    for transform in transforms:
        if transform is not None:
            model = transform(model)
    for name, value in attributes.items():  # on the outermost module too
        setattr(model, name, getattr(model, name, value))
    return model


def _freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Exclude parameters from training, by parts or ends of their paths, or by patterns.

    Raises:
        ValueError: a name without a parameter.
    """
    for name in names:
        chosen = [
            parameter
            for path, parameter in model.named_parameters()
            if fnmatchcase(path, name) or f".{name}." in f".{path}."
        ]
        if not chosen:
            parts = sorted({".".join(path.split(".")[:2]) for path, _ in model.named_parameters()})
            raise ValueError(
                f"model.freeze has {name!r}, but no parameter of {type(model).__name__} is called "
                f"so; its parts are {', '.join(parts)}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)


# -- early checks ---------------------------------------------------------------------------------


def _validate(*, dtype: str | None = None, pad_vocab_to_multiple_of: int | None = None) -> None:
    """Raise ValueError for values that no model can be built with."""
    if dtype is not None:
        dtype_by_name(dtype, "model.dtype")
    if pad_vocab_to_multiple_of is not None and pad_vocab_to_multiple_of < 1:
        raise ValueError(
            f"pad_vocab_to_multiple_of={pad_vocab_to_multiple_of}: write a number of at least 1"
        )


def _validate_pretrained(
    *,
    path: Any = None,
    revision: str | None = None,
    dtype: str | None = None,
    pad_vocab_to_multiple_of: int | None = None,
) -> None:
    """Raise ValueError also for a folder that does not exist."""
    if isinstance(path, str):
        try:
            ModelFiles(path, revision)
        except FileNotFoundError as error:
            raise ValueError(
                f"path={path}: {error}; write a folder that save_pretrained wrote, or the hub's "
                "user/name"
            ) from error
    _validate(dtype=dtype, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)


# -- the model on meta ----------------------------------------------------------------------------


def _build_on_meta(
    auto_class: Any, config: PretrainedConfig, dtype: str, attn_implementation: str | None
) -> Any:
    if type(config) not in auto_class._model_mapping:
        others = [name for other, name in _CHOICES if type(config) in other._model_mapping]
        build_it = f", or build this one with model={' or '.join(others)}" if others else ""
        raise ValueError(
            f"model: transformers has no model of type {config.model_type!r} for its "
            f"{auto_class.__name__}; give another model{build_it}"
        )
    parameter_dtype = dtype_by_name(dtype, "model.dtype")

    def build(attention: str | None) -> Any:
        own = copy.deepcopy(config)
        with torch.device("meta"):
            return auto_class.from_config(own, dtype=parameter_dtype, attn_implementation=attention)

    try:
        model = build(attn_implementation)
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        other = build(None)  # raises whatever else may be wrong
        why = str(error).strip().partition(". ")[0]
        raise ValueError(
            f"attn_implementation={attn_implementation}: {type(other).__name__} cannot be "
            f"built with it ({why}); write model.attn_implementation=null, with which "
            f"transformers takes {other.config._attn_implementation}"
        ) from None
    _match_from_pretrained(model, parameter_dtype)
    require_enough_experts(model)
    return model


def _match_from_pretrained(model: Any, dtype: torch.dtype) -> None:
    """Give every tensor the device and dtype that `from_pretrained` would start from.

    Some constructors make tensors on the CPU whatever the default device is, and some parameters
    are never read in 16 bits.
    """
    is_wide = kept_in_float32(model, dtype)
    new: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for table, name, tensor in own_tensors(module):
            to = torch.float32 if is_wide(f"{path}.{name}") else tensor.dtype
            if tensor.is_meta and to == tensor.dtype:
                continue
            table[name] = new.setdefault(id(tensor), meta_like(tensor, to))
