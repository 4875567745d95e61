"""Checkpoints of dolomite-engine, and its successor lm-engine, as models of transformers and back.

Both fuse projections. `c_attn` has, for each key/value head in turn, the rows of its query heads,
of its key and of its value: one formula for multi-head, grouped and multi-query attention. `c_fc`
has the rows of `up_proj` and then of `gate_proj`, or both in turn (`interleaved`); transformers'
experts have the gate first. See `hf_models/model_conversion` and `hf_models/modeling_utils` of
github.com/IBM/dolomite-engine and github.com/open-lm-engine/lm-engine.

A conversion is called with `config.json` and the tensors of a checkpoint, and returns those of
another. Tensors are `Deferred`: nothing is read before they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditty_di.messages import first_of
from ditty_di.models.deferred import Deferred, Index
from ditty_di.models.dolomite_config import (
    dolomite_config,
    from_either,
    from_transformers,
    lm_engine_config,
    transformers_config,
)
from ditty_di.models.safetensors import Safetensors

#: What a conversion returns: the new config.json and the tensors by name.
Converted = tuple[dict[str, Any], dict[str, Deferred]]

#: Names of the modules of a layer: of lm-engine, and of dolomite-engine.
_LM_ENGINE, _DOLOMITE = ("sequence_mixer", "mlp_block"), ("attn", "mlp")
_cat: Callable[..., Deferred] = torch.cat  # type: ignore[assignment]


def to_hugging_face(
    config: Mapping[str, Any], stored: Safetensors, *, interleaved: bool | None = None
) -> Converted:
    """Return a checkpoint of dolomite-engine or lm-engine as Llama, Granite or GraniteMoe.

    It is a Llama without multipliers, and a GraniteMoe with experts. Dropouts other than that of
    attention are left out, for these classes have none.

    Args:
        config: of `config.json`.
        stored: the tensors of the files.
        interleaved: whether rows of `up_proj` and `gate_proj` alternate; None as `config` says by
            `use_interleaved_weights`, else false. lm-engine of 2026 has them so and does not say.

    Raises:
        ValueError: a model that these classes do not have, or a tensor that is missing or left.
    """
    fused = ("c_attn", "c_fc")
    names = [
        next((one for one in both if f"transformer.h.0.{one}.{tensor}.weight" in stored), None)
        for *both, tensor in zip(_LM_ENGINE, _DOLOMITE, fused, strict=True)
    ]
    attention, mlp = names
    if attention is None or mlp is None:
        raise ValueError(
            "the files have no transformer.h.0.attn.c_attn.weight and mlp.c_fc.weight (or "
            "sequence_mixer, mlp_block), so it is not a checkpoint of dolomite-engine or lm-engine"
        )
    moe = len(stored.shape(f"transformer.h.0.{mlp}.c_fc.weight")) == 3
    entries, alternate = from_either(config, moe)
    alternate = alternate if interleaved is None else interleaved
    taken = _Taken(stored)
    tensors: dict[str, Deferred] = {}
    for part in _parts(entries, (attention, mlp), alternate, stored):
        tensors |= zip(part.theirs, _made(part.split, part.own, [taken(part.own)]), strict=True)
    taken.require_all("rope.", "inv_freq", ".attn.bias", ".attn.masked_bias")
    return transformers_config(entries), tensors


def to_dolomite(config: Mapping[str, Any], stored: Safetensors) -> Converted:
    """Return a Llama, Granite or GraniteMoe as a checkpoint of dolomite-engine (2024).

    Args:
        config: of `config.json`.
        stored: the tensors of the files.

    Raises:
        ValueError: another model, or one that dolomite-engine does not have; a tensor that is
            missing or left.
    """
    entries = from_transformers(config)
    return dolomite_config(entries), _fused(entries, stored, _DOLOMITE, interleaved=False)


def to_lm_engine(
    config: Mapping[str, Any], stored: Safetensors, *, interleaved: bool = False
) -> Converted:
    """Return a Llama, Granite or GraniteMoe as a checkpoint of lm-engine.

    Args:
        config: of `config.json`.
        stored: the tensors of the files.
        interleaved: let rows of `up_proj` and `gate_proj` alternate, as lm-engine of 2026 has them.

    Raises:
        ValueError: another model; a tensor that is missing or left.
    """
    entries = from_transformers(config)
    return lm_engine_config(entries), _fused(entries, stored, _LM_ENGINE, interleaved)


# -- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Tensors of transformers that are one tensor of dolomite-engine, and how they become it."""

    theirs: tuple[str, ...]
    own: str
    join: Callable[..., Deferred] = lambda one: one
    split: Callable[[Deferred], Sequence[Deferred]] = lambda one: (one,)


