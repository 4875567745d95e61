"""First values of adapters: the base's output, and the same on any layout."""

from functools import partial

import peft
import pytest
import torch

from ditty_di import adapters, quantization
from ditty_di.models.causal_lm import from_pretrained
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize, uninitialized
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.adapters.cases import CPU, filled, ids, lora, pretrained
from tests.checkpoint import ranks

KINDS = {
    "lora": lora(),
    "gaussian": lora(init_lora_weights="gaussian"),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "embedding-dora": lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "tokens": lora(trainable_token_indices=[3, 60]),
    "copies": lora(modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "ia3": partial(adapters.apply_adapter, config=peft.IA3Config()),
    "norms": partial(adapters.apply_adapter, config=peft.LNTuningConfig()),
    "loha": partial(adapters.apply_adapter, config=peft.LoHaConfig(r=4)),
    "lokr": partial(adapters.apply_adapter, config=peft.LoKrConfig(r=4)),
    "road": partial(adapters.apply_adapter, config=peft.RoadConfig(group_size=8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_output_is_the_base_s(base, kind):
    plain = filled(base)(ids()).logits
    model = filled(base, adapter=KINDS[kind])
    assert torch.equal(model(ids()).logits, plain)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "tokens"])
@pytest.mark.parametrize(
    "quantize", [quantization.nf4, quantization.int8, quantization.bitsandbytes_nf4]
)
def test_the_first_output_is_the_quantised_base_s(base, kind, quantize):
    pytest.importorskip("bitsandbytes")
    for dtype in ("float32", "bfloat16"):
        plain = filled(base, quantize=quantize, dtype=dtype)(ids()).logits
        model = filled(base, quantize=quantize, dtype=dtype, adapter=KINDS[kind])
        assert torch.equal(model(ids()).logits, plain)


def test_orthogonal_matrices_whose_product_is_zero(base):
    model = filled(base, adapter=lora(init_lora_weights="orthogonal"))
    torch.testing.assert_close(model(ids()).logits, filled(base)(ids()).logits)
    assert model.peft_config["default"].init_lora_weights == "orthogonal"
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_B.default.weight.abs().max() > 0.01


def test_values_depend_on_the_seed_and_the_layer(base):
    def matrices(seed):
        named = filled(base, seed, adapter=lora()).named_parameters()
        return {name: p for name, p in named if "lora_A" in name}

    one, same, other = matrices(1), matrices(1), matrices(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    first, second = (one[n] for n in one if "q_proj" in n)
    assert not torch.equal(first, second)


def test_dora_s_magnitudes_are_the_norms_of_the_rows(base):
    model = filled(base, quantize=quantization.nf4, adapter=lora(use_dora=True))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    norms = torch.linalg.norm(layer.base_layer.dequantize(), dim=1)
    assert torch.equal(layer.lora_magnitude_vector.default.weight, norms)


def test_quantised_dora_is_dora_on_the_dequantised_weight(base):
    """Also with dropout, where the base's product is made anew."""
    model = filled(base, quantize=quantization.int8, adapter=lora(use_dora=True, lora_dropout=0.5))
    plain = filled(base, adapter=lora(use_dora=True, lora_dropout=0.5))
    with torch.no_grad():
        mine = model.get_base_model().model.layers[0].mlp.up_proj
        stock = plain.get_base_model().model.layers[0].mlp.up_proj
        stock.base_layer.weight.copy_(mine.base_layer.dequantize())
        for parameter in mine.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        stock.load_state_dict(
            {k: v for k, v in mine.state_dict().items() if "base_layer" not in k}, strict=False
        )
    x = torch.randn(3, 128)
    for training in (True, False):
        outputs = []
        for layer in (mine, stock):
            torch.manual_seed(0)
            outputs.append(layer.train(training)(x))
        torch.testing.assert_close(outputs[0], outputs[1])


def test_a_head_that_the_base_lacks(base, tmp_path):
    """Both its copies start alike; anything else that is missing is an error."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = filled(str(folder), adapter=lora(modules_to_save=["lm_head"]))
    copies = model.get_base_model().lm_head
    assert torch.equal(copies.original_module.weight, copies.modules_to_save.default.weight)
    assert 0.01 < copies.original_module.weight.std() < 0.03 and head.shape == (64, 128)
    with pytest.raises(ValueError, match=r"base's files do not have .*lm_head\.weight, and these"):
        filled(str(folder), adapter=lora())


def test_what_nobody_can_start_is_named(base):
    config = peft.LoHaConfig(r=4, init_weights=False)
    with pytest.raises(ValueError, match=r"LoHaLinear|layers\.0\..* starts with init_weights=Fa"):
        filled(base, adapter=partial(adapters.apply_adapter, config=config))


def test_a_model_without_a_base_in_files_has_nothing_to_start_from(base):
    with pytest.raises(ValueError, match=r"no values for .*ditty_di\.adapters\.initialize"):
        model = from_pretrained(base, adapter=lora())
        materialize(model, CPU)
        Pretrained(base)(model, device=CPU)


SHARDED = ["lora", "dora", "embedding-dora", "tokens", "copies", "ia3", "norms"]


def whole_values(base):
    """Every parameter of every kind, whole, and the logits."""
    runtime = Runtime(seed=0)
    found = {}
    for quantize in (None, quantization.nf4):
        for kind in SHARDED if quantize is None else ("lora", "dora", "tokens"):
            model = from_pretrained(base, quantize=quantize, adapter=KINDS[kind])
            model = shard(model, parallel_dims=runtime.parallel_dims)
            materialize(model, CPU)
            pretrained(base)(model, device=CPU)
            key = f"{kind}-{quantize and quantize.__name__}"
            assert not uninitialized(model)
            for name, parameter in model.named_parameters():
                full = getattr(parameter, "full_tensor", parameter.detach)()
                found[f"{key}/{name}"] = full.double().flatten()[:999].tolist()
    return found


def test_the_same_values_on_two_ranks(base):
    (one,) = ranks.run(whole_values, 1, base, timeout=300)
    two = ranks.run(whole_values, 2, base, timeout=300)
    assert one == two[0] == two[1]


def test_tied_matrices_have_one_parameter_with_the_gradients_of_both_uses(base):
    """Against a model whose two layers have matrices of their own, with equal values."""
    names = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_alpha": 4}
    ours = filled(f"{base}-tied", adapter=lora(**names, ensure_weight_tying=True))
    apart = filled(f"{base}-tied", adapter=lora(**names))
    inner = ours.base_model.model
    embedding = inner.model.embed_tokens
    own = [n for n, _ in ours.named_parameters() if "lora" in n and "q_proj" not in n]
    assert len(own) == 2 and all("embed_tokens" in n for n in own), own
    with torch.no_grad():
        embedding.lora_embedding_B["default"].normal_(std=0.1)
        values = dict(ours.named_parameters())
        for name, parameter in apart.named_parameters():
            parameter.copy_(values.get(name, parameter))
        head = apart.base_model.model.lm_head
        head.lora_A["default"].weight.copy_(embedding.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(embedding.lora_embedding_A["default"].T)
    for model in (ours, apart):
        model(ids(), labels=ids()).loss.backward()
    torch.testing.assert_close(ours(ids()).logits, apart(ids()).logits)
    table = apart.base_model.model.model.embed_tokens
    for one, other, used in (
        ("lora_embedding_A", head.lora_B, embedding.lora_embedding_A),
        ("lora_embedding_B", head.lora_A, embedding.lora_embedding_B),
    ):
        wanted = getattr(table, one)["default"].grad + other["default"].weight.grad.T
        torch.testing.assert_close(used["default"].grad, wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_modules": ["lm_head"], "rank_pattern": {"lm_head": 2}},
            r"ensure_weight_tying cannot give .*lm_head .*same rank",
        ),
        (
            {"target_modules": ["embed_tokens"], "init_lora_weights": "orthogonal"},
            "orthogonal is for linear layers, and .*embed_tokens is an embedding",
        ),
        (
            {"target_modules": ["lm_head"], "trainable_token_indices": [3], "use_dora": True},
            "use_dora does not fit .*lm_head, of which single tokens are trained",
        ),
    ],
)
def test_what_tied_layers_cannot_have(base, options, message):
    options = {"ensure_weight_tying": "rank_pattern" in options} | options
    with pytest.raises(ValueError, match=message):
        from_pretrained(f"{base}-tied", adapter=lora(**options))
