"""Where adapters go, what is trained, and what is refused before anything is read."""

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import T5Config

from ditty_di import adapters, quantization
from ditty_di.models.causal_lm import from_pretrained
from ditty_di.models.seq2seq import from_config as seq2seq
from tests.adapters.cases import filled, ids, lora

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def adapted_layers(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = (path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return sorted({path.rpartition(".")[2] for path in found})


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantize", [None, quantization.nf4, quantization.int8])
def test_all_linear_is_every_linear_layer_but_the_head(base, quantize):
    model = from_pretrained(base, quantize=quantize, adapter=lora())
    assert adapted_layers(model) == PROJECTIONS
    assert sorted(model.peft_config["default"].target_modules) == PROJECTIONS
    assert all("lora_" in name for name in trained(model))
    assert all(p.is_meta for p in model.parameters())


def test_all_linear_leaves_out_what_is_trained_whole(base):
    model = from_pretrained(base, adapter=lora(modules_to_save=["k_proj"]))
    assert adapted_layers(model) == [name for name in PROJECTIONS if name != "k_proj"]


def test_targets_are_found_by_architecture_or_in_the_blocks(base):
    assert adapted_layers(from_pretrained(base, adapter=lora(target_modules=None))) == [
        "q_proj",
        "v_proj",
    ]

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    for targets in (None, "all-linear"):
        model = lora(target_modules=targets)(Blocks())
        assert adapted_layers(model) == ["0"] and not model.head.weight.requires_grad
        model(torch.ones(2, 4)).sum().backward()
        assert model.base_model.model.blocks[0][0].lora_B.default.weight.grad is not None


def test_the_configuration_is_not_written_to(base):
    config = peft.LoraConfig(target_modules="all-linear")
    for _ in range(2):
        adapters.apply_adapter(from_pretrained(base), config=config)
    assert config.target_modules == "all-linear" and config.task_type is None


def test_the_model_is_called_as_before(base):
    model = filled(base, adapter=lora())
    assert model.config.use_cache is False and model.config.vocab_size == 64
    assert model(ids()).logits.shape == (2, 12, 64)
    assert model(ids(), position_ids=torch.arange(12)[None]).logits.shape == (2, 12, 64)
    text = model.generate(input_ids=ids(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 14)


def test_a_sequence_to_sequence_model_gets_its_own_task():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = seq2seq(config, adapter=lora())
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert "lm_head" not in adapted_layers(model)
    with pytest.raises(ValueError, match=r"task_type=CAUSAL_LM, but .* is a model for SEQ_2_SEQ"):
        seq2seq(config, adapter=lora(task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "norm", "lm_head"]}],
    ids=["lora", "dora", "copies"],
)
def test_what_is_trained_is_float32_on_a_base_of_16_bits(base, options):
    model = filled(base, dtype="bfloat16", adapter=lora(**options))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    output = model(ids()).logits
    assert output.dtype == torch.bfloat16
    output.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_dtype_none_leaves_peft_s_own(base):
    import functools

    adapter = functools.partial(adapters.apply_adapter, config=peft.LoraConfig(), dtype=None)
    model = from_pretrained(base, dtype="bfloat16", adapter=adapter)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj', but no .*did you mean 'q_proj'.*up_proj"),
        ({"target_modules": ["q_proj", "query"]}, "target_modules has 'query'.*it has down_proj"),
        ({"target_modules": "q_proj"}, "regular expression that matches the whole path of no"),
        ({"modules_to_save": ["embed"]}, "modules_to_save has 'embed'.*did you mean 'embed_tok"),
        ({"init_lora_weights": "pissa"}, "pissa computes the adapters from the base's values"),
        ({"init_lora_weights": "olora"}, "olora computes the adapters from the base's values"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 computes"),
    ],
)
def test_what_cannot_work_is_said_when_the_model_is_built(base, options, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(base, adapter=lora(**options))


@pytest.mark.parametrize(
    "config, message",
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=2), "puts virtual tokens before the input"),
        (peft.AdaLoraConfig(total_step=9, tinit=1, tfinal=1), "moves ranks between layers"),
        (peft.VeraConfig(), "keeps constants .* lost on the meta device"),
        (peft.BOFTConfig(boft_block_size=4), "keeps constants"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_that_cannot_work(base, config, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters.apply_adapter(from_pretrained(base), config=config)


def test_adapters_are_added_once(base):
    model = from_pretrained(base, adapter=lora())
    with pytest.raises(ValueError, match="has adapters already"):
        lora()(model)


@pytest.mark.parametrize("quantize", [quantization.nf4, quantization.bitsandbytes_nf4])
def test_kinds_that_would_read_packed_bytes_as_weights(base, quantize):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"quantized|NF4Linear.* not supported"):
        adapters.apply_adapter(from_pretrained(base, quantize=quantize), config=peft.HRAConfig())


@pytest.mark.parametrize("quantize", [quantization.nf4, quantization.int8])
def test_merging_into_a_quantised_base_says_what_to_do_instead(base, quantize):
    model = filled(base, quantize=quantize, adapter=lora())
    with pytest.raises(ValueError, match="export=merged"):
        model.merge_and_unload()


def test_trained_biases_of_a_base_in_16_bits(base):
    biased = from_pretrained(base, dtype="bfloat16", attention_bias=True)
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias of the base.*model\.dtype=f"):
        lora(bias="all")(biased)
