"""Numbers of the packed layers: bytes, values, gradients, memory."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.quantization import bitsandbytes_int8, bitsandbytes_nf4, int8, nf4, nf4_linear
from ditty_di.quantization.int8_linear import Int8Linear
from ditty_di.quantization.nf4_linear import (
    NF4Linear,
    decode,
    decode_with_bitsandbytes,
    quantize,
    same_on_cpu,
)

bnb = pytest.importorskip("bitsandbytes")

MAKERS = {
    "nf4": NF4Linear,
    "nf4-double": partial(NF4Linear, double_quant=True),
    "nf4-32": partial(NF4Linear, block_size=32),
    "nf4-bnb": partial(NF4Linear, kernels="bitsandbytes"),
    "int8": Int8Linear,
}


def weight(rows=96, columns=256, dtype=torch.float32):
    """With a row of zeros, one outlier, and values on the bounds between codes."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    values[3] = 0
    values[5, 7] = 4.0
    values[7, 64:72] = values[7, 64:128].abs().max() * torch.linspace(-1, 1, 8)
    return values.to(dtype)


def filled(make, values, bias=None, dtype=torch.float32):
    layer = make(values.shape[1], values.shape[0], bias=bias, dtype=dtype)
    layer.fill_from(lambda name, index: values if index is None else values[index])
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_the_packed_bytes_are_those_of_bitsandbytes(dtype, block_size):
    values = weight(dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    qweight, scale = quantize(values, block_size)
    assert torch.equal(qweight.view(-1, 1), packed)
    assert torch.equal(scale.view(-1), state.absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_bitsandbytes_for_the_same_bytes_and_scales(dtype):
    layer = filled(NF4Linear, weight(), dtype=dtype)
    _, state = bnb.functional.quantize_4bit(weight(), blocksize=64, quant_type="nf4")
    state.absmax, state.dtype = layer.scale.float().view(-1), dtype
    expected = bnb.functional.dequantize_4bit(layer.qweight.view(-1, 1), state)
    assert torch.equal(layer.dequantize(), expected)
    with_kernels = filled(MAKERS["nf4-bnb"], weight(), dtype=dtype)
    assert torch.equal(with_kernels.dequantize(), expected)


@pytest.mark.parametrize(
    "name, error, size",
    [
        ("nf4", 0.1, 0.5 + 2 / 64),
        ("nf4-double", 0.1, 0.5 + 1 / 64 + 2 / 256),
        ("nf4-32", 0.09, 0.5 + 2 / 32),
        ("int8", 0.01, 1 + 2 / 256),
    ],
)
def test_error_and_bytes_a_weight(name, error, size):
    values = torch.randn(128, 256) * 0.02
    layer = filled(MAKERS[name], values)
    assert (layer.dequantize() - values).norm() / values.norm() < error
    stored = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert stored / values.numel() == pytest.approx(size)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_the_dequantised_layer(name, dtype):
    bias = nn.Parameter(torch.randn(96, dtype=dtype))
    layer = filled(MAKERS[name], weight(), bias=bias, dtype=dtype)
    plain = nn.Linear(256, 96, dtype=dtype)
    plain.weight.data, plain.bias.data = layer.dequantize(), bias.detach().clone()
    x = torch.randn(2, 5, 256, dtype=dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    grad = torch.randn(2, 5, 96, dtype=dtype)
    result, expected = layer(ours), plain(theirs)
    result.backward(grad)
    expected.backward(grad)
    assert torch.equal(result, expected)
    assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(bias.grad, plain.bias.grad, rtol=0.02, atol=1e-4)
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("make", [NF4Linear, Int8Linear])
def test_only_the_packed_weight_is_kept_for_the_backward_pass(make):
    layer = filled(make, weight())
    x = torch.randn(5, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = [t.numel() * t.element_size() for t in kept]
    # and a table of 256 pairs
    assert sum(sizes) <= layer.qweight.numel() + 2 * layer.scale.numel() + 2048


@pytest.mark.parametrize("make", [NF4Linear, Int8Linear])
def test_it_compiles_as_one_graph_with_the_same_numbers(make):
    layer = filled(make, weight(), bias=nn.Parameter(torch.randn(96)))
    x = torch.randn(5, 256, requires_grad=True)
    eager = layer(x)
    (expected,) = torch.autograd.grad(eager.square().sum(), x)
    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(result.square().sum(), x)
    torch.testing.assert_close(result, eager)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("make", [NF4Linear, Int8Linear])
def test_autocast_decides_the_dtype(make):
    layer = filled(make, weight())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 256)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 256)).dtype == torch.float32


@pytest.mark.parametrize("columns", [100, 30, 7])
def test_a_row_that_is_no_multiple_of_a_block_ends_with_a_shorter_one(columns):
    values = torch.randn(6, columns)
    layer = filled(NF4Linear, values)
    assert layer.dequantize().shape == (6, columns)
    assert (layer.dequantize() - values).norm() / values.norm() < 0.15
    assert layer(torch.randn(2, columns)).shape == (2, 6)
    (part,) = (filled(NF4Linear, values[i : i + 1]) for i in (4,))
    assert torch.equal(part.dequantize()[0], layer.dequantize()[4]), "rows do not share blocks"


def test_a_layer_can_be_copied_and_moved_and_cast():
    layer = filled(NF4Linear, weight())
    expected = layer.dequantize()
    assert torch.equal(copy.deepcopy(layer).dequantize(), expected)
    assert torch.equal(layer.to("cpu").half().float().dequantize(), expected)
    empty = layer.to("meta").to_empty(device="cpu")
    empty.load_state_dict(filled(NF4Linear, weight()).state_dict())
    assert torch.equal(empty.dequantize(), expected)


def test_random_values_have_the_spread_of_an_ordinary_layer():
    for make in (NF4Linear, Int8Linear):
        layer = make(256, 96, bias=nn.Parameter(torch.full((96,), torch.nan)), dtype=torch.float32)
        layer.reset_parameters()
        assert layer.dequantize().std().item() == pytest.approx(256**-0.5 / 3**0.5, rel=0.05)
        assert not layer.bias.any()


# -- the transforms ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(64, 64, bias=False))
        self.mlp = nn.ModuleDict({"gate": nn.Linear(64, 8), "up": nn.Linear(64, 64)})
        self.lm_head = nn.Linear(64, 4)
        self.norm = nn.LayerNorm(64)


def test_a_model_with_values_is_quantised_where_it_is_not_skipped():
    model = Block()
    before = model.mlp.up.weight.detach().clone()
    bias = model.mlp.up.bias
    assert nf4(model, skip=["lm_head", "mlp.gate"]) is model
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "bias")}
    assert kinds["attn.0"] == kinds["mlp.up"] == "NF4Linear"
    assert kinds["mlp.gate"] == kinds["lm_head"] == "Linear"
    assert model.mlp.up.bias is bias and bias.requires_grad
    assert (model.mlp.up.dequantize() - before).norm() / before.norm() < 0.12
    assert model.mlp.up.weight.dtype == torch.float32, "code that looks at the dtype sees it"


