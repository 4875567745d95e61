"""The same training on every layout: models, variants, layouts, and the cells that are tried.

`test_matrix.py` runs the cells. To add a layout, add it to `LAYOUTS` (with the arguments of
`parallelize`, or other slots of the trainer, that it needs) and its cells to `CELLS`. What a cell
is refused with is in `REFUSED`. `python -m tests.parallelize.matrix` prints the table of
`ditty_di/parallelize/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ditty_di import losses, quantization
from ditty_di.adapters import apply_adapter
from ditty_di.models.causal_lm import from_config, from_pretrained
from ditty_di.models.titan import llama3
from ditty_di.parallelize.activation_checkpointing import full, offload
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.stages import split
from ditty_di.parallelize.titan import parallelize_llama, pipeline_llama

VOCAB = 64

#: (model, variant, layout)
Cell = tuple[str, str, str]


# -- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A tiny model: `build(transforms, folder)`, whose values are those of a folder, if any."""

    build: Callable[[dict[str, Any], Path | None], nn.Module]
    parallelize: Callable[..., nn.Module] = parallelize
    pipeline: Callable[..., Any] = split
    output: str | None = "logits"


def _config(kind: str, **changes: Any) -> Any:
    import transformers as T

    from ditty_di.models.cross_layer import CrossLayerConfig

    small = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.1},
        **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    }
    gemma = {
        **{"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"tie_word_embeddings": True},
    }
    experts = {
        **{"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        **{"decoder_sparse_step": 1, "norm_topk_prob": True},
    }
    gpt2 = {
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **{"bos_token_id": 1, "eos_token_id": 1},
    }
    hybrid = {
        **{"layer_types": ["linear_attention", "full_attention"] * 2, "initializer_range": 0.02},
        **{"head_dim": 8, "num_experts": 0, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    }
    make, values = {
        "llama": (T.LlamaConfig, small),
        "qwen3": (T.Qwen3Config, {**small, "head_dim": 8}),
        "gemma3": (T.Gemma3TextConfig, {**small, **gemma}),
        "qwen3_moe": (T.Qwen3MoeConfig, {**small, **experts}),
        "mixtral": (T.MixtralConfig, {**small, "num_local_experts": 4, "num_experts_per_tok": 2}),
        "gpt2": (T.GPT2Config, gpt2),
        "cross_layer": (CrossLayerConfig, small),
        "qwen3_next": (T.Qwen3NextConfig, {**small, **hybrid}),
    }[kind]
    return make(**{**values, **changes})


def _hugging_face(
    kind: str, transforms: dict[str, Any], folder: Path | None, **changes: Any
) -> nn.Module:
    config = _config(kind, **changes)
    if folder is None:
        return from_config(config, **transforms)
    if not folder.exists():
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return from_pretrained(folder, **transforms)


def _titan(transforms: dict[str, Any], folder: Path | None) -> nn.Module:
    size = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64}
    return llama3(**size, vocab_size=VOCAB, max_seq_len=64)


def _model(kind: str, **changes: Any) -> Model:
    return Model(partial(_hugging_face, kind, **changes))


MODELS: dict[str, Model] = {
    "titan Llama": Model(_titan, parallelize_llama, pipeline_llama, output=None),
    "Llama": _model("llama"),
    "Llama, tied": _model("llama", tie_word_embeddings=True),
    "Llama, vocabulary of 53": _model("llama", tie_word_embeddings=True, vocab_size=53),
    "Llama, biases": _model("llama", attention_bias=True, mlp_bias=True),
    "Qwen3": _model("qwen3"),
    "Gemma3": _model("gemma3"),
    "Qwen3-MoE": _model("qwen3_moe"),
    "Mixtral": _model("mixtral"),
    "GPT-2": _model("gpt2"),
    "Llama, shared keys and values": _model("cross_layer"),
    "Qwen3-Next": _model("qwen3_next"),
}


# -- variants -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How a model is trained.

    Attributes:
        pretrained: read the values from a folder.
        packed: two documents a row.
        length: tokens of a row.
        accumulation: micro-batches of an optimizer step.
        steps: of the optimizer, as few as lower the loss.
        transforms: of the model, by slot.
        loss: of logits at an output.
        options: arguments of the parallelize function.
    """

    pretrained: bool = False
    packed: bool = False
    length: int = 32
    accumulation: int = 1
    steps: int = 5
    transforms: dict[str, Any] = field(default_factory=dict)
    loss: Callable[..., Any] = losses.CrossEntropyLoss
    options: dict[str, Any] = field(default_factory=dict)


def lora(model: nn.Module, targets: Any = "all-linear") -> nn.Module:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    return apply_adapter(model, config=config)


def mean_over_tokens(*, output: str) -> Any:
    """A plain function of output and labels, which gets whole logits."""

    def loss(output: Any, labels: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
        logits = output.logits.flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index)

    return loss


_NF4 = partial(quantization.nf4, block_size=16, double_quant=True)
_BESIDE_EXPERTS = {
    "adapter": partial(lora, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "quantize": partial(_NF4, skip=("lm_head", "experts")),
}

VARIANTS: dict[str, Variant] = {
    "": Variant(),
    "pretrained": Variant(pretrained=True),
    "packed": Variant(packed=True),
    "packed, recomputed": Variant(packed=True, options={"activation_checkpointing": full}),
    "accumulated": Variant(accumulation=2),
    "rows of 31": Variant(length=31),
    "chunked loss": Variant(loss=lambda output: losses.LinearCrossEntropyLoss(chunk_tokens=20)),
    "plain loss": Variant(loss=mean_over_tokens),
    "LoRA": Variant(pretrained=True, transforms={"adapter": lora}),
    "LoRA on NF4": Variant(
        pretrained=True, steps=8, transforms={"adapter": lora, "quantize": _NF4}
    ),
    "LoRA on NF4 beside experts": Variant(pretrained=True, steps=10, transforms=_BESIDE_EXPERTS),
    "LoRA on int8": Variant(
        pretrained=True, transforms={"adapter": lora, "quantize": quantization.int8}
    ),
    "recomputed": Variant(options={"activation_checkpointing": full}),
    "activations on the host": Variant(options={"activation_checkpointing": offload}),
    "parameters on the host": Variant(options={"cpu_offload": True}),
    "separate embeddings": Variant(
        options={"separate_embeddings": True, "prefetch_blocks": 2},
        loss=lambda output: losses.LinearCrossEntropyLoss(chunk_tokens=20),
    ),
}


# -- layouts and cells ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How many ranks, their degrees, and what uses them.

    Attributes:
        ranks: number of processes.
        degrees: arguments of the runtime.
        options: arguments of the parallelize function.
        slots: other arguments of the trainer.
        schedule: of the pipeline.
        micro_batches: of an optimizer step on a rank, if the variant has no more.
    """

    ranks: int
    degrees: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    schedule: str = "1F1B"
    micro_batches: int = 1


def _stages(ranks: int = 2, schedule: str = "1F1B", *, pp: int = 2, **degrees: int) -> Layout:
    return Layout(ranks, {"pp": pp, **degrees}, schedule=schedule, micro_batches=4)


LAYOUTS: dict[str, Layout] = {
    "fsdp 2": Layout(2),
    "tp 2": Layout(2, {"tp": 2}),
    "tp 2 x fsdp 2": Layout(4, {"tp": 2}),
    "tp 2 x ddp 2": Layout(4, {"tp": 2, "dp_replicate": 2}),
    "cp 2": Layout(2, {"cp": 2}),
    "cp 2 x fsdp 2": Layout(4, {"cp": 2}),
    "cp 2 x tp 2": Layout(4, {"cp": 2, "tp": 2}),
    "ep 2": Layout(2, {"ep": 2}),
    "ep 2 x fsdp 2": Layout(4, {"ep": 2}),
    "ep 2 x cp 2": Layout(4, {"ep": 2, "cp": 2}),
    "ep 2 x tp 2": Layout(4, {"ep": 2, "tp": 2}),
    "pp 2": _stages(),
    "pp 2 GPipe": _stages(2, "GPipe"),
    "pp 2 Interleaved1F1B": _stages(2, "Interleaved1F1B"),
    "pp 2 InterleavedZeroBubble": _stages(2, "InterleavedZeroBubble"),
    "pp 2 ZBVZeroBubble": _stages(2, "ZBVZeroBubble"),
    "pp 4": _stages(4, pp=4),
    "pp 2 x fsdp 2": _stages(4),
    "pp 2 x ddp 2": _stages(4, dp_replicate=2, dp_shard=1),
    "pp 2 x tp 2": _stages(4, tp=2),
    "pp 2 x tp 2 Interleaved1F1B": _stages(4, "Interleaved1F1B", tp=2),
    "pp 2 x fsdp 2 ZBVZeroBubble": _stages(4, "ZBVZeroBubble"),
    "pp 2 x cp 2": _stages(4, cp=2),
}


def _cells(model: str, layouts: str, *variants: str) -> list[Cell]:
    return [(model, v, layout) for v in variants for layout in layouts.split(", ")]


_STAGED = ("titan Llama", "Llama", "Llama, tied", "Qwen3", "Gemma3", "Qwen3-MoE", "GPT-2")

CELLS: list[Cell] = [
    *(cell for model in MODELS for cell in _cells(model, "fsdp 2, tp 2, tp 2 x fsdp 2", "")),
    *_cells("Llama", "fsdp 2", "separate embeddings", "parameters on the host"),
    *_cells("Llama", "tp 2", "plain loss", "recomputed", "activations on the host"),
    *_cells("Llama", "tp 2 x fsdp 2", "separate embeddings"),
    *_cells("Llama, vocabulary of 53", "tp 2 x fsdp 2", "accumulated", "chunked loss"),
    *_cells("Llama, biases", "tp 2", "LoRA"),
    *_cells("Qwen3", "tp 2", "rows of 31", "accumulated", "LoRA on NF4", "LoRA on int8"),
    *_cells("Qwen3", "tp 2 x fsdp 2", "packed", "pretrained", "LoRA on NF4"),
    *_cells("Gemma3", "tp 2", "packed", "chunked loss"),
    *_cells("Qwen3", "tp 2 x ddp 2", ""),
    *_cells("Llama", "cp 2", "chunked loss", "LoRA", "accumulated", "plain loss"),
    *_cells("Llama, tied", "cp 2", "", "packed"),
    *_cells("Llama, tied", "cp 2 x fsdp 2", "packed"),
    *_cells("Qwen3", "cp 2", "rows of 31", "packed", "LoRA on NF4"),
    *_cells("Qwen3", "cp 2 x tp 2", "packed"),
    *_cells("Gemma3", "cp 2", "", "packed"),
    *_cells("Gemma3", "cp 2 x fsdp 2, cp 2 x tp 2", ""),
    *_cells("GPT-2", "cp 2", "packed"),
    *_cells("Qwen3-MoE", "cp 2", "", "packed"),
    *_cells("Qwen3-MoE", "fsdp 2", "LoRA on NF4"),
    *_cells("Qwen3-MoE", "ep 2", "", "packed", "accumulated", "LoRA on NF4 beside experts", "LoRA"),
    *_cells("Qwen3-MoE", "ep 2 x fsdp 2, ep 2 x cp 2, ep 2 x tp 2", "packed"),
    *_cells("Mixtral", "ep 2, ep 2 x fsdp 2", ""),
    *_cells("Llama", "ep 2", ""),
    *(cell for model in _STAGED for cell in _cells(model, "pp 2", "")),
    *_cells("titan Llama", "pp 2 Interleaved1F1B, pp 2 x fsdp 2", ""),
    *_cells("Llama, tied", "pp 2 GPipe, pp 2 Interleaved1F1B", ""),
    *_cells("Llama, vocabulary of 53", "pp 2", "parameters on the host"),
    *_cells("Llama, biases", "pp 2 GPipe", "plain loss"),
    *_cells("Gemma3", "pp 2 Interleaved1F1B", ""),
    *_cells("Llama", "pp 2 InterleavedZeroBubble", "recomputed"),
    *_cells("Llama", "pp 2 ZBVZeroBubble, pp 2 x fsdp 2 ZBVZeroBubble, pp 2 x cp 2", ""),
    *_cells("Llama", "pp 2 x fsdp 2", "separate embeddings"),
    *_cells("Llama, tied", "pp 4, pp 2 x fsdp 2", ""),
    *_cells("Qwen3", "pp 2", "packed", "chunked loss", "LoRA on NF4"),
    *_cells("Qwen3", "pp 2 InterleavedZeroBubble, pp 2 x tp 2", "LoRA on NF4"),
    *_cells("Gemma3", "pp 2 x tp 2 Interleaved1F1B", "packed"),
    *_cells("GPT-2", "pp 2 x ddp 2", ""),
    *_cells("Llama, shared keys and values", "fsdp 2", "packed, recomputed", "LoRA"),
    *_cells("Llama, shared keys and values", "cp 2", "packed"),
    *_cells("Llama, shared keys and values", "pp 2", ""),
    *_cells("Qwen3-Next", "fsdp 2", "packed, recomputed"),
    *_cells("Qwen3-Next", "cp 2, pp 2", ""),
]

_SAYS = "runtime.tp=2: "
_NO_PLAN = "has no tensor-parallel plan (tp_plan), which says how layers are split; tp fits 1"
_EXPERTS = (
    f"{_SAYS}tensor parallelism does not split experts (model.layers.*.mlp.experts), whose rows on "
    "a rank are not one piece of the checkpoint's: runtime.ep splits them; tp fits 1"
)

#: What a cell is answered with before the run.
REFUSED: dict[Cell, str] = {
    ("GPT-2", "", layout): f"{_SAYS}GPT2LMHeadModel {_NO_PLAN}"
    for layout in ("tp 2", "tp 2 x fsdp 2")
} | {
    (model, "", layout): _EXPERTS
    for model in ("Qwen3-MoE", "Mixtral")
    for layout in ("tp 2", "tp 2 x fsdp 2")
}
REFUSED["Llama", "", "ep 2"] = (
    "runtime.ep=2: LlamaForCausalLM has no expert-parallel plan (ep_plan); ep fits 1"
)
REFUSED["Qwen3-MoE", "LoRA", "ep 2"] = (
    "runtime.ep=2: model.layers.*.mlp.experts.gate_up_proj is not a plain parameter, for experts "
    "with adapters or packed experts cannot be split; leave them out "
    "(adapter.config.target_modules, quantize.skip=[lm_head,experts]), or ep fits 1"
)
REFUSED["Llama", "plain loss", "cp 2"] = (
    "runtime.cp=2: PlainLoss is not known to be a sum over tokens that ranks can compute in parts; "
    "use loss=cross_entropy, causal_lm or chunked, or runtime.cp=1"
)

REFUSED["Qwen3-Next", "", "tp 2"] = REFUSED["Qwen3-Next", "", "tp 2 x fsdp 2"] = (
    f"{_SAYS}the model's plan has colwise_gather_output for "
    "model.layers.*.linear_attn.in_proj_qkvz, which is not supported together with sequence "
    "parallelism; tp fits 1"
)
REFUSED["Qwen3-Next", "", "cp 2"] = (
    "runtime.cp=2: layer 0 of Qwen3NextForCausalLM does not work by attention alone, so it would "
    "see a part of each sequence only; use a decoder of transformers whose layers all have its "
    "attention interface, or runtime.cp=1"
)
REFUSED["Llama, shared keys and values", "", "pp 2"] = (
    "runtime.pp=2: its blocks get key_values from before the block of the cut"
)
REFUSED["Llama", "", "pp 2 x fsdp 2 ZBVZeroBubble"] = (
    "pipeline.schedule=ZBVZeroBubble: it fits runtime.dp_shard=1, and not 2, or "
    "pipeline.schedule=Interleaved1F1B"
)
REFUSED["Llama", "", "pp 2 x cp 2"] = (
    "runtime.pp=2: stages are not split along the sequence; write runtime.cp=1, or runtime.pp=1"
)

#: By model: layouts of which each saves a checkpoint that all resume.
RESUMED: dict[str, tuple[str, ...]] = {
    "Llama, vocabulary of 53": ("one", "fsdp 2", "tp 2", "cp 2", "tp 2 x fsdp 2"),
    "Qwen3-MoE": ("one", "fsdp 2", "ep 2", "ep 2 x fsdp 2"),
    "Llama, tied": ("one", "pp 2 Interleaved1F1B", "pp 2 x tp 2"),
}


def ranks_of(layout: str) -> int:
    """The number of ranks; `one` is a single one."""
    return LAYOUTS[layout].ranks if layout in LAYOUTS else 1


# -- the table ------------------------------------------------------------------------------------


def table() -> str:
    """What was tried, for people: models by layouts, in Markdown."""
    tried = [name for name in LAYOUTS if any(cell[2] == name for cell in CELLS)]
    notes, lines = list(dict.fromkeys(REFUSED.values())), list[str]()
    for staged in (False, True):
        layouts = [name for name in tried if ("pp" in LAYOUTS[name].degrees) == staged]
        lines += ["| model | " + " | ".join(layouts) + " |", "| --- " * (len(layouts) + 1) + "|"]
        for model in MODELS:
            entries = [_entry(model, layout, notes) for layout in layouts]
            lines += ["| " + " | ".join([model, *entries]) + " |"] if any(entries) else []
        lines.append("")
    said = [f"{n}. `{note}`" for n, note in enumerate(notes, 1)]
    return "\n".join([*lines, "Refused before the run:", "", *said])


def _entry(model: str, layout: str, notes: list[str]) -> str:
    def parts() -> Iterator[str]:
        for cell in CELLS:
            if (cell[0], cell[2]) == (model, layout):
                refused = REFUSED.get(cell)
                if refused is None:
                    yield cell[1] or "equal"
                else:
                    yield f"{cell[1]} refused ({notes.index(refused) + 1})".lstrip()

    return ", ".join(parts())


if __name__ == "__main__":
    print(table())