def _parts(
    entries: Mapping[str, Any], names: tuple[str, str], interleaved: bool, stored: Safetensors
) -> Iterator[_Part]:
    """Yield all tensors of a model, in transformers' order.

    Args:
        entries: the configuration.
        names: of the modules of a layer (`_LM_ENGINE`, `_DOLOMITE`).
        interleaved: whether rows of `up_proj` and `gate_proj` alternate.
        stored: what is converted; a tied output embedding may be in it or not.
    """
    heads, kv_heads = entries["num_attention_heads"], entries["num_key_value_heads"]
    head = entries["hidden_size"] // heads
    sizes = (heads // kv_heads * head, head, head)
    yield _Part(("model.embed_tokens.weight",), "transformer.wte.weight")
    for n in range(entries["num_hidden_layers"]):
        theirs, own = f"model.layers.{n}", f"transformer.h.{n}"
        attention, mlp = (f"{own}.{name}" for name in names)
        for kind in ("weight", "bias")[: 1 + entries["attention_bias"]]:
            qkv = tuple(f"{theirs}.self_attn.{name}_proj.{kind}" for name in "qkv")
            grouped = partial(_join_heads, sizes, kv_heads), partial(_split_heads, sizes, kv_heads)
            yield _Part(qkv, f"{attention}.c_attn.{kind}", *grouped)
            yield _Part((f"{theirs}.self_attn.o_proj.{kind}",), f"{attention}.c_proj.{kind}")
        if entries["num_local_experts"]:
            moe, swap = f"{theirs}.block_sparse_moe", partial(_swap, interleaved)
            experts = partial(swap, False), partial(swap, True)
            yield _Part((f"{moe}.input_linear.weight",), f"{mlp}.c_fc.weight", *experts)
            yield _Part((f"{moe}.output_linear.weight",), f"{mlp}.c_proj.weight")
            yield _Part((f"{moe}.router.layer.weight",), f"{mlp}.gate.weight")
        else:
            for kind in ("weight", "bias")[: 1 + entries["mlp_bias"]]:
                both = tuple(f"{theirs}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
                rows = partial(_join_rows, interleaved), partial(_split_rows, interleaved)
                yield _Part(both, f"{mlp}.c_fc.{kind}", *rows)
                yield _Part((f"{theirs}.mlp.down_proj.{kind}",), f"{mlp}.c_proj.{kind}")
        yield _Part((f"{theirs}.input_layernorm.weight",), f"{own}.ln_1.weight")
        yield _Part((f"{theirs}.post_attention_layernorm.weight",), f"{own}.ln_2.weight")
    yield _Part(("model.norm.weight",), "transformer.ln_f.weight")
    if "lm_head.weight" in stored or not entries["tie_word_embeddings"]:
        yield _Part(("lm_head.weight",), "lm_head.weight")


def _fused(
    entries: Mapping[str, Any], stored: Safetensors, names: tuple[str, str], interleaved: bool
) -> dict[str, Deferred]:
    """Return the tensors of transformers under the names of dolomite-engine."""
    if entries["num_local_experts"] and entries["attention_bias"]:
        raise ValueError("config.json: attention_bias=true, which no mixture of experts has there")
    taken, tensors = _Taken(stored), {}
    for part in _parts(entries, names, interleaved, stored):
        given = [taken(name) for name in part.theirs]
        tensors[part.own] = _made(part.join, first_of(part.theirs), given)
    taken.require_all("rotary_emb.inv_freq")
    return tensors


def _made(convert: Callable[..., Any], names: str, given: Sequence[Deferred]) -> Any:
    """Call a conversion; raise ValueError with names and shapes where they do not fit."""
    try:
        return convert(*given)
    except ValueError:
        shapes = first_of(list(one.shape) for one in given)
        raise ValueError(f"config.json does not fit the shapes {shapes} of {names}") from None


class _Taken:
    """The tensors of a checkpoint, each of which has to be used."""

    def __init__(self, stored: Safetensors) -> None:
        self._stored = stored
        self._names: set[str] = set()

    def __call__(self, name: str) -> Deferred:
        if name not in self._stored:
            raise ValueError(f"the files have no tensor {name}, which config.json calls for")
        self._names.add(name)
        return self._stored.deferred(name)

    def require_all(self, *buffers: str) -> None:
        """Raise ValueError if a tensor was not taken, but for buffers with these in their names."""
        left = [name for name in self._stored.names() if name not in self._names]
        if left := [name for name in left if not any(one in name for one in buffers)]:
            raise ValueError(f"the files have tensors that config.json does not: {first_of(left)}")


def _join_heads(sizes: Sequence[int], groups: int, *qkv: Deferred) -> Deferred:
    """Fuse queries, keys and values; of each group `sizes` rows."""
    parts = [one.split([size] * groups) for one, size in zip(qkv, sizes, strict=True)]
    return _cat([rows[n] for n in range(groups) for rows in parts])


def _split_heads(sizes: Sequence[int], groups: int, fused: Deferred) -> list[Deferred]:
    parts = fused.split([*sizes] * groups)
    return [_cat(parts[n :: len(sizes)]) for n in range(len(sizes))]


def _join_rows(interleaved: bool, gate: Deferred, up: Deferred, dim: int = 0) -> Deferred:
    """Fuse gate and up: all rows of up and then of gate, or a row of gate and one of up in turn."""
    if not interleaved:
        return _cat([up, gate], dim)
    if gate.shape != up.shape:
        raise ValueError("gate and up have different shapes")

    def into(out: Tensor, index: Index) -> None:
        wanted = index[dim]
        for n, one in enumerate((gate, up)):
            first, last = ((edge - n + 1) // 2 for edge in (wanted.start, wanted.stop))
            if first < last:
                here = [slice(None)] * dim + [slice(2 * first + n - wanted.start, None, 2)]
                rows = (*index[:dim], slice(first, last), *index[dim + 1 :])
                one.copy_into(out[tuple(here)], rows)

    shape = (*gate.shape[:dim], 2 * gate.shape[dim], *gate.shape[dim + 1 :])
    return Deferred(shape, gate.dtype, into)


def _split_rows(interleaved: bool, fused: Deferred, dim: int = 0) -> Sequence[Deferred]:
    """Return gate and up."""
    if fused.shape[dim] % 2:
        raise ValueError("an odd number of rows")
    if not interleaved:
        return fused.chunk(2, dim)[::-1]
    shape = (*fused.shape[:dim], fused.shape[dim] // 2, *fused.shape[dim + 1 :])

    def half(n: int) -> Deferred:
        def into(out: Tensor, index: Index) -> None:
            pairs = slice(2 * index[dim].start, 2 * index[dim].stop)
            both = fused.read((*index[:dim], pairs, *index[dim + 1 :]))
            out.copy_(both[(*[slice(None)] * dim, slice(n, None, 2))])

        return Deferred(shape, fused.dtype, into)

    return half(0), half(1)


def _swap(interleaved: bool, split: bool, fused: Deferred) -> Any:
    """Convert experts `[experts, 2 * intermediate, hidden]`: transformers has gate, then up."""
    if split:
        return (_cat(_split_rows(interleaved, fused, 1), 1),)
    gate, up = fused.chunk(2, 1)
    return _join_rows(interleaved, gate, up, 1)
