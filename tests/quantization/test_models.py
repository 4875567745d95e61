"""Quantised models, filled while their base is read: alone, adapted, on two ranks."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ditty_di.models import causal_lm
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.routers import routers
from ditty_di.models.weights import hugging_face, initialize, materialize, uninitialized
from ditty_di.quantization import bitsandbytes_int8, bitsandbytes_nf4, int8, nf4
from ditty_di.quantization.int8_linear import Int8Linear
from tests.checkpoint import ranks
from tests.models.families import CAUSAL, RARE, config
from tests.models.tiny import CPU, TOKENS, fill, llama, logits, save_llama
from tests.toy import REPOSITORY

OURS = {"nf4": nf4, "nf4-double": partial(nf4, double_quant=True), "int8": int8}
THEIRS = {"bnb_nf4": bitsandbytes_nf4, "bnb_int8": bitsandbytes_int8}


def dequantized(model, usual):
    """The usual model with the values that the quantized one has."""
    for path, module in model.named_modules():
        if hasattr(module, "fill_from"):
            usual.get_submodule(path).weight.data = module.dequantize().detach()
    return usual


@pytest.mark.parametrize("name", [*OURS, "bnb_nf4"])
def test_the_model_computes_with_the_dequantised_weights(tmp_path, name):
    pytest.importorskip("bitsandbytes")
    usual = save_llama(tmp_path)
    model = fill(causal_lm.from_pretrained(tmp_path, quantize={**OURS, **THEIRS}[name]), tmp_path)
    assert sum(hasattr(m, "fill_from") for m in model.modules()) == 14
    assert isinstance(model.lm_head, nn.Linear)
    assert not torch.equal(logits(model), logits(usual))
    torch.testing.assert_close(logits(model), logits(dequantized(model, usual)))


def test_llm_int8_is_near_the_base(tmp_path):
    """It also rounds the inputs, so the dequantized weights do not give the same."""
    pytest.importorskip("bitsandbytes")
    usual = save_llama(tmp_path)
    model = fill(causal_lm.from_pretrained(tmp_path, quantize=bitsandbytes_int8), tmp_path)
    assert (logits(model) - logits(usual)).norm() / logits(usual).norm() < 0.05


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_adapters_train_beside_it_after_an_evaluation(tmp_path, name):
    """bitsandbytes' stock layer loses its input gradient there, on some CPUs."""
    pytest.importorskip("bitsandbytes")
    save_llama(tmp_path)

    def adapter(model, /):
        config = LoraConfig(target_modules=["lm_head"])
        with torch.device("meta"):
            return get_peft_model(model, config, autocast_adapter_dtype=False)

    def missing(model, names, /, *, device):
        for lora in names:
            nn.init.normal_(model.get_parameter(lora))

    quantize = {**OURS, **THEIRS}[name]
    model = causal_lm.from_pretrained(tmp_path, quantize=quantize, adapter=adapter)
    fill(model, tmp_path, init_missing=missing)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    logits(model)
    model.train()
    model(TOKENS).logits.square().sum().backward()
    assert embedding.grad.norm() > 0, "the gradient does not go through the quantized layers"


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "afmoe", "mixtral"])
@pytest.mark.parametrize("name", ["nf4", "int8", "bnb_nf4"])
def test_routers_are_left_out_unless_named(kind, name, caplog):
    """Linear layers in three of the families; in Mixtral they have a parameter of their own."""
    pytest.importorskip("bitsandbytes")
    quantize, made = {**OURS, **THEIRS}[name], config(kind, (CAUSAL | RARE)[kind])

    def build(**options):
        caplog.clear()
        with caplog.at_level("INFO"):
            model = causal_lm.from_config(made, quantize=partial(quantize, **options))
        (text,) = (m for m in caplog.messages if m.startswith("quantized"))
        found = [router for _, router, _ in routers(model)]
        packed = [m for router in found for m in router.modules() if hasattr(m, "fill_from")]
        return len(found), len(packed), text

    count, packed, text = build()
    assert count and not packed
    assert f"; left out: {count} routers" in text
    count, packed, text = build(include=["router"])
    assert packed == (0 if kind == "mixtral" else count)
    assert ("routers" in text) == (kind == "mixtral")


def test_random_values_for_a_model_without_files():
    for quantize in OURS.values():
        model = causal_lm.from_config(llama(), quantize=quantize)
        materialize(model, CPU)
        initialize(model, device=CPU, init=hugging_face)
        assert not uninitialized(model)
        assert logits(model).isfinite().all()


def test_a_quantised_tied_head_is_read_from_the_embedding(tmp_path):
    usual = save_llama(tmp_path, tie_word_embeddings=True)
    quantize = partial(int8, skip=())
    model = fill(causal_lm.from_pretrained(tmp_path, quantize=quantize), tmp_path)
    difference = model.lm_head.dequantize() - usual.model.embed_tokens.weight
    assert difference.abs().max() < 1e-3
    assert torch.equal(model.model.embed_tokens.weight, usual.model.embed_tokens.weight)


def test_a_layer_that_the_files_lack_or_have_in_another_shape_is_named(tmp_path):
    usual = save_llama(tmp_path)
    for changes, message in (
        ({"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj\.weight: not in the files"),
        ({"intermediate_size": 98}, r"up_proj: weight: \[99, 64\] there, \[98, 64\] in the model"),
    ):
        config = type(usual.config)(**{**usual.config.to_dict(), **changes})
        model = causal_lm.from_config(config, quantize=nf4)
        materialize(model, CPU)
        with pytest.raises(ValueError, match=message):
            Pretrained(tmp_path)(model, device=CPU)


def test_without_bitsandbytes_one_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch, ditty_di.quantization as q\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "q.nf4(model)\n"
        "for make in (q.bitsandbytes_nf4, lambda m: q.nf4(m, kernels='bitsandbytes')):\n"
        "    try: make(torch.nn.Sequential(torch.nn.Linear(64, 64)))\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install 'ditty_di[bnb]'") == 2


