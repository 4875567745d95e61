"""Options by parameter, and several optimizers as one."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Muon, Optimizer

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)

from ditty_di.checkpoint.states import OptimizerState
from ditty_di.optim import Combined, combined, cosine, grouped
from tests import warm
from tests.checkpoint.ranks import run as run_ranks
from tests.optim import few_rows

Named = list[tuple[str, nn.Parameter]]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(16, 8),
        nn.Linear(8, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 16, bias=False),
    )


def named(module: nn.Module) -> Named:
    """0.weight 1.weight 1.bias 2.weight 2.bias 3.weight"""
    return list(module.named_parameters())


def backward(module: nn.Module, step: int) -> float:
    tokens = torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.item()


def train(module: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(backward(module, step))
        optimizer.step()
    return losses


def by_name(optimizer: Optimizer, option: str) -> dict[str, Any]:
    return {
        name: group[option] for group in optimizer.param_groups for name in group["param_names"]
    }


# -- grouped ----------------------------------------------------------------------------------


def test_first_rule_wins_and_the_rest_keeps_the_defaults() -> None:
    optimizer = grouped(
        named(model()),
        optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1),
        groups=[
            {"match": r"^1\.", "lr": 1e-4},
            {"max_ndim": 1, "weight_decay": 0.0},
        ],
    )
    assert type(optimizer) is AdamW
    assert by_name(optimizer, "lr") == {
        "0.weight": 1e-3, "3.weight": 1e-3, "1.weight": 1e-4, "1.bias": 1e-4,
        "2.weight": 1e-3, "2.bias": 1e-3,
    }  # fmt: skip
    assert by_name(optimizer, "weight_decay") == {
        "0.weight": 0.1, "3.weight": 0.1, "1.weight": 0.1, "1.bias": 0.1,
        "2.weight": 0.0, "2.bias": 0.0,
    }  # fmt: skip


def test_no_decay_on_norms_and_biases_by_dimension() -> None:
    """Without a gradient only the decay moves a parameter."""
    module = model()
    before = {name: p.detach().clone() for name, p in named(module)}
    optimizer = grouped(
        named(module),
        optimizer=partial(SGD, lr=0.1, weight_decay=0.5),
        groups=[{"max_ndim": 1, "weight_decay": 0.0}],
    )
    for _, parameter in named(module):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in named(module):
        shrink = 1.0 if parameter.ndim < 2 else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * shrink)


def test_all_conditions_must_hold() -> None:
    optimizer = grouped(
        named(model()),
        optimizer=partial(SGD, lr=1.0),
        groups=[{"match": "weight", "exclude": r"^0\.", "min_ndim": 2, "max_ndim": 2, "lr": 2.0}],
    )
    rates = by_name(optimizer, "lr")
    assert {name for name, lr in rates.items() if lr == 2.0} == {"1.weight", "3.weight"}


def test_no_vectors_is_no_mistake() -> None:
    """A model (or an adapter) without norms and biases takes the same configuration."""
    optimizer = grouped(
        named(nn.Linear(3, 3, bias=False)),
        optimizer=partial(AdamW, lr=1e-3),
        groups=[{"max_ndim": 1, "weight_decay": 0.0}],
    )
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "wieght", "lr": 1.0}], r"groups\[0\] \(match='wieght'\).*mean 'weight'\?"),
        ([{"match": "head", "lr": 1.0}], r"takes no trainable parameter; write .*0\.weight"),
        (
            [{"max_ndim": 1, "lr": 1.0}, {"match": "bias", "lr": 2.0}],
            r"groups\[1\] .*1\.bias, 2\.bias match, but an earlier rule takes them",
        ),
        (
            [{"match": "(bias", "lr": 1.0}],
            r"groups\[0\]\.match='\(bias' is not a regular expression",
        ),
        (
            [{"match": "bias", "weight_deacy": 0.0}],
            r"groups\[0\]\.weight_deacy: AdamW has no such option .*mean 'weight_decay'\?",
        ),
        ([{"mtach": "bias", "lr": 0.0}], r"groups\[0\]\.mtach: AdamW has no such option"),
    ],
)
def test_grouped_refuses(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(named(model()), optimizer=partial(AdamW, lr=1e-3), groups=groups)


# -- combined ---------------------------------------------------------------------------------

FACTORIES: dict[str, Callable[[Named], Optimizer]] = {
    "muon": partial(
        combined,
        rules=[
            {
                "min_ndim": 2,
                "max_ndim": 2,
                "exclude": r"^(0|3)\.",
                "optimizer": partial(Muon, lr=2e-2),
            },
            {
                "optimizer": partial(
                    grouped,
                    optimizer=partial(AdamW, lr=1e-2, weight_decay=0.1),
                    groups=[{"max_ndim": 1, "weight_decay": 0.0}],
                )
            },
        ],
    ),
    # Adagrad has its state from the start; SGD without momentum never has one.
    "adagrad": partial(
        combined,
        rules=[
            {"match": "bias", "optimizer": partial(SGD, lr=0.1)},
            {"max_ndim": 1, "optimizer": partial(SGD, lr=0.1, momentum=0.9)},
            {"optimizer": partial(Adagrad, lr=0.1)},
        ],
    ),
}


def test_combined_equals_separate_optimizers() -> None:
    together, apart = model(), model()
    optimizer = FACTORIES["muon"](named(together))
    p = dict(named(apart))
    separate = [
        Muon([p["1.weight"]], lr=2e-2),
        AdamW([p["0.weight"], p["3.weight"]], lr=1e-2, weight_decay=0.1),
        AdamW([p["1.bias"], p["2.weight"], p["2.bias"]], lr=1e-2, weight_decay=0.0),
    ]
    for step in range(6):
        optimizer.zero_grad()
        backward(together, step)
        optimizer.step()
        for one in separate:
            one.zero_grad()
        backward(apart, step)
        for one in separate:
            one.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_combined_is_an_optimizer(factory: Callable[[Named], Optimizer]) -> None:
    module = model()
    optimizer = factory(named(module))
    assert isinstance(optimizer, Optimizer)
    assert {n for g in optimizer.param_groups for n in g["param_names"]} == dict(
        named(module)
    ).keys()
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("stepped"))
    schedule = cosine(optimizer, max_steps=10, warmup_steps=2)
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(10):
        losses += train(module, optimizer, range(step, step + 1))
        schedule.step()
    assert losses[-1] < losses[0] and calls == ["stepped"] * 10
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * len(peaks)
    before = [p.detach().clone() for p in module.parameters()]
    train(module, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)), (
        "a rate of 0, set through the combined groups, reaches every optimizer"
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    loss = optimizer.step(lambda: 3.0)
    assert loss == 3.0


def by_position(saved: Optimizer, fresh: Callable[[], Optimizer]) -> Optimizer:
    """As torch saves and loads."""
    loaded = fresh()
    loaded.load_state_dict(stored(saved.state_dict()))
    return loaded


def by_flat_name(saved: Optimizer, fresh: Callable[[], Optimizer]) -> Optimizer:
    """As torchtitan saves and loads."""
    loaded = fresh()
    init_optim_state(loaded)
    load_flat_optim_state_dict(loaded, stored(get_flat_optim_state_dict(saved)))
    return loaded


def by_checkpoint(saved: Optimizer, fresh: Callable[[], Optimizer]) -> Optimizer:
    """As our checkpoints do: in place, by name."""
    state = stored(OptimizerState(saved).state_dict())
    loaded = fresh()
    target = OptimizerState(loaded)
    target.prepare_load(
        {k: v.to("meta") if isinstance(v, Tensor) else None for k, v in state.items()}
    )
    target.load_state_dict(state)
    return loaded


def stored(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    ("factory", "restore"),
    [
        ("muon", by_position),
        ("muon", by_flat_name),
        ("muon", by_checkpoint),
        # Not by_flat_name: init_optim_state takes Adagrad's state for everybody's.
        ("adagrad", by_position),
        ("adagrad", by_checkpoint),
    ],
)
def test_combined_resumes_bit_exactly(factory: str, restore: Callable[..., Optimizer]) -> None:
    build = FACTORIES[factory]
    whole = model()
    losses = train(whole, build(named(whole)), range(8))
    first = model()
    optimizer = build(named(first))
    assert train(first, optimizer, range(4)) == losses[:4]
    second = model(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = restore(optimizer, lambda: build(named(second)))
    assert train(second, resumed, range(4, 8)) == losses[4:]


def test_combined_loads_while_in_use() -> None:
    """Loading replaces every optimizer's groups and state once more; they stay shared."""
    module = model()
    optimizer = FACTORIES["adagrad"](named(module))
    train(module, optimizer, range(2))
    weights, state = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    losses = train(module, optimizer, range(2, 5))
    module.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert train(module, optimizer, range(2, 5)) == losses


