"""Context parallelism: each rank has a part of every sequence, for models of transformers.

A rank has two chunks of a sequence, one of its beginning and one of its end, so that all have the
same work under a causal mask. Attention gathers the keys and values of all ranks (Llama 3,
https://arxiv.org/abs/2407.21783, section 3.3.2); everything else works token by token. Packed
documents and sliding windows stay as they are on one rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_map_only

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.batch import Batch, Context
from ditty_di.messages import first_of, refuse
from ditty_di.models.weights import transformers_model
from ditty_di.parallelize.collectives import moved
from ditty_di.parallelize.data_parallel import repeated_blocks
from ditty_di.parallelize.fits import Degrees, Parts

#: Name of `attend_to_all` among the attention functions of transformers.
ATTENTION = "ditty_di_context_parallel"

#: Attribute of a split model, and of its attention modules: the `SequenceSplit`.
SPLIT = "_sequence_split"

#: Attention functions of transformers whose numbers `attend_to_all` has.
REPLACED = ("sdpa", "eager")

#: Arguments that say where documents begin in other ways than `position_ids`.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

#: Arguments of attention functions that change scores, and attributes that modules have for them.
_SCORES = {
    "softcap": "attn_logit_softcapping",
    "s_aux": "sinks",
    "position_bias": "relative_attention_bias",
}


def context_parallel(model: nn.Module, /, *, parallel_dims: ParallelDims) -> None:
    """Let a model work on parts of sequences, which `SequenceSplit.cut` makes.

    Args:
        model: on meta or with values.
        parallel_dims: the layout.

    Raises:
        ValueError: the model cannot work on parts of sequences.
    """
    from transformers import AttentionInterface

    mesh = parallel_dims.get_mesh("cp")
    refuse(f"runtime.cp={mesh.size()}: {problem}" for problem in _misfits(model))
    AttentionInterface.register(ATTENTION, attend_to_all)
    split = SequenceSplit(mesh)
    transformers_model(model)[1].set_attn_implementation(ATTENTION)
    for module in (model, *_attention_modules(model)):
        vars(module)[SPLIT] = split


class SequenceSplit:
    """The tokens that a rank has: of `2 * ranks` chunks of a sequence, one and its mirror image.

    Args:
        mesh: the context-parallel ranks.

    Attributes:
        chunks: numbers of this rank's two chunks.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        rank, ranks = mesh.get_local_rank(), mesh.size()
        self.mesh, self.chunks = mesh, (rank, 2 * ranks - 1 - rank)

    @staticmethod
    def of(modules: Iterable[nn.Module]) -> SequenceSplit | None:
        """Return the split of a model's modules; None if sequences are not split.

        Args:
            modules: as a rank trains them.
        """
        return next((vars(m)[SPLIT] for m in modules if SPLIT in vars(m)), None)

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of a tensor.

        Args:
            whole: its length in `dim` is a multiple of `2 * ranks`.
            dim: the dimension of the sequence.
        """
        chunks = whole.chunk(2 * self.mesh.size(), dim)
        return torch.cat([chunks[n] for n in self.chunks], dim)

    def whole(self, own: Tensor, dim: int = 1) -> Tensor:
        """Gather the parts of all ranks; the gradients of all ranks are summed.

        Args:
            own: what `own` returned.
            dim: the dimension of the sequence.
        """
        by_rank = moved(own, self.mesh, Shard(dim), Replicate(), gradient=Partial())
        chunks = by_rank.chunk(2 * self.mesh.size(), dim)
        return torch.cat(chunks[::2] + chunks[1::2][::-1], dim)

    def cut(self, batch: Batch, *, ignore_index: int = -100) -> Batch:
        """Return this rank's part of a batch: of inputs, labels, and tensors of the context.

        Rows are padded on the right to a multiple of `2 * ranks`, with labels that do not count.
        The documents of packed rows become the input `attention_mask` `[rows, 1, own length, 1]`,
        in the form of `attend_to_all`.

        Args:
            batch: whole rows, `inputs["input"]` `[rows, length, ...]`; packed ones have
                `position_ids` that restart with each document.
            ignore_index: label value that the loss excludes.

        Raises:
            ValueError: an input that is not split along the sequence.
        """
        rows, length = batch.inputs["input"].shape[:2]
        filler = -length % (2 * self.mesh.size())

        def own(tensor: Tensor, value: float = 0) -> Tensor:
            padding = (0, 0) * (tensor.dim() - 2) + (0, filler)
            return self.own(F.pad(tensor, padding, value=value) if filler else tensor)

        def part(name: str, value: Any, pad: float = 0) -> Any:
            if not isinstance(value, Tensor) or value.shape[:2] == (rows, length):
                return own(value, pad) if isinstance(value, Tensor) else value
            raise ValueError(
                f"runtime.cp={self.mesh.size()}: {name} has shape {list(value.shape)}, which is "
                f"not split with the sequences {[rows, length]}; use runtime.cp=1"
            )

        if batch.inputs.get("attention_mask") is not None:
            raise ValueError(
                f"runtime.cp={self.mesh.size()}: the batch has an attention_mask; rows that are "
                f"padded on the right need none, and packed rows have position_ids "
                f"(batching=padded or packed), or use runtime.cp=1"
            )
        dropped = {"attention_mask", *_BORDERS}
        inputs = {k: part(k, v) for k, v in batch.inputs.items() if k not in dropped}
        positions = batch.inputs.get("position_ids")
        at = torch.arange(length + filler, device=batch.inputs["input"].device).expand(rows, -1)
        if positions is None:
            inputs["position_ids"] = self.own(at.where(at < length, 0))
        else:
            new = F.pad(positions, (0, filler)).diff(dim=1) != 1
            starts = at.where(F.pad(new, (1, 0), value=True), 0).cummax(1).values
            inputs["attention_mask"] = self.own(starts)[:, None, :, None]
        labels = part("labels", batch.labels, ignore_index)
        context = {
            k: own(v) if isinstance(v, Tensor) and v.shape[:2] == (rows, length) else v
            for k, v in batch.context.items()
        }
        return replace(
            batch, inputs=inputs, labels=labels, context=Context(context), num_valid=None
        )

    def join(self, output: Any, length: int) -> Any:
        """Return a model's output with whole sequences in place of parts.

        Args:
            output: any output, whose tensors `[rows, own length, ...]` are parts.
            length: of the rows before they were cut.
        """
        ranks = self.mesh.size()
        own = -(-length // (2 * ranks)) * 2

        def joined(x: Tensor) -> Tensor:
            parts = x.dim() >= 2 and x.shape[1] == own
            return self.whole(x.contiguous())[:, :length] if parts else x

        return tree_map_only(Tensor, joined, output)


# -- attention ------------------------------------------------------------------------------------


def attend_to_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from this rank's tokens to those of all ranks, in the signature of transformers.

    Args:
        module: the attention module, which has a `SequenceSplit`.
        query: `[rows, heads, own length, dim]`.
        key: `[rows, key heads, own length, dim]`.
        value: as `key`.
        attention_mask: number of the first token of the row that each token may see,
            `[rows, 1, own length, 1]`; None is 0. What comes later is never seen.
        scaling: of the scores; None is that of torch.
        dropout: probability of dropping a score.
        sliding_window: number of tokens, itself included, that a token sees; None is the module's.
        **others: arguments that change no score.

    Returns:
        `[rows, own length, heads, dim]`, and no scores.

    Raises:
        ValueError: an argument that changes scores.
    """
    if found := [name for name in _SCORES if others.get(name) is not None]:
        raise ValueError(
            f"runtime.cp > 1: the attention of {type(module).__name__} has {found[0]}, which is "
            f"not supported; use runtime.cp=1"
        )
    split: SequenceSplit = vars(module)[SPLIT]
    dims = [key.shape[-1], value.shape[-1]]
    both = split.whole(torch.cat((key, value), -1), dim=2)  # one collective
    key, value = both.split(dims, -1)  # [rows, key heads, length, dim]
    window = sliding_window or getattr(module, "sliding_window", None) or key.shape[2]
    first = (None, None) if attention_mask is None else attention_mask.chunk(2, 2)
    outputs = []
    for n, own, first_seen in zip(split.chunks, query.chunk(2, 2), first, strict=True):
        start, end = n * own.shape[2], (n + 1) * own.shape[2]
        begin = max(0, start - window + 1)  # no query sees a key before it, or from `end` on
        if first_seen is None and window >= end:
            mask: Any = causal_lower_right(own.shape[2], end)
        else:
            mask = _visible(range(start, end), range(begin, end), window, first_seen, key.device)
        outputs.append(
            F.scaled_dot_product_attention(
                own,
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _visible(
    queries: range, keys: range, window: int, first: Tensor | None, device: torch.device
) -> Tensor:
    """Return which keys a query sees, bool `[rows or 1, 1, queries, keys]`."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    visible = (key <= query) & (key > query - window)
    return visible[None, None] if first is None else visible & (key >= first)


# -- what fits ------------------------------------------------------------------------------------


def context_fits(parts: Parts, degrees: Degrees) -> list[str]:
    """Return why the parts do not fit context parallelism: a rule of `fits`."""
    if degrees.cp == 1:
        return []
    found = list(_misfits(parts.model))
    loss = parts.loss_fn
    if loss is not None and not getattr(loss, "takes_split_sequences", False):
        found.append(
            f"{type(loss).__name__} is not known to be a sum over "
            f"tokens that ranks can compute in parts; use loss=cross_entropy, causal_lm or chunked"
        )
    elif getattr(loss, "shift", False):
        found.append(
            "the loss shifts labels, and a rank lacks those beyond its chunks; write "
            "loss.shift=false, with data whose labels are the next tokens"
        )
    return [f"runtime.cp={degrees.cp}: {problem}, or runtime.cp=1" for problem in found]


def _misfits(model: nn.Module) -> Iterator[str]:
    """Yield why a model cannot work on parts of sequences."""
    _, base = transformers_model(model)
    name = type(model if base is None else base).__name__
    others = "use a decoder of transformers whose layers all have its attention interface"
    if base is None:
        yield f"{name} is not a model of transformers; {others}"
        return
    if getattr(base.config, "is_encoder_decoder", False):
        yield f"{name} is an encoder-decoder; {others}"
        return
    if "position_ids" not in inspect.signature(base.forward).parameters:
        yield f"{name} does not take position_ids; {others}"
        return
    attention = {id(m) for m in _attention_modules(model)}
    for number, block in enumerate(repeated_blocks(model).children()):
        inside = list(block.modules())
        recurrent = [m for m in inside if isinstance(m, nn.Conv1d | nn.RNNBase)]
        if recurrent or not any(id(m) in attention for m in inside):
            yield (
                f"layer {number} of {name} does not work by attention alone, so it would see a "
                f"part of each sequence only; {others}"
            )
            return
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        yield f"layers of {name} have {first_of(sorted(unknown))}; {others}"
    for attribute in _SCORES.values():
        if any(getattr(m, attribute, None) is not None for m in _attention_modules(model)):
            yield f"the attention of {name} has {attribute}, which is not supported; {others}"
    rotary = {str(getattr(m, "rope_type", "")) for m in model.modules()}
    if scaled := [kind for kind in ("dynamic", "longrope") if any(kind in r for r in rotary)]:
        yield (
            f"the positions of {name} (rope_type {scaled[0]}) depend on the longest row, of which "
            f"a rank knows a part; use another rope_type"
        )
    if (chosen := config._attn_implementation) not in (*REPLACED, ATTENTION, None):
        yield f"{chosen} does not gather keys and values; write model.attn_implementation=sdpa"


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the causal attention modules that call an attention function of transformers."""
    return [
        m
        for m in model.modules()
        if getattr(m, "is_causal", False) is True
        and "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(m).forward).__globals__
    ]
