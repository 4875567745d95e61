"""muP: what the widths of a base change, and that activations then do not grow with the width."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteMoeConfig, LlamaConfig

from ditty_di.models import mup
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.optim import mup as optim

CPU = torch.device("cpu")
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(times: int = 1, *, base=BASE, **changes):
    """A model `times` as wide as `BASE`; its heads are of the base's size."""
    widths = {name: n * times for name, n in BASE.items()}
    options = {"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 32}
    return mup.llama(base=base, **{**widths, **options, **changes})


def filled(config, init=mup.init, seed: int = 0, **transforms):
    model = from_config(config, **transforms)
    materialize(model, CPU)
    initialize(model, device=CPU, seed=seed, init=init)
    return model


# -- widths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_factors_follow_from_the_shapes(tied):
    found = mup.scales(from_config(config(4, intermediate_size=192, tie_word_embeddings=tied)))
    assert ("lm_head.weight" in found) != tied
    matrix = mup.Scale(std=0.5, lr=0.25)
    expected = {
        "embed_tokens": mup.Scale(),
        "lm_head": mup.Scale(),
        "norm": mup.Scale(),
        "o_proj": matrix,
        "q_proj": matrix,
        "k_proj": matrix,
        "gate_proj": matrix,
        "down_proj": mup.Scale(std=0.5**0.5, lr=0.5),  # its input is twice the base's
    }
    for end, scale in expected.items():
        names = [name for name in found if end in name]
        assert (names or end == "lm_head") and all(found[name] == scale for name in names), end


def test_a_matrix_with_a_finite_output_is_scaled_like_one():
    """Table 3 of the paper: there is no multiplier behind keys of a fixed number of heads."""
    fixed = config(4, num_key_value_heads=2)
    found = mup.scales(from_config(fixed))
    assert found["model.layers.0.self_attn.k_proj.weight"] == mup.Scale(std=0.25, lr=0.25)
    assert found["model.layers.0.self_attn.q_proj.weight"] == mup.Scale(std=0.5, lr=0.25)


def test_a_router_and_experts_are_scaled_by_what_feeds_them():
    small = {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    wide = GraniteMoeConfig(**{**small, "hidden_size": 256}, num_hidden_layers=1)
    wide.mup_base = {"hidden_size": 64}
    found = mup.scales(from_config(wide))
    experts = "model.layers.0.block_sparse_moe"
    assert found[f"{experts}.router.weight"] == mup.Scale(std=0.25, lr=0.25)
    assert found[f"{experts}.experts.gate_up_proj"] == mup.Scale(std=0.25, lr=0.25)
    assert found[f"{experts}.experts.down_proj"] == mup.Scale(), "fed by a finite dimension"


def test_multipliers_are_those_of_the_widths():
    wide = config(4, embedding_multiplier=12.0, output_multiplier=2.0, attention_multiplier=3.0)
    assert (wide.embedding_multiplier, wide.logits_scaling) == (12.0, 2.0)
    assert wide.attention_multiplier == pytest.approx(3.0 / 16**0.5)  # heads of the base's size
    wider_heads = config(4, num_attention_heads=4, num_key_value_heads=2)
    assert wider_heads.attention_multiplier == pytest.approx(16**0.5 / 64)  # 1/d, not 1/sqrt(d)


def test_the_base_is_a_llama():
    own = filled(config(1), hugging_face)
    same = {**BASE, "num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": True}
    llama = from_config(LlamaConfig(**same))
    materialize(llama, CPU)
    initialize(llama, device=CPU, seed=1, init=hugging_face)
    llama.load_state_dict(own.state_dict())
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(own(tokens).logits, llama(tokens).logits)
    scaled = filled(config(1)).state_dict()
    assert all(torch.equal(value, scaled[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ({**BASE, "num_hidden_layers": 1}, {}, r"base\.num_hidden_layers: .* in its widths alone"),
        ({**BASE, "vocab_size": 32}, {}, r"base\.vocab_size: a base differs"),
        ({**BASE, "hidden_size": 66}, {}, r"base\.num_attention_heads=4: hidden_size=66"),
        ({**BASE, "hidden_size": 0}, {}, r"base\.hidden_size=0: write a number of at least 1"),
        (BASE, {"hidden_size": 66}, r"^num_attention_heads=4: hidden_size=66 is not a multiple"),
        (BASE, {"num_key_value_heads": 3}, r"^num_key_value_heads=3: num_attention_heads=4"),
    ],
)
def test_a_base_that_is_none_is_refused(base, changes, message):
    with pytest.raises(ValueError, match=message):
        config(1, base=base, **changes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "has no mup_base, .*use model=llama_mup"),
        ({"num_hidden_layers": 1}, "it has no model.layers.1"),
        ({"num_hidden_layers": 3}, "the model has no model.layers.2"),
        ({"vocab_size": 32}, r"embed_tokens.weight is \[64, 64\] in the model and \[32, 64\]"),
    ],
)
def test_a_configuration_of_ones_own_is_compared_with_its_base(entries, message):
    own = LlamaConfig(**BASE, num_hidden_layers=2, vocab_size=64)
    if entries is not None:
        own.mup_base = entries
    with pytest.raises(ValueError, match=message):
        mup.scales(from_config(own))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_values_have_the_standard_deviations_of_their_widths(tied):
    model = filled(config(4, tie_word_embeddings=tied))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, value in std.items():
        expected = 0.02 if "embed" in name or "lm_head" in name else 0.01
        assert value == pytest.approx(expected, rel=0.03), name


def test_stock_transformers_opens_what_was_saved(tmp_path):
    model = filled(config(2)).eval()
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(12)[None]
    assert stock.config.mup_base == BASE
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


# -- the coordinate check --------------------------------------------------------------------------

WIDTHS = (1, 2, 4, 8)  # hidden sizes 64 to 512
RATE = 0.003


def activations(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Mean sizes of activations' changes by three steps of training, as in the paper's figure 5."""
    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    block = model.model.layers[-1]
    looked_at = {"k": block.self_attn.k_proj, "attention": block.self_attn.o_proj, "mlp": block.mlp}

    def look() -> dict[str, torch.Tensor]:
        seen = {}
        hooks = [
            module.register_forward_hook(lambda *args, n=name: seen.__setitem__(n, args[2]))
            for name, module in looked_at.items()
        ]
        with torch.no_grad():
            seen["logits"] = model(tokens).logits
        for hook in hooks:
            hook.remove()
        return seen

    before = look()
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(tokens).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    after = look()
    return {name: (after[name] - before[name]).abs().mean().item() for name in before}


def growth(make) -> dict[str, float]:
    """Each activation's exponent of the width: the slope of log(size) by log(width)."""
    found = [make(times) for times in WIDTHS]
    x = torch.tensor(WIDTHS, dtype=torch.float64).log()
    x -= x.mean()
    slopes = {}
    for name in found[0]:
        y = torch.tensor([sizes[name] for sizes in found], dtype=torch.float64).log()
        slopes[name] = (x @ (y - y.mean()) / (x @ x)).item()
    return slopes


@pytest.mark.parametrize(
    ("tied", "heads"),
    [(True, {}), (False, {"num_attention_heads": 4, "num_key_value_heads": 2})],
    ids=["tied, more heads", "untied, wider heads"],
)
def test_activations_do_not_grow_with_the_width(tied, heads):
    def with_mup(times: int) -> dict[str, float]:
        model = filled(config(times, tie_word_embeddings=tied, **heads))
        make = partial(optim.by_width, model=model, optimizer=torch.optim.AdamW, lr=RATE)
        return activations(model, make(list(model.named_parameters())))

    def without(times: int) -> dict[str, float]:
        own = {name: n * times for name, n in BASE.items()} | heads
        same = {"num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": tied}
        model = filled(LlamaConfig(**own, **same), hugging_face)
        return activations(model, torch.optim.AdamW(model.parameters(), lr=RATE))

    flat, growing = growth(with_mup), growth(without)
    assert all(abs(slope) < 0.25 for slope in flat.values()), flat
    assert all(slope > 0.5 for slope in growing.values()), growing
