"""Where a model comes from, and the order in which it is changed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import IA3Config
from safetensors.torch import save_model
from torch import nn

from ditty_di.api import FSDPConfig, ModelFactory, PeftConfig, Pipeline, QuantConfig
from ditty_di.models import seq2seq
from ditty_di.models.weights import is_meta, materialize, uninitialized
from ditty_di.quantization.int8_linear import Int8Linear
from ditty_di.quantization.nf4_linear import NF4Linear
from tests.api.cases import Block, Net, net, rows, trained
from tests.models.tiny import save_llama

CPU = torch.device("cpu")


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def filled(factory, **options):
    model, weights = factory.build(**options)
    if weights is not None:
        assert is_meta(model)
        materialize(model, CPU)
        weights(model, device=CPU)
    assert not uninitialized(model)
    return model


def test_changes_come_in_their_order():
    calls = []

    def step(name):
        def change(model):
            calls.append(name)
            if name == "transform":
                assert same(model, net(4)), "the values of the checkpoint are there by now"
            return model

        return change

    class Compiled(Net):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            calls.append("load")
            for block in (*self.first, *self.second):
                block.compile = lambda **_: calls.append("compile")

    class Sharded(FSDPConfig):
        def __call__(self, model, /, **options):
            calls.append("shard")
            return super().__call__(model, **options)

    factory = ModelFactory(
        lambda **_: (_with(net(4), Compiled()), None),
        transform=step("transform"),
        peft_config=step("peft"),
        compile={"backend": "eager"},
        fsdp_config=Sharded(transformer_layers=[Block]),
    )
    Pipeline(model_factory=factory, dataset=rows(), max_steps=1).run()
    assert calls == ["load", "transform", "peft", "shard", *["compile"] * 5]


def _with(source, model):
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("kind", ["run", "step", "export", "file"])
def test_values_of_a_checkpoint(kind, tmp_path):
    _, model = trained(output_dir=tmp_path / "run", max_steps=2)
    paths = {
        "run": tmp_path / "run" / "checkpoints",
        "step": tmp_path / "run" / "checkpoints" / "step-00000002",
        "export": tmp_path / "run" / "export",
        "file": tmp_path / "model.safetensors",
    }
    save_model(model, str(paths["file"]))
    factory = ModelFactory.from_checkpoint(paths[kind], Net, size=16)
    assert same(filled(factory), model)
    with pytest.raises((RuntimeError, ValueError), match=r"head|size|shape"):
        ModelFactory.from_checkpoint(paths[kind], Net, size=8).build()


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nowhere"):
        ModelFactory.from_checkpoint(tmp_path / "nowhere", Net).build()


def test_a_transform_has_to_return_the_model():
    with pytest.raises(TypeError, match="forgets returned NoneType; return the model"):

        def forgets(model):
            model.head = nn.Identity()

        ModelFactory.from_instance(net(), transform=forgets).build()


@pytest.mark.parametrize(
    "quant, layer",
    [(QuantConfig(bits=4, double_quant=True), NF4Linear), (QuantConfig(bits=8), Int8Linear)],
)
def test_a_pretrained_base_in_few_bits_with_adapters(quant, layer, tmp_path):
    save_llama(tmp_path)
    model = filled(
        ModelFactory.from_huggingface(
            str(tmp_path), quant_config=quant, peft_config=PeftConfig(r=2, dropout=0.0)
        )
    )
    assert sum(isinstance(m, layer) for m in model.modules()) == 14
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)


def test_a_pretrained_model_is_that_of_transformers(tmp_path):
    stock = save_llama(tmp_path)
    model = filled(ModelFactory.from_huggingface(str(tmp_path)))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits)


def test_a_transform_of_a_pretrained_model_sees_its_values(tmp_path):
    stock = save_llama(tmp_path)

    def widened(model):
        model.lm_head.weight.data.mul_(2)
        model.extra = nn.Linear(2, 2)
        return model

    model, weights = ModelFactory.from_huggingface(str(tmp_path), transform=widened).build()
    assert weights is None
    assert torch.equal(model.lm_head.weight, 2 * stock.lm_head.weight)


def test_configurations_of_peft_fit_as_well():
    config = IA3Config(target_modules=["linear"], feedforward_modules=[])
    model = filled(ModelFactory.from_instance(net(), peft_config=config))
    assert {n for n, p in model.named_parameters() if p.requires_grad if "ia3" not in n} == set()
    dora = PeftConfig(target_modules=["linear"], use_dora=True, alpha=4)
    model = filled(ModelFactory.from_instance(net(), peft_config=dora))
    assert any("magnitude" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].lora_alpha == 4


def test_options_reach_the_builder(tmp_path):
    save_llama(tmp_path)
    model, _ = ModelFactory.from_huggingface(str(tmp_path), dtype="bfloat16").build()
    assert model.lm_head.weight.dtype == torch.bfloat16
    other = partial(ModelFactory.from_huggingface, str(tmp_path), model=seq2seq.from_pretrained)
    with pytest.raises(ValueError):
        other().build()


def parallelized(config, model=None, **options):
    from ditty_di import Runtime

    runtime = Runtime(**config.degrees)
    try:
        return config(model or net(), parallel_dims=runtime.parallel_dims, **options)
    finally:
        runtime.close()


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda: QuantConfig(bits=5), "write 4 or 8"),
        (lambda: QuantConfig(bits=8, double_quant=True), "double_quant is for bits=4"),
        (lambda: FSDPConfig(enabled=False, cpu_offload=True), "cpu_offload would have no effect"),
        (
            lambda: FSDPConfig(param_dtype=torch.bfloat16).dtype("float16"),
            "param_dtype=bfloat16, but the pipeline computes in float16",
        ),
        (
            lambda: parallelized(FSDPConfig(transformer_layers=[nn.GRU])),
            "the model has no GRU.*Block",
        ),
        (
            lambda: parallelized(
                FSDPConfig(), nn.Linear(2, 2), activation_checkpointing=lambda b: b
            ),
            "Linear has no list of blocks to recompute",
        ),
        (
            lambda: ModelFactory.from_huggingface("base", quant_config=QuantConfig()),
            "packed weights cannot be trained; add peft_config",
        ),
    ],
)
def test_what_cannot_be_is_said(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def test_blocks_of_every_list_are_compiled_and_recomputed():
    compiled = []
    model = net()
    for block in (*model.first, *model.second):
        block.compile = lambda block=block, **_: compiled.append(block)
    config = FSDPConfig(enabled=False, transformer_layers=[Block])
    recomputed = []
    parallelized(
        config, model, compile={}, activation_checkpointing=lambda b: recomputed.append(b) or b
    )
    assert len(compiled) == len(recomputed) == 5


def test_a_model_without_lists_is_compiled_whole():
    compiled = []
    model = nn.Linear(2, 2)
    model.compile = lambda **options: compiled.append(options)
    parallelized(FSDPConfig(enabled=False), model, compile={"backend": "eager"})
    assert compiled == [{"backend": "eager"}]
