"""What a run saves of any optimizer."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from ditty_di.checkpoint import CheckpointError
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.states import OptimizerState
from tests.checkpoint.cases import checkpointer

pytestmark = pytest.mark.usefixtures("process_group")

O = torch.optim  # noqa: E741


class Counting(O.AdamW):
    """Counts its updates in an option, and draws random numbers as stochastic rounding does."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] = group.get("updates", 0) + 1
            group["lr"] = 0.1 * torch.rand(()).item() / group["updates"]
        return super().step(closure)


OPTIMIZERS = {
    name: getattr(O, name)
    for name in O.__all__
    if name not in ("Optimizer", "LBFGS", "SparseAdam", "lr_scheduler", "swa_utils")
    and isinstance(getattr(O, name), type)
} | {
    "counting": Counting,
    "SGD momentum": partial(O.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW amsgrad": partial(O.AdamW, amsgrad=True, fused=False, foreach=True),
    "AdamW tensor rate": partial(O.AdamW, lr=torch.tensor(0.01), foreach=False),
    "AdamW capturable": partial(O.AdamW, fused=True),
    "AdamW no epsilon": partial(O.AdamW, eps=0.0),
}


def parameters(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.ParameterDict({k: torch.randn(4, 3).to(dtype) for k in ("a", "b", "c", "unused")})
    with torch.no_grad():
        model["a"][0] = torch.tensor([-0.0, 0.0, 1e-30])
    return model


def step(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for name in ("a", "b", "c"):
            grad = torch.randn(4, 3, generator=generator)
            model[name].grad = grad.to(model[name].dtype)
        optimizer.step()
        optimizer.zero_grad()


def trained(factory, numbers, seed=0, **options):
    model = parameters(seed, **options)
    optimizer = factory(model.named_parameters())
    state = OptimizerState(optimizer)
    step(model, optimizer, numbers)
    return model, optimizer, state


def bits(model):
    return {name: p.detach().view(torch.uint8).tolist() for name, p in model.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit(tmp_path, name):
    factory = OPTIMIZERS[name]
    model, optimizer, state = trained(factory, [1, 2, 3])
    states = {"model": ModelState([model]), "optimizer": state}
    checkpointer(tmp_path, states).save(3, force=True)
    numbers = torch.get_rng_state()

    new, fresh, fresh_state = trained(factory, [], seed=5)
    states = {"model": ModelState([new]), "optimizer": fresh_state}
    checkpointer(tmp_path, states).load()
    assert bits(new) == bits(model)
    # Most make state with the first gradient: a parameter without one must not get any.
    assert (new["unused"] in fresh.state) == (model["unused"] in optimizer.state)
    for m, o in ((model, optimizer), (new, fresh)):
        torch.set_rng_state(numbers)
        step(m, o, [4, 5])
    assert bits(new) == bits(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_making_state_to_load_into_leaves_no_trace(tmp_path, name):
    """Otherwise an infinite weight, a negative zero, or a counter would change by loading."""
    factory = OPTIMIZERS[name]
    _, _, state = trained(factory, [1, 2])
    saved = {key: None for key in state.state_dict()}
    model, optimizer, fresh = trained(factory, [])
    with torch.no_grad():
        model["b"][0, 0] = torch.inf
    model["c"].grad = gradient = torch.ones(4, 3)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    rate, groups = optimizer.param_groups[0]["lr"], copy.deepcopy(optimizer.param_groups[0])
    before, numbers = bits(model), torch.get_rng_state()

    fresh.prepare_load(saved)

    assert fresh.state_dict().keys() == saved.keys()
    assert bits(model) == before
    assert model["c"].grad is gradient and model["a"].grad is None and not calls
    assert torch.equal(torch.get_rng_state(), numbers)
    assert optimizer.param_groups[0]["lr"] is rate
    del groups["params"]
    assert groups == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert not getattr(optimizer.step, "_opt_called", False) and scheduler.last_epoch == 0
    optimizer.step()
    assert set(calls) == {"pre", "post"}, "the hooks are back"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saving_before_the_first_step_changes_nothing(tmp_path, name):
    factory = OPTIMIZERS[name]
    model, optimizer, state = trained(factory, [])
    checkpointer(tmp_path, {"optimizer": state}).save(1, force=True)
    new, fresh, fresh_state = trained(factory, [])
    checkpointer(tmp_path, {"optimizer": fresh_state}).load()
    plain = parameters()
    for m, o in ((model, optimizer), (new, fresh), (plain, factory(plain.named_parameters()))):
        torch.manual_seed(3)
        step(m, o, [1, 2])
    assert bits(model) == bits(new) == bits(plain)


class FP32Momentum(O.Optimizer):
    """Keeps more precision than the parameter has; makes a list in its second step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "updates": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum" in state:
                        state.setdefault("history", []).append(float(p.grad.float().norm()))
                    momentum = state.setdefault("momentum", {"fp32": torch.zeros(p.shape)})
                    momentum["fp32"].mul_(0.9).add_(p.grad.float())
                    p.sub_((group["lr"] / group["updates"] * momentum["fp32"]).to(p.dtype))


def test_state_keeps_its_own_dtype_structure_and_what_is_made_late(tmp_path):
    model, optimizer, state = trained(FP32Momentum, [1, 2, 3], dtype=torch.bfloat16)
    checkpointer(tmp_path, {"optimizer": state}).save(3, force=True)
    new, fresh, fresh_state = trained(FP32Momentum, [], dtype=torch.bfloat16)
    checkpointer(tmp_path, {"optimizer": fresh_state}).load()
    assert fresh.param_groups[0]["updates"] == 3
    for name in ("a", "b", "c"):
        there, here = optimizer.state[model[name]], fresh.state[new[name]]
        assert here["momentum"]["fp32"].dtype == torch.float32
        assert torch.equal(here["momentum"]["fp32"], there["momentum"]["fp32"])
        assert here["history"] == there["history"] and len(here["history"]) == 2


def grouped(*names, **options):
    def factory(named):
        rest = [(n, p) for n, p in named if n not in names]
        chosen = [(n, p) for n, p in named if n in names]
        groups = [{"params": chosen, **options}, {"params": rest}]
        return O.AdamW([g for g in groups if g["params"]], lr=0.1, weight_decay=0.5)

    return lambda named: factory(list(named))


def loaded_options(tmp_path, before, after):
    """The options of two optimizers' groups, after the second has loaded from the first."""
    _, first, state = trained(before, [1])
    first.param_groups[-1]["betas"] = (0.5, 0.6)  # as a schedule of the momentum does
    checkpointer(tmp_path, {"optimizer": state}).save(1, force=True)
    _, second, state = trained(after, [])
    checkpointer(tmp_path, {"optimizer": state}).load()
    return [(g["weight_decay"], g["betas"]) for g in second.param_groups]


def test_options_come_back_unless_they_are_configured_otherwise(tmp_path):
    same = loaded_options(
        tmp_path / "same", grouped("a", weight_decay=0), grouped("a", weight_decay=0)
    )
    assert same == [(0, (0.9, 0.999)), (0.5, (0.5, 0.6))]
    changed = loaded_options(tmp_path / "new", grouped(), lambda n: O.AdamW(n, weight_decay=0.25))
    assert changed == [(0.25, (0.5, 0.6))]


def test_parameters_may_be_grouped_otherwise(tmp_path):
    model, optimizer, state = trained(grouped(), [1, 2])
    checkpointer(tmp_path, {"optimizer": state}).save(1, force=True)
    new, fresh, fresh_state = trained(grouped("c", "a", weight_decay=0), [])
    checkpointer(tmp_path, {"optimizer": fresh_state}).load()
    for name in ("a", "b", "c"):
        assert torch.equal(
            fresh.state[new[name]]["exp_avg"], optimizer.state[model[name]]["exp_avg"]
        )
    assert [g["weight_decay"] for g in fresh.param_groups] == [0, 0.5]


@pytest.mark.parametrize(
    "before, after, message",
    [
        (O.AdamW, O.Adagrad, r"state that Adagrad does not keep: state\.a\.exp_avg, state"),
        (O.AdamW, O.SGD, r"state that SGD does not keep: .* and 4 more; load\.optimizer=false"),
        (O.SGD, O.Adagrad, r"does not have state\.a\..*load\.optimizer=false starts it afresh"),
    ],
)
def test_another_optimizer_is_an_error(tmp_path, before, after, message):
    _, _, state = trained(before, [1])
    checkpointer(tmp_path, {"optimizer": state}).save(1, force=True)
    _, _, fresh = trained(after, [])
    with pytest.raises(CheckpointError, match=message):
        checkpointer(tmp_path, {"optimizer": fresh}).load()
    assert checkpointer(tmp_path, {"optimizer": fresh}, load={"optimizer": False}).load() == 1


def test_an_optimizer_without_names_is_refused():
    with pytest.raises(ValueError, match=r"no param_names; build it from \(name, parameter\)"):
        OptimizerState(O.SGD(parameters().parameters()))
