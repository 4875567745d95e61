"""Mixtures of experts: forms of their files, packed weights, gradients of every parameter."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ditty_di import Runtime, Trainer
from ditty_di.config import ConfigError, Graph
from ditty_di.data.loader import Loader
from ditty_di.export import HuggingFaceExport
from ditty_di.fqn import base_fqn
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models import causal_lm
from ditty_di.models.coverage import summary
from ditty_di.models.deferred import Deferred
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.stacked import fused_weights
from ditty_di.models.weights import materialize
from ditty_di.quantization import int8, nf4
from tests.models.families import CAUSAL, EXPERTS, config
from tests.models.test_families import TOKENS, logits, save
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import CPU, fill

QUANTIZERS = {"nf4": nf4, "nf4-double": partial(nf4, double_quant=True), "int8": int8}
#: Products with all experts at once, transposed, and with one expert after another.
PRODUCTS = ("qwen3_moe", "gpt_oss", "jetmoe", "llama4_text")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for name in {*EXPERTS, *PRODUCTS}:
        save(folder / name, config(name, CAUSAL[name]), "causal")
    return folder


def rewritten(base, folder, change, **settings):
    """A copy of a base with other tensors and settings in its files."""
    folder.mkdir()
    read = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **settings}))
    save_file(change(load_file(base / "model.safetensors")), folder / "model.safetensors")
    return folder


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe"])
def test_fused_files_are_read_as_those_of_single_experts(bases, name, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(bases / name)
    state = {n: t.clone() for n, t in stock.state_dict().items()}
    if stock.config.tie_word_embeddings:
        del state["lm_head.weight"]
    fused = rewritten(bases / name, tmp_path / "fused", lambda tensors: state)
    model = fill(causal_lm.from_pretrained(fused), fused)
    assert torch.equal(logits(model, "causal"), logits(stock, "causal"))


def packed(tensors):
    """The experts of gpt-oss in MXFP4: random codes and scales."""
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        shape = (experts, columns, rows // 32)
        codes = torch.randint(256, (*shape, 16), generator=generator)
        scales = torch.randint(119, 124, shape, generator=generator)
        tensors |= {f"{name}_blocks": codes.byte(), f"{name}_scales": scales.byte()}
    return tensors


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4")
    wide = {"hidden_size": 64, "intermediate_size": 64}
    save(folder / "plain", config("gpt_oss", wide), "causal")
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return rewritten(folder / "plain", folder / "base", packed, quantization_config=method)


def test_experts_in_mxfp4_are_dequantized_while_they_are_read(mxfp4, tmp_path, monkeypatch):
    stock = AutoModelForCausalLM.from_pretrained(mxfp4, dtype=torch.float32)
    expected = logits(stock, "causal")
    model = fill(causal_lm.from_pretrained(mxfp4), mxfp4)
    torch.testing.assert_close(logits(model, "causal"), expected, rtol=0, atol=1e-5)
    HuggingFaceExport(tokenizer(97), str(tmp_path / "export"))([model])
    assert "quantization_config" not in (tmp_path / "export" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(logits(plain, "causal"), expected, rtol=0, atol=1e-5)

    # Packed again while it is read, a few rows at a time.
    monkeypatch.setattr("ditty_di.quantization.linear._CPU_PIECE", 1 << 10)
    again = fill(causal_lm.from_pretrained(mxfp4, quantize=nf4), mxfp4)
    other = nf4(plain)
    names = [path for path, _, _ in fused_weights(again)]
    assert len(names) == 4
    for name in names:
        one, two = again.get_submodule(name), other.get_submodule(name)
        assert torch.equal(one.qweight, two.qweight) and torch.equal(one.scale, two.scale)


def test_blocks_without_scales_are_named(mxfp4, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.experts.down_proj_scales"]
        return tensors

    base = rewritten(mxfp4, tmp_path / "base", change)
    model = causal_lm.from_pretrained(base)
    materialize(model, CPU)
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.down_proj_blocks.*needs scales too"):
        Pretrained(base)(model, device=CPU)


def test_a_model_quantized_by_another_method_is_refused(bases, tmp_path):
    method = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    base = rewritten(bases / "mixtral", tmp_path / "base", dict, quantization_config=method)
    with pytest.raises(ValueError, match="are quantized already; give the model that they were"):
        causal_lm.from_pretrained(base)


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if "experts.2.w1" not in n},
            {},
            r"layers\.0\.mlp\.experts\.gate_up_proj: the files lack .*experts\.2\.w1\.weight",
        ),
        (
            lambda tensors: {
                n: t for n, t in tensors.items() if "1.block_sparse_moe.experts.3" not in n
            },
            {},
            r"layers\.1\.mlp\.experts\.\w+: the files lack .*layers\.1\..*experts\.3\.w\d\.weight",
        ),
        (dict, {"num_local_experts": 3}, r"the files have 4 experts, the model 3"),
        (dict, {"num_local_experts": 5}, r"the files lack .*experts\.4\.w\d\.weight"),
    ],
)
def test_files_without_an_expert_are_refused_before_anything_is_read(
    bases, tmp_path, change, settings, message
):
    base = rewritten(bases / "mixtral", tmp_path / "base", change, **settings)
    with pytest.raises(ValueError, match=message):
        causal_lm.from_pretrained(base)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fused_files_without_those_of_a_layer_or_of_other_sizes_are_refused_as_well(
    bases, tmp_path, kind
):
    fused = tmp_path / "fused"
    plain = AutoModelForCausalLM.from_pretrained(bases / kind)
    plain.save_pretrained(fused, save_original_format=False)
    assert causal_lm.from_pretrained(fused)
    name, experts = "model.layers.1.mlp.experts.down_proj", plain.config.num_local_experts
    base = rewritten(
        fused, tmp_path / "lacking", lambda t: {n: v for n, v in t.items() if n != name}
    )
    with pytest.raises(ValueError, match=rf"the files lack {name}$"):
        causal_lm.from_pretrained(base)
    base = rewritten(fused, tmp_path / "more", dict, num_local_experts=experts + 1)
    message = rf"experts\.\w+: \[{experts}, .*\] there, \[{experts + 1}, .*\] in the model"
    with pytest.raises(ValueError, match=message):
        causal_lm.from_pretrained(base)
    node = {"_target_": "ditty_di.models.causal_lm.from_pretrained", "path": str(base)}
    with pytest.raises(ConfigError, match=message):  # as `task=check` does it
        Graph({"model": node}).rehearse("model")


# -- gradients ------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, of which different numbers are learned."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        tokens = (torch.arange(12) * (7 + 2 * i) + i) % 90 + 3
        labels = tokens.roll(-1).clone()
        labels[9 - 2 * i :] = -100
        return tokens, labels


@pytest.mark.parametrize("name", EXPERTS)
def test_the_gradient_of_every_parameter_is_that_of_a_hand_written_loop(bases, name):
    stock = AutoModelForCausalLM.from_pretrained(bases / name)
    rows = [Rows()[i] for i in range(4)]
    count = sum(int((labels != -100).sum()) for _, labels in rows)
    for i in (0, 2):
        inputs, labels = (torch.stack([row[n] for row in rows[i : i + 2]]) for n in (0, 1))
        output = stock(inputs, use_cache=False).logits.flatten(0, 1)
        (F.cross_entropy(output, labels.flatten(), reduction="sum") / count).backward()
    before = {n: p.detach().clone() for n, p in stock.named_parameters()}
    trainer = Trainer(
        runtime=Runtime(seed=0),
        model=causal_lm.from_pretrained(bases / name),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        dataloader=partial(Loader, Rows(), micro_batch_size=2, shuffle=False),
        global_batch_size=4,
        max_steps=1,
        max_grad_norm=1e9,
    )
    trainer.train()
    trainer.close()
    after = dict(trainer.model_parts[0].named_parameters())
    assert after.keys() == before.keys()
    for key, parameter in stock.named_parameters():
        grad = torch.zeros(()) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            before[key] - after[key], grad.expand_as(parameter), rtol=1e-4, atol=1e-6
        )
    assert any("gate.weight" in n or "router" in n for n in after), "the router"


# -- packed weights -------------------------------------------------------------------------------


def unpacked(model, stock):
    """The stock model with the values that the packed one has."""
    for name, module in model.named_modules():
        path = base_fqn(name)
        if hasattr(module, "multiply"):
            stock.get_parameter(path).data = module.whole().detach()
        elif hasattr(module, "fill_from"):
            stock.get_submodule(path).weight.data = module.dequantize().detach()
    return stock


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_packed_experts_compute_with_the_dequantized_weights(bases, name, quantize):
    model = fill(
        causal_lm.from_pretrained(bases / name, quantize=QUANTIZERS[quantize]), bases / name
    )
    stock = unpacked(model, AutoModelForCausalLM.from_pretrained(bases / name).eval())
    names = [path for path, _, _ in fused_weights(model)]
    assert len(names) >= 4 and all(hasattr(model.get_submodule(n), "qweight") for n in names)
    grads = []
    for one in (model, stock):
        embedding = one.get_input_embeddings().weight.requires_grad_()
        output = one(TOKENS, use_cache=False).logits
        output.square().sum().backward()
        grads.append((output.detach(), embedding.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_has_the_bytes_that_bitsandbytes_gives_it(tmp_path, dtype, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "moe_intermediate_size": 128}
    save(tmp_path, config("qwen3_moe", wide), "causal")
    monkeypatch.setattr("ditty_di.quantization.linear._CPU_PIECE", 1000)  # not whole matrices
    model = fill(
        causal_lm.from_pretrained(tmp_path, quantize=nf4, dtype=str(dtype).removeprefix("torch.")),
        tmp_path,
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for path, _, _ in fused_weights(model):
        ours, plain = model.get_submodule(path), stock.get_parameter(path)
        qweight = ours.qweight.view(plain.shape[0], -1, 1)
        scale = ours.scale.view(plain.shape[0], -1)
        for expert, matrix in enumerate(plain):
            theirs, state = bnb.functional.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
            assert torch.equal(qweight[expert], theirs)
            if dtype == torch.bfloat16:
                assert torch.equal(scale[expert].float(), state.absmax)


def test_only_packed_experts_are_kept_for_the_backward_pass(bases):
    name = "qwen3_moe"
    model = fill(causal_lm.from_pretrained(bases / name, quantize=nf4), bases / name)
    experts = model.model.layers[0].mlp.experts
    tokens = torch.randn(6, 32, requires_grad=True)
    which = torch.arange(12).view(6, 2) % 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(tokens, which, torch.ones(6, 2))
    largest = max(t.numel() for t in kept if t.is_floating_point())
    assert largest < experts.gate_up_proj.shape.numel() / 2, "a dequantized weight"


def test_loading_reads_a_few_rows_at_a_time(tmp_path, monkeypatch):
    save(tmp_path, config("qwen3_moe", {"num_experts": 8}), "causal")
    monkeypatch.setattr("ditty_di.quantization.linear._CPU_PIECE", 256)
    largest, into = 0, Deferred.copy_into

    def watched(self, out, index=None):
        nonlocal largest
        largest = max(largest, out.numel()) if self.ndim == 3 else largest
        into(self, out, index)

    monkeypatch.setattr(Deferred, "copy_into", watched)
    fill(causal_lm.from_pretrained(tmp_path, quantize=nf4), tmp_path)
    assert 0 < largest <= 256


def test_experts_can_be_skipped(bases):
    model = causal_lm.from_pretrained(
        bases / "qwen3_moe", quantize=partial(nf4, skip=["lm_head", "experts"])
    )
    assert all(isinstance(getattr(o, n), torch.nn.Parameter) for _, o, n in fused_weights(model))


def test_packed_experts_of_another_shape_are_named(bases):
    model = causal_lm.from_config(config("gpt_oss", {"intermediate_size": 64}), quantize=nf4)
    materialize(model, CPU)
    message = r"experts\.down_proj: \[4, 48, 32\] there, \[4, 64, 32\] in the model"
    with pytest.raises(ValueError, match=message):
        Pretrained(bases / "gpt_oss")(model, device=CPU)


def test_a_summary_counts_what_packed_weights_stand_for(bases):
    plain = summary(causal_lm.from_pretrained(bases / "qwen3_moe"))
    total = plain.split(" parameters")[0]
    assert plain == f"{total} parameters, {total} trained"
    text = summary(causal_lm.from_pretrained(bases / "qwen3_moe", quantize=nf4))
    assert text.startswith(f"{total} parameters, ") and "% quantized" in text
