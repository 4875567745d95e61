"""What ranks do here: models with adapters, built, trained, saved and read."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by the first DTensor operation otherwise, in every rank
from peft import LoraConfig
from torch import nn
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from ditty_di import adapters, quantization
from ditty_di.checkpoint import Checkpointer
from ditty_di.models.causal_lm import from_pretrained
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize, uninitialized
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.distributed import cases as distributed
from tests.models import tiny

CPU = torch.device("cpu")
STEPS, RESUME_AT = distributed.STEPS, distributed.RESUME_AT


def save_base(folder: Path, *, seed: int = 0, tie: bool = False, layers: int = 2) -> str:
    """A tiny Llama with random values, as `save_pretrained` writes it."""
    size = {"vocab_size": distributed.VOCAB, "hidden_size": 128, "intermediate_size": 192}
    config = tiny.llama(
        **size, num_hidden_layers=layers, max_position_embeddings=64, tie_word_embeddings=tie
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_experts(folder: Path) -> str:
    """A tiny Qwen2-MoE, which has a shared expert."""
    config = Qwen2MoeConfig(
        vocab_size=distributed.VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


def lora(**options: Any) -> Any:
    """The adapter slot, as conf/adapter/lora.yaml fills it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return partial(adapters.apply_adapter, config=config)


def pretrained(base: str, seed: int = 3) -> Pretrained:
    return Pretrained(base, init_missing=partial(adapters.initialize, seed=seed))


def filled(base: str, seed: int = 3, **transforms: Any) -> nn.Module:
    """A model on one rank, with its values."""
    model = from_pretrained(base, **transforms)
    materialize(model, CPU)
    pretrained(base, seed)(model, device=CPU)
    assert not uninitialized(model)
    return model


def ids(rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(distributed.VOCAB, (rows, 12), generator=generator)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": lora(lora_dropout=0.1)},
    "qlora": {"adapter": lora(), "quantize": quantization.nf4},
    "int8-dora": {"adapter": lora(use_dora=True), "quantize": quantization.int8},
    "qlora-bf16": {"adapter": lora(), "quantize": quantization.nf4, "dtype": "bfloat16"},
    "tied-head": {"adapter": lora(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)},
    "experts": {"adapter": lora(), "quantize": quantization.nf4},
}
#: Bases other than the plain Llama: one whose head is its embedding, and a mixture of experts.
BASES = {"tied-head": "-tied", "experts": "-experts"}
#: Those whose checkpoints are gone on from.
RESUMED = ("lora", "qlora", "int8-dora", "tied-head", "experts")


def slots(base: str, variant: str, **more: Any) -> dict[str, Any]:
    base += BASES.get(variant, "")
    return {
        "model": from_pretrained(base, **VARIANTS[variant]),
        "weights": pretrained(base),
        "parallelize_fn": partial(shard, **more),
    }


def train(folder: Path | None, base: str, variant: str, **options: Any) -> list[float]:
    """The losses, and a digest of all parameters at the end."""
    return distributed.train(folder, **slots(base, variant), **options)


def whole_runs(folder: Path, base: str) -> dict[str, list[float]]:
    """Every variant from the start to the end, with checkpoints in `folder`."""
    return {variant: train(folder / variant, base, variant) for variant in VARIANTS}


def resumed_runs(folder: Path, base: str, sources: list[Path]) -> list[dict[str, list[float]]]:
    """Those of RESUMED from a copy of each source's checkpoint of step RESUME_AT to the end."""
    return [
        {v: resumed(folder / str(i) / v, base, source / v) for v in RESUMED}
        for i, source in enumerate(sources)
    ]


def resumed(folder: Path, base: str, source: Path, variant: str = "", **options: Any) -> Any:
    start = source / "checkpoints" / f"step-{RESUME_AT:08d}"
    runtime = Runtime(seed=3)
    if runtime.rank == 0:
        shutil.copytree(start, folder / "checkpoints" / start.name)
    runtime.any(False)  # a barrier: the copy is there
    return train(folder, base, variant or source.name, **options)


def checkpointer(folder: Path, **options: Any) -> Any:
    return partial(Checkpointer, str(folder / "checkpoints"), keep_latest_k=None, **options)