class Integers(SGD):
    """Keeps a uint8 code per parameter and loads it as it is, as quantized optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                code = self.state[p].setdefault("code", torch.zeros_like(p, dtype=torch.uint8))
                code += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, index in zip(parameters, indices, strict=True):
            self.state[parameter] = state_dict["state"][index]


def test_combined_loads_each_part_in_its_own_way() -> None:
    def build() -> Optimizer:
        return combined(
            named(model()),
            rules=[
                {"max_ndim": 1, "optimizer": partial(AdamW, lr=0.1)},
                {"optimizer": partial(Integers, lr=0.1)},
            ],
        )

    saved = build()
    for group in saved.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    saved.step()
    loaded = build()
    loaded.load_state_dict(saved.state_dict())
    loaded.step()
    codes = [s["code"] for s in loaded.state.values() if "code" in s]
    assert len(codes) == 3
    assert all(code.dtype == torch.uint8 and bool((code == 2).all()) for code in codes)


def test_combined_under_a_grad_scaler() -> None:
    """The scaler unscales every group, and an overflow in one part holds all of them back."""
    module, reference = model(), model()
    optimizer, plain = (FACTORIES["muon"](named(m)) for m in (module, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(poison: bool) -> None:
        optimizer.zero_grad()
        tokens = torch.arange(8)[None]
        loss = nn.functional.cross_entropy(module(tokens)[0], tokens[0])
        scaler.scale(loss).backward()
        if poison:
            next(module[1].parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    scaled_step(poison=True)
    pairs = list(zip(module.parameters(), reference.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    scaled_step(poison=False)
    plain.zero_grad()
    tokens = torch.arange(8)[None]
    nn.functional.cross_entropy(reference(tokens)[0], tokens[0]).backward()
    plain.step()
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_combined_copies_with_its_parts() -> None:
    module = model()
    optimizer = FACTORIES["muon"](named(module))
    train(module, optimizer, range(2))
    twin, twins = copy.deepcopy((module, optimizer))
    assert isinstance(twins, Combined)
    assert train(twin, twins, range(2, 5)) == train(module, optimizer, range(2, 5))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"max_ndim": 1, "optimizer": partial(SGD)}], r"no rule takes 0\.weight, 1\.weight"),
        (
            [{"optimizer": partial(SGD), "lr": 0.1}],
            r"rules\[0\] has the keys \['lr', 'optimizer'\]",
        ),
        ([{"match": "bias"}], r"rules\[0\] has the keys \[\]"),
        (
            [{"match": "baes", "optimizer": SGD}, {"optimizer": SGD}],
            r"rules\[0\] \(match='baes'\).*did you mean 'bias'",
        ),
    ],
)
def test_combined_refuses(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combined(named(model()), rules=rules)


def test_combined_refuses_what_it_cannot_pass_on() -> None:
    optimizer = FACTORIES["muon"](named(model()))
    with pytest.raises(ValueError, match="add the parameters to a rule"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    other: Tensor = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"has 1 parameter groups, this optimizer 3"):
        optimizer.load_state_dict(SGD([other], lr=0.1).state_dict())


def test_two_ranks() -> None:
    """Rules over pipeline stages, and both kinds of groups under FSDP2: see ranks_groups.py."""
    warm.ranks([Path(__file__).with_name("ranks_groups.py")])


def test_optimizers_that_cannot_step_on_shards_say_so() -> None:
    names = ["adafactor", "adamw_8bit"]
    for found in run_ranks(few_rows.train_all, 2, names):
        assert re.search(
            r"ValueError: optimizer: Adafactor cannot step on sharded .*optimizer=adamw",
            found["adafactor"],
        )
        assert re.search(
            r"ValueError: optimizer: AdamW8bit cannot step on 'three\.weight' \[3, 8\], whose rows "
            r"2 ranks do not share evenly; use optimizer=bnb_adamw_8bit",
            found["adamw_8bit"],
        )


#: Of conf/optimizer, those that step on sharded matrices of any number of rows.
ANY_ROWS = ["adamw", "bnb_adamw_8bit", "muon", "sgd"]


def test_matrices_with_fewer_rows_than_ranks_are_trained_as_on_one_rank() -> None:
    """A head of one row and a bias of one number, of which one rank has nothing."""
    one = few_rows.train_all(ANY_ROWS)
    two, other = run_ranks(few_rows.train_all, 2, ANY_ROWS)
    assert two == other
    for name in ANY_ROWS:
        assert not isinstance(two[name], str), two[name]
        assert one[name]["losses"][-1] < one[name]["losses"][0]
        for key, values in one[name].items():
            # Muon orthogonalises in bfloat16.
            assert two[name][key] == pytest.approx(values, abs=1e-3 if name == "muon" else 1e-6)
