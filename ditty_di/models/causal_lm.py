"""Hugging Face causal language models, built on the meta device: shapes, no memory."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from ditty_di.models.arguments import validate_pretrained
from ditty_di.protocols import early_checks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PretrainedConfig

    from ditty_di.protocols import ModelTransform


def _validate(*, dtype: str | None = None, pad_vocab_to_multiple_of: int | None = None) -> None:
    from ditty_di.models._hugging_face import validate

    validate(dtype=dtype, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)


def _rehearse_config(build: Callable[[str], Any]) -> list[str]:
    from transformers import AutoModelForCausalLM

    from ditty_di.models._hugging_face import rehearse

    return rehearse(AutoModelForCausalLM, build, build("config"))


def _rehearse(build: Callable[[str], Any]) -> list[str]:
    from transformers import AutoModelForCausalLM

    from ditty_di.models._hugging_face import rehearse

    return rehearse(AutoModelForCausalLM, build)


@early_checks(validate=_validate, rehearse=_rehearse_config)
def from_config(
    config: PretrainedConfig,
    *,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    tokenizer: Any = None,
    pad_vocab_to_multiple_of: int | None = None,
    quantize: ModelTransform | None = None,
    adapter: ModelTransform | None = None,
    convert: ModelTransform | None = None,
    neftune: ModelTransform | None = None,
    head: ModelTransform | None = None,
) -> nn.Module:
    """A causal LM with the architecture of `config`; its values come from the `weights` slot.

    Args:
        config: any transformers configuration that has a causal LM class.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None is transformers'
            choice: `sdpa`, or `eager` for a model that has no `sdpa`.
        dtype: of the parameters, a name in torch. Rotary frequencies stay float32.
        tokenizer: the vocabulary grows to its size where it is larger, and its pad, eos and bos
            ids are taken where `config` has none.
        pad_vocab_to_multiple_of: rounds the vocabulary up.
        quantize, adapter, convert, neftune, head: change the model, in this order.

    The copy of `config` that the model keeps says `use_cache=False`: while training, a key-value
    cache costs memory and lets packed documents see each other.
    """
    from transformers import AutoModelForCausalLM

    from ditty_di.models._hugging_face import build

    return build(
        AutoModelForCausalLM,
        config,
        attn_implementation=attn_implementation,
        dtype=dtype,
        tokenizer=tokenizer,
        pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        transforms=(quantize, adapter, convert, neftune, head),
    )


@early_checks(validate=validate_pretrained, rehearse=_rehearse)
def from_pretrained(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    tokenizer: Any = None,
    pad_vocab_to_multiple_of: int | None = None,
    quantize: ModelTransform | None = None,
    adapter: ModelTransform | None = None,
    convert: ModelTransform | None = None,
    neftune: ModelTransform | None = None,
    head: ModelTransform | None = None,
    **changes: Any,
) -> nn.Module:
    """The causal LM of a folder or hub id: its architecture now, its values by `weights`.

    Args:
        path: a folder with a `config.json`, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        changes: entries of the configuration to override, such as `attention_dropout`.

    The other arguments are those of `from_config`.

    Raises:
        FileNotFoundError: no such folder, model or revision, or no `config.json`.
        PermissionError: a gated model whose licence was not accepted.
        ConnectionError: the hub cannot be reached and its cache lacks the model.
        ValueError: the weights are quantised already, or a damaged file.
    """
    from transformers import AutoModelForCausalLM

    from ditty_di.models._hugging_face import build, prepare, read_config
    from ditty_di.models.files import ModelFiles

    files = ModelFiles(path, revision)
    return build(
        AutoModelForCausalLM,
        read_config(files, changes),
        attn_implementation=attn_implementation,
        dtype=dtype,
        tokenizer=tokenizer,
        pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        transforms=(quantize, adapter, convert, neftune, head),
        prepare=partial(prepare, files),
    )
