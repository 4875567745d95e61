"""What a run saves: the model, the schedule, random numbers. Optimizers have their own file."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler as schedules

from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.states import OptimizerState, RNGState, SchedulerState
from tests.checkpoint.cases import checkpointer

pytestmark = pytest.mark.usefixtures("process_group")


# -- model -------------------------------------------------------------------------------------


def network(wrap=lambda module: module):
    return nn.Sequential(wrap(nn.Linear(3, 3)), nn.Sequential(wrap(nn.BatchNorm1d(3))))


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_wrapped_and_plain_models_share_checkpoints(tmp_path, before, after):
    wraps = [lambda m: m, checkpoint_wrapper, lambda m: torch.compile(checkpoint_wrapper(m))]
    saved, loaded = network(wraps[before]), network(wraps[after])
    saved[1][0].running_mean.fill_(4)
    checkpointer(tmp_path, {"model": ModelState([saved])}).save(1, force=True)
    checkpointer(tmp_path, {"model": ModelState([loaded])}).load()
    assert list(ModelState([loaded]).state_dict()) == list(network().state_dict())
    values = [m.state_dict().values() for m in (saved, loaded)]
    assert all(map(torch.equal, *values))


def test_two_parts_with_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two tensors of the model are called 'weight'"):
        ModelState([nn.Linear(1, 1), nn.Linear(1, 1)]).state_dict()


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "head": nn.Linear(2, 4, False)})
        model["head"].weight = model["embedding"].weight
        return model

    saved, loaded = tied(), tied()
    checkpointer(tmp_path, {"model": ModelState([saved])}).save(1, force=True)
    checkpointer(tmp_path, {"model": ModelState([loaded])}).load()
    assert loaded["head"].weight is loaded["embedding"].weight
    assert torch.equal(loaded["head"].weight, saved["head"].weight)


class Extra(nn.Module):
    def __init__(self, content):
        super().__init__()
        self.content = content

    def get_extra_state(self):
        return self.content

    def set_extra_state(self, state):
        self.content = state


@pytest.mark.parametrize("content", [torch.arange(7, dtype=torch.uint8), {"recipe": [1, None]}])
def test_extra_state_of_any_kind_and_size(tmp_path, content):
    model = nn.Sequential(Extra(content))
    checkpointer(tmp_path, {"model": ModelState([model])}).save(1, force=True)
    fresh = nn.Sequential(Extra(torch.zeros(2, dtype=torch.uint8)))
    checkpointer(tmp_path, {"model": ModelState([fresh])}).load()
    assert str(fresh[0].content) == str(content)


# -- schedule ------------------------------------------------------------------------------------

SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda n: 1 / (1 + n)),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.5),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=12),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.CosineAnnealingLR(o, 9)], [3]
    ),
}


def scheduled(name, steps, rate=0.1):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).named_parameters(), lr=rate)
    scheduler = SCHEDULES[name](optimizer)
    rates = advance(optimizer, scheduler, steps)
    return optimizer, scheduler, rates


def advance(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_schedules_go_on_where_they_were(tmp_path, name, with_optimizer):
    optimizer, scheduler, _ = scheduled(name, 4)
    states = {"optimizer": OptimizerState(optimizer), "lr_scheduler": SchedulerState(scheduler)}
    checkpointer(tmp_path, states).save(4, force=True)
    new, fresh, _ = scheduled(name, 0)
    states = {"optimizer": OptimizerState(new), "lr_scheduler": SchedulerState(fresh)}
    checkpointer(tmp_path, states, load={"optimizer": with_optimizer}).load()
    assert new.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"], "also of the next update"
    assert advance(new, fresh, 6) == advance(optimizer, scheduler, 6)


def test_a_schedule_that_is_not_loaded_starts_afresh(tmp_path):
    optimizer, scheduler, _ = scheduled("exponential", 0)
    states = {"optimizer": OptimizerState(optimizer), "lr_scheduler": SchedulerState(scheduler)}
    advance(optimizer, scheduler, 4)
    checkpointer(tmp_path, states).save(4, force=True)
    new, fresh, _ = scheduled("exponential", 0)
    states = {"optimizer": OptimizerState(new), "lr_scheduler": SchedulerState(fresh)}
    checkpointer(tmp_path, states, load={"lr_scheduler": False}).load()
    assert new.param_groups[0]["lr"] == 0.1, "not the rate that the old schedule had reached"
    assert advance(new, fresh, 1)[0][0] == 0.05


def test_a_schedule_shares_nothing_with_the_state_it_was_given():
    _, scheduler, _ = scheduled("sequential", 4)
    state = copy.deepcopy(scheduler.state_dict())
    _, fresh, _ = scheduled("sequential", 0)
    given = copy.deepcopy(state)
    SchedulerState(fresh).load_state_dict(given)
    fresh._milestones.append(1)
    assert given == state


def test_a_rate_that_is_a_tensor_stays_that_tensor(tmp_path):
    rate = torch.tensor(0.5)
    _, scheduler, _ = scheduled("exponential", 3, rate=torch.tensor(0.5))
    optimizer, fresh, _ = scheduled("exponential", 0, rate=rate)
    SchedulerState(fresh).load_state_dict(scheduler.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.0625


def test_another_configured_rate_is_told_about(caplog):
    _, scheduler, _ = scheduled("exponential", 3)
    _, fresh, _ = scheduled("exponential", 0, rate=0.2)
    SchedulerState(fresh).load_state_dict(scheduler.state_dict())
    assert "base learning rates [0.1], not the configured [0.2]" in caplog.text


# -- random numbers ------------------------------------------------------------------------------


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_random_numbers_go_on(tmp_path):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    draw()
    checkpointer(tmp_path, {}, {"rng": RNGState()}).save(1, force=True)
    expected = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    checkpointer(tmp_path, {}, {"rng": RNGState()}).load()
    assert (draw(), draw()) == expected


def test_random_state_is_of_plain_types():
    def types(value):
        if isinstance(value, dict | list | tuple):
            return set().union(*map(types, value.values() if isinstance(value, dict) else value))
        return {type(value)}

    allowed = {int, float, str, torch.Tensor, type(None)}
    assert types(RNGState().state_dict()) <= allowed
