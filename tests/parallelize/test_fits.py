"""What does not fit a layout is said before the run, with what would."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import transformers as T

from ditty_di import quantization
from ditty_di.adapters import apply_adapter
from ditty_di.losses import LigerLinearCrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.fits import Degrees, Parts, fits
from ditty_di.parallelize.titan import parallelize_llama
from tests.models import families
from tests.parallelize.matrix import MODELS

LLAMA, QWEN_MOE = MODELS["Llama"], MODELS["Qwen3-MoE"]


def llama(**transforms: Any) -> Any:
    return LLAMA.build(transforms, None)


def family(kind: str) -> Any:
    return from_config(families.config(kind, families.CAUSAL[kind]))


def adapter(make: Any, **options: Any) -> Any:
    return partial(apply_adapter, config=make(**options))


def problems(model: Any, function: Any = parallelize, loss: Any = None, **degrees: int) -> list:
    return fits(Parts(model, loss, partial(function)), Degrees(**degrees))


def test_one_rank_and_data_parallel_ranks_fit_everything():
    for kind in ("gpt2", "qwen3_next", "llama"):
        assert problems(family(kind), dp_shard=8, dp_replicate=2) == []
    assert problems(llama(), tp=2) == []


@pytest.mark.parametrize("tp", [3, 4])
def test_heads_that_do_not_divide_come_with_the_degrees_that_do(tp):
    found = problems(llama(), tp=tp)
    assert f"runtime.tp={tp}: 2 key-value heads; tp fits 1, 2" in found
    assert (f"runtime.tp={tp}: 4 heads; tp fits 1, 2" in found) == (tp == 3)
    titan = MODELS["titan Llama"].build({}, None)
    assert problems(titan, parallelize_llama, tp=tp) == found


@pytest.mark.parametrize(
    "kind, said",
    [
        ("gpt2", "GPT2LMHeadModel has no tensor-parallel plan (tp_plan)"),
        ("phi3", "colwise_gather_output for model.layers.*.self_attn.qkv_proj, which is not"),
        ("deepseek_v2", "mla_kv_a_proj for model.layers.*.self_attn.kv_a_proj_with_mqa"),
        ("mixtral", "does not split experts (model.layers.*.mlp.experts)"),
        # Beside attention these have layers that mix tokens and that their plans leave out.
        ("lfm2", "does not tell how conv.conv.weight, conv.in_proj.weight"),
        ("falcon_h1", "does not tell how feed_forward.gate_proj.weight"),
        # A parameter of one dimension, of which each rank would have other parts.
        ("apertus", "does not tell how mlp.act_fn.alpha_p, mlp.act_fn.alpha_n of a block"),
    ],
)
def test_models_whose_plan_does_not_say_enough_are_refused(kind, said):
    found = problems(family(kind), tp=2)
    assert any(said in problem for problem in found), found
    assert all(p.startswith("runtime.tp=2: ") and p.endswith("; tp fits 1") for p in found)


@pytest.mark.parametrize(
    "transform, said",
    [
        (
            adapter(peft.LoraConfig, use_dora=True),
            "DoRA, which needs norms of whole rows, is not split; plain LoRA is (adapter=lora)",
        ),
        (adapter(peft.LoraConfig, lora_bias=True), "LoRA with lora_bias is not split"),
        (
            adapter(peft.IA3Config, target_modules=["k_proj"], feedforward_modules=[]),
            "an adapter of the kind Linear is not split; plain LoRA is",
        ),
        (
            adapter(peft.LoraConfig, target_modules=["embed_tokens"]),
            "an embedding of the kind Embedding is not split, a plain one is",
        ),
        (
            adapter(peft.LoraConfig, modules_to_save=["lm_head"]),
            "a layer of the kind ModulesToSaveWrapper is not split",
        ),
    ],
    ids=["dora", "lora_bias", "ia3", "embedding", "head"],
)
def test_adapters_that_cannot_be_split_are_refused(transform, said):
    found = problems(llama(adapter=transform), tp=2)
    assert len(found) == 1 and said in found[0], found


def test_packed_rows_are_split_between_blocks_only():
    nf4 = partial(quantization.nf4, block_size=32)
    found = problems(llama(quantize=nf4), tp=2)
    said = "32 inputs of model.layers.0.self_attn.o_proj in quantized blocks of 32; tp fits 1"
    assert found == [f"runtime.tp=2: {said}"]
    assert problems(llama(quantize=partial(nf4, block_size=16)), tp=2) == []
    assert problems(llama(quantize=quantization.int8), tp=2) == []


def test_a_loss_that_multiplies_by_the_whole_head_is_refused():
    loss = LigerLinearCrossEntropyLoss.__new__(LigerLinearCrossEntropyLoss)  # needs a GPU
    (found,) = problems(llama(), loss=loss, tp=2)
    assert "whole output projection" in found and "loss=chunked" in found
    assert problems(llama(), loss=loss) == []


def test_degrees_that_nothing_uses_are_refused():
    assert problems(llama(), ep=2) == [
        "runtime.ep=2: LlamaForCausalLM has no expert-parallel plan (ep_plan); ep fits 1"
    ]
    titan = MODELS["titan Llama"].build({}, None)
    assert problems(titan, parallelize_llama, ep=2) == [
        "runtime.ep=2: torchtitan's Llama has no experts; ep fits 1"
    ]


def test_experts_that_are_split_otherwise_are_no_obstacle():
    parts = Parts(QWEN_MOE.build({}, None), None, parallelize)
    assert fits(parts, Degrees(tp=2, ep=2)) == []
    (found,) = fits(parts, Degrees(tp=2))
    assert "runtime.ep splits them" in found


def test_titan_llamas_own_function_takes_no_other_model():
    (found,) = problems(llama(), parallelize_llama, tp=2)
    assert "write parallelize=fsdp" in found


def test_vocabularies_that_leave_a_rank_without_rows_are_refused():
    config = T.LlamaConfig(vocab_size=9, hidden_size=64, num_attention_heads=8, num_hidden_layers=1)
    (found,) = problems(from_config(config), tp=8)
    assert found == "runtime.tp=8: 9 rows of model.embed_tokens; tp fits 1, 2"