def test_a_model_with_nothing_to_quantise_is_refused():
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear to quantize outside skip"):
        int8(nn.Sequential(nn.Embedding(3, 4)))
    with pytest.raises(ValueError, match="outside skip"):
        int8(Block(), skip=["attn", "mlp", "lm_head"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernels": "cuda"}, "'auto', 'torch' or 'bitsandbytes'"),
        ({"block_size": 63}, "block_size=63 must be even"),
        ({"block_size": 16, "kernels": "bitsandbytes"}, "block_size=16 .* it takes 32, 64"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nf4(Block(), **options)


def test_bitsandbytes_decodes_on_a_cpu_where_it_gives_the_same_values():
    assert same_on_cpu()
    cpu = torch.device("cpu")
    for block_size, columns in ((64, 256), (128, 200), (32, 96)):
        fast, slow = (
            filled(partial(NF4Linear, kernels=k, block_size=block_size), weight(columns=columns))
            for k in ("auto", "torch")
        )
        assert (fast.decoder(cpu), slow.decoder(cpu)) == (decode_with_bitsandbytes, decode)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            fast.dtype = slow.dtype = dtype
            assert torch.equal(fast.dequantize(), slow.dequantize())
    # Its kernel for larger blocks would be compiled for every shape.
    assert NF4Linear(4096, 8, block_size=4096).decoder(cpu) is decode
    for device in (cpu, torch.device("cuda")):  # it has none for blocks of this size
        assert NF4Linear(64, 8, block_size=16).decoder(device) is decode


def test_bitsandbytes_that_gives_other_values_is_left_alone(monkeypatch):
    def rounded(dtype, *packed):
        return decode_with_bitsandbytes(dtype, *packed).bfloat16().to(dtype)

    monkeypatch.setattr(nf4_linear, "decode_with_bitsandbytes", rounded)
    same_on_cpu.cache_clear()
    try:
        assert NF4Linear(64, 8).decoder(torch.device("cpu")) is decode
    finally:
        same_on_cpu.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_quantised_in_the_model_s_dtype(dtype):
    """As bitsandbytes quantizes what transformers has read: bytes, and exact scales in bfloat16."""
    layer = filled(NF4Linear, weight(), dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(weight().to(dtype), quant_type="nf4", blocksize=64)
    assert torch.equal(layer.qweight.view(-1, 1), packed)
    if dtype == torch.bfloat16:
        assert torch.equal(layer.scale.float().view(-1), state.absmax)


@pytest.mark.parametrize("quantize", [nf4, int8, bitsandbytes_nf4, bitsandbytes_int8])
def test_experts_that_are_left_out_are_said(quantize, caplog):
    with torch.device("meta"):
        model = Block()
        model.experts = nn.ModuleList([Experts(), Experts()])
    with caplog.at_level("INFO"):
        quantize(model)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "quantized 3 linear layers" in text
    if quantize in (nf4, int8):
        assert "quantized 3 linear layers and 2 weights of fused experts, skipped" in text
        assert "experts.*.up" not in text
    else:
        assert "left out: 79 % of the parameters: experts.*.up (78 %); up hold several" in text
        assert "matrices in one parameter, which quantize=nf4 and quantize=int8 quantize" in text
    assert ("scales of NF4's blocks are bfloat16" in text) is (quantize is nf4)


class Experts(nn.Module):
    """Several matrices in one parameter, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.empty(4, 64, 64))