# -- two ranks -----------------------------------------------------------------------------------


class AcrossRows(Int8Linear):
    """Wrong: the scale of a row depends on the rows that are read with it."""

    def encode(self, weight):
        packed = super().encode(weight)
        scale = packed["scale"].amax().expand_as(packed["scale"])
        steps = weight.float() / scale.float()
        return {"scale": scale, "qweight": steps.round().clamp(-127, 127).to(torch.int8)}


def across_rows(model, /):
    for name, linear in list(model.named_modules()):
        if name.endswith("k_proj"):
            wrong = AcrossRows(linear.in_features, linear.out_features, device="meta")
            model.set_submodule(name, wrong)
    return model


def two_ranks(folder):
    """One process group for all of it: processes are slow to start."""
    import torch.distributed.checkpoint as dcp

    from ditty_di.checkpoint.model_state import ModelState
    from ditty_di.parallelize.activation_checkpointing import full
    from ditty_di.parallelize.data_parallel import shard
    from ditty_di.runtime import Runtime
    from ditty_di.training.setup import setup_model

    runtime = Runtime()
    layout = {
        "runtime": runtime,
        "weights": Pretrained(folder),
        "pipeline_fn": None,
    }

    def place(quantize, **options):
        (model,) = setup_model(
            causal_lm.from_pretrained(folder, quantize=quantize),
            parallelize_fn=partial(shard, **options),
            **layout,
        ).modules
        return model.eval()

    found = {}
    for name, quantize in OURS.items():
        for dtype in (None, "bfloat16"):
            model = place(quantize, param_dtype=dtype, activation_checkpointing=full)
            found[f"{name}-{dtype}"] = logits(model).float().tolist()
            model.train()
            model(TOKENS).logits.float().square().sum().backward()
            grad = model.model.embed_tokens.weight.grad.full_tensor()
            found[f"{name}-{dtype}-grad"] = grad.tolist()
        dcp.save(ModelState([model]).state_dict(), checkpoint_id=folder / "dcp" / name)
    errors = {}
    for name, quantize in {"bnb": bitsandbytes_nf4, "across rows": across_rows}.items():
        try:
            place(quantize)
        except (RuntimeError, ValueError) as error:
            errors[name] = str(error)
    runtime.close()
    return found, errors


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("pair")
    save_llama(folder)
    (found, errors), other = ranks.run(two_ranks, 2, folder, timeout=300)
    assert other == (found, errors)
    return folder, found, errors


@pytest.mark.parametrize("name", OURS)
def test_two_ranks_compute_what_one_does(pair, name):
    folder, found, _ = pair
    model = fill(causal_lm.from_pretrained(folder, quantize=OURS[name]), folder)
    torch.testing.assert_close(torch.tensor(found[f"{name}-None"]), logits(model))
    model.train()
    model(TOKENS).logits.square().sum().backward()
    grad = 2 * model.model.embed_tokens.weight.grad  # both ranks had the same batch
    torch.testing.assert_close(torch.tensor(found[f"{name}-None-grad"]), grad)


@pytest.mark.parametrize("name", OURS)
def test_mixed_precision_casts_activations_and_leaves_codes_and_scales(pair, name):
    folder, found, _ = pair
    model = fill(causal_lm.from_pretrained(folder, quantize=OURS[name]), folder)
    half = model.to(torch.bfloat16)
    half.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq.float()
    expected = logits(half).float()
    result = torch.tensor(found[f"{name}-bfloat16"])
    assert (result - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("name", OURS)
def test_a_sharded_checkpoint_is_read_by_one_process(pair, name):
    import torch.distributed.checkpoint as dcp

    from ditty_di.checkpoint.model_state import ModelState

    folder, _, _ = pair
    model = fill(causal_lm.from_pretrained(folder, quantize=OURS[name]), folder)
    expected = logits(model)
    state = ModelState([model])
    for tensor in state.state_dict().values():
        tensor.fill_(0 if not tensor.is_floating_point() else torch.nan)
    own = state.state_dict()
    dcp.load(own, checkpoint_id=folder / "dcp" / name, no_dist=True)
    state.load_state_dict(own)
    assert torch.equal(logits(model), expected)


def test_a_layer_that_does_not_fit_the_layout_is_found_at_the_start(pair):
    _, _, errors = pair
    assert "the layout and the packed tensors do not fit" in errors["across rows"]


def test_layers_of_bitsandbytes_are_not_sharded(pair):
    _, _, errors = pair
    assert "use quantize=nf4 or quantize=int8" in errors["bnb"]


@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_dequantised_weights_whatever_the_files_have(
    tmp_path, model_dtype
):
    """A weight that is quantized in another dtype than the model's is unpacked into that one."""
    pytest.importorskip("bitsandbytes")
    save_llama(tmp_path, dtype=torch.bfloat16)
    options = {"dtype": model_dtype}
    model = fill(
        causal_lm.from_pretrained(tmp_path, quantize=bitsandbytes_nf4, **options), tmp_path
    )
    usual = dequantized(model, fill(causal_lm.from_pretrained(tmp_path, **options), tmp_path))
    found = []
    for one in (model, usual):
        one(TOKENS).logits.float().square().sum().backward()
        found.append(one.model.embed_tokens.weight.grad)
    assert torch.equal(*found)
