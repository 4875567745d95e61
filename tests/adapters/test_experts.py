"""LoRA on fused experts: the numbers of stock peft, on plain and packed weights and two ranks."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ditty_di import adapters
from ditty_di.export import AdapterExport, MergedExport
from ditty_di.models import causal_lm
from ditty_di.models.coverage import summary
from ditty_di.models.pretrained import Pretrained
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.quantization import int8, nf4
from ditty_di.runtime import Runtime
from ditty_di.training.setup import setup_model
from tests.adapters.cases import lora
from tests.checkpoint import ranks
from tests.models.families import CAUSAL, EXPERTS, RARE, config
from tests.models.test_experts import unpacked
from tests.models.test_families import TOKENS, save
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import fill

#: On two ranks: (family, quantize).
SHARDED = (("qwen2_moe", None), ("qwen2_moe", nf4), ("gpt_oss", int8), ("jetmoe", nf4))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for name in {*EXPERTS, *(name for name, _ in SHARDED)}:
        save(folder / name, config(name, CAUSAL[name]), "causal")
    return folder


def adapted(folder, **transforms):
    """A model with adapters that do something."""
    model = causal_lm.from_pretrained(folder, adapter=lora(), **transforms)
    fill(model, folder, init_missing=partial(adapters.initialize, seed=3))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss(model):
    return F.cross_entropy(model(TOKENS, use_cache=False).logits[0, :-1], TOKENS[0, 1:])


def assert_alike(ours, stock):
    """Loss, logits and the gradient of every adapter parameter are the same."""
    for model in (ours, stock):
        model.eval()
        loss(model).backward()
    wanted = trained(stock)
    assert trained(ours).keys() == wanted.keys()
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        one, two = (model(TOKENS, use_cache=False).logits for model in (ours, stock))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_stock_peft_opens_the_adapters_with_equal_logits_and_gradients(bases, name, tmp_path):
    model = adapted(bases / name)
    named = " ".join(model.peft_config["default"].target_parameters)
    assert "experts.gate_up_proj" in named and "experts.down_proj" in named
    AdapterExport(tokenizer(97), str(tmp_path / "adapter"))([model])
    base = AutoModelForCausalLM.from_pretrained(bases / name)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert_alike(model, stock)
    assert "neither trained nor adapted: model.embed_tokens.weight" in summary(model)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize", [nf4, int8])
def test_on_packed_experts_it_is_stock_peft_on_the_dequantized_weights(
    bases, name, quantize, tmp_path
):
    model = adapted(bases / name, quantize=quantize)
    AdapterExport(tokenizer(97), str(tmp_path / "adapter"))([model])
    base = unpacked(model.get_base_model(), AutoModelForCausalLM.from_pretrained(bases / name))
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert_alike(model, stock)
    with pytest.raises(ValueError, match="export=merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_merged_adapters_open_in_stock_transformers(bases, name, tmp_path):
    model = adapted(bases / name, quantize=nf4 if name == "qwen2_moe" else None)
    path = str(tmp_path / "merged")
    rows = [({"input": TOKENS[0]}, TOKENS[0])]
    MergedExport(tokenizer(97), path, dtype="float32", dataset=rows)([model])
    plain = adapted(bases / name)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(path)(TOKENS, use_cache=False).logits
        torch.testing.assert_close(merged, plain(TOKENS, use_cache=False).logits, rtol=0, atol=1e-5)


def test_all_linear_names_the_experts_and_leaves_the_router(bases):
    model = causal_lm.from_pretrained(bases / "deepseek_v3", adapter=lora())
    found = json.loads(json.dumps(adapters.adapter_config(model)))
    assert found["target_parameters"] == [
        *("down_proj.weight", "gate_proj.weight"),
        *("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "up_proj.weight"),
    ]
    model = causal_lm.from_pretrained(bases / "qwen2_moe", adapter=lora())
    assert not any("mlp.gate." in name for name in trained(model))
    named = lora(target_parameters=["mlp.gate.weight"])
    model = causal_lm.from_pretrained(bases / "qwen2_moe", adapter=named)
    assert sum("mlp.gate." in name for name in trained(model)) == 4


@pytest.mark.parametrize(
    "name, router, beside",
    [
        ("dbrx", "ffn.router.layer", "out_proj"),
        ("jetmoe", "router.layer", "self_attention.kv_proj"),
        ("phimoe", "mlp.router", "q_proj"),
        ("afmoe", "mlp.router.gate", "q_proj"),
    ],
)
def test_routers_that_are_linear_layers_have_no_adapter(name, router, beside):
    changes = {**CAUSAL, **RARE}[name]
    model = causal_lm.from_config(config(name, changes), adapter=lora())
    assert any(f".{router}." in f"{path}." for path, _ in model.named_modules())
    assert not any(f".{router}." in path for path in trained(model))
    assert any(f"{beside}.lora_A" in path for path in trained(model))


@pytest.mark.parametrize(
    "options, why",
    [
        ({"lora_dropout": 0.1}, "LoRA adapts them without lora_dropout"),
        ({"use_dora": True}, "LoRA adapts them without use_dora"),
        ({"init_lora_weights": "orthogonal"}, "without init_lora_weights=orthogonal"),
    ],
)
def test_options_that_experts_do_not_have_leave_them_out_with_a_warning(
    bases, options, why, caplog
):
    model = causal_lm.from_pretrained(bases / "qwen3_moe", adapter=lora(**options))
    assert not any("experts" in name for name in trained(model))
    assert "mlp.experts.gate_up_proj" in caplog.text and why in caplog.text


def test_a_parameter_that_the_model_lacks_is_named(bases):
    message = r"'mlp\.experts\.gate_proj', but no .*did you mean 'mlp\.experts\.gate_up_proj'"
    with pytest.raises(ValueError, match=message):
        causal_lm.from_pretrained(
            bases / "qwen3_moe", adapter=lora(target_parameters=["mlp.experts.gate_proj"])
        )


def gradients(folder):
    """First values, and the gradient of every adapter parameter, of rows that ranks share."""
    runtime = Runtime(seed=0)
    rows = (torch.arange(48).view(4, 12) * 11) % 90 + 3
    found = {}
    for name, quantize in SHARDED:
        model = causal_lm.from_pretrained(folder / name, adapter=lora(), quantize=quantize)
        (model,) = setup_model(
            model,
            runtime=runtime,
            weights=Pretrained(folder / name, init_missing=adapters.initialize),
            parallelize_fn=partial(shard, activation_checkpointing=full),
            pipeline_fn=None,
        ).modules
        values = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for i, (key, parameter) in enumerate(values.items()):
                if "lora_B" in key:
                    getattr(parameter, "_local_tensor", parameter).fill_(0.01 * (i % 5 - 2))
        own = rows[runtime.rank :: runtime.world_size]
        output = model(own, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = own[:, 1:].flatten()
        (F.cross_entropy(output, labels, reduction="sum") / 44).backward()
        for key, parameter in values.items():
            for tensor, what in ((parameter, "value"), (parameter.grad, "gradient")):
                whole = getattr(tensor, "full_tensor", tensor.detach)()
                found[f"{name} {quantize} {key} {what}"] = whole.detach().clone().numpy()
    runtime.close()
    return found


def test_two_sharded_ranks_have_the_gradients_of_one(bases):
    (alone,) = ranks.run(gradients, 1, bases)
    both = ranks.run(gradients, 2, bases)
    assert any("experts" in key and value.any() for key, value in alone.items())
    for key, value in alone.items():
        for other in both:
            wanted = torch.from_numpy(value)
            torch.testing.assert_close(torch.from_numpy(other[key]), wanted, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_experts_in_bfloat16_sees_small_updates(bases):
    """The sum of weight and update would round them away."""
    base = bases / "qwen3_moe"
    model = causal_lm.from_pretrained(base, adapter=lora(), dtype="bfloat16")
    fill(model, base, init_missing=adapters.initialize)
    with torch.no_grad():
        before = model(TOKENS, use_cache=False).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "experts" in name:
                parameter.fill_(2e-4)
        assert not torch.equal(model(TOKENS, use_cache=False).logits, before)
