"""What is written of an adapter opens in stock peft and gives the same logits."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from ditty_di import adapters, quantization
from ditty_di.models.causal_lm import from_pretrained
from ditty_di.models.weights import materialize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.adapters.cases import CPU, filled, ids, lora, pretrained
from tests.checkpoint import ranks

KINDS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "copies": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices=[3, 60]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
}


def perturb(model):
    """As if it had been trained: the same on any layout."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.01 * (i % 7 - 3))


def written(folder, model):
    folder.mkdir(exist_ok=True)
    save_file(adapters.adapter_state(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapters.adapter_config(model)))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_opens_it(base, tmp_path, kind):
    model = filled(base, adapter=KINDS[kind])
    perturb(model)
    folder = written(tmp_path / "adapter", model)
    stock = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    assert torch.equal(stock.eval()(ids()).logits, model.eval()(ids()).logits)
    assert stock.peft_config["default"].base_model_name_or_path == base


@pytest.mark.parametrize("kind", ["lora", "copies", "tokens"])
def test_rows_that_the_base_does_not_have_are_written(base, tmp_path, kind):
    """Unless they are trained: then they are in the adapter anyway."""

    def grown(**options):
        return filled(base, vocab_size=67, **options)

    model = grown(adapter=KINDS[kind])
    perturb(model)
    folder = written(tmp_path / "adapter", model)
    plain = LlamaForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(67, mean_resizing=False)
    stock = peft.PeftModel.from_pretrained(plain, folder).eval()
    tokens = torch.arange(55, 67)[None]
    assert torch.equal(stock(tokens).logits, model.eval()(tokens).logits)
    names = [n for n in adapters.adapter_state(model) if "lora_" not in n]
    assert len(names) == {"lora": 2, "copies": 2, "tokens": 3}[kind]


def test_new_rows_that_are_all_trained_are_written_once(base):
    model = filled(base, vocab_size=66, adapter=lora(trainable_token_indices=[64, 65]))
    others = [n for n in adapters.adapter_state(model) if "lora_" not in n]
    # The head is not tied, and nobody trains its new rows.
    assert [n.rpartition("model.")[2] for n in others] == [
        "embed_tokens.token_adapter.trainable_tokens_delta",
        "lm_head.weight",
    ]


def test_the_configuration_is_plain_json_in_a_fixed_order(base):
    config = adapters.adapter_config(from_pretrained(base, adapter=lora()))
    assert config == json.loads(json.dumps(config))
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True and config["task_type"] == "CAUSAL_LM"
    assert config["peft_type"] == "LORA" and config["r"] == 4


def test_a_model_without_adapters(base):
    for read in (adapters.adapter_state, adapters.adapter_config):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
            read(from_pretrained(base))


def gathered(base):
    runtime = Runtime(seed=0)
    adapter = lora(use_dora=True, modules_to_save=["lm_head"])
    model = from_pretrained(base, quantize=quantization.nf4, adapter=adapter)
    model = shard(model, parallel_dims=runtime.parallel_dims)
    materialize(model, CPU)
    pretrained(base)(model, device=CPU)
    perturb(model)
    state = adapters.adapter_state(model)
    return None if state is None else {name: value.tolist() for name, value in state.items()}


def test_sharded_tensors_are_gathered_on_the_first_rank(base):
    (alone,) = ranks.run(gathered, 1, base, timeout=300)
    first, second = ranks.run(gathered, 2, base, timeout=300)
    assert first == alone and second is None
