"""bitsandbytes' optimizers on shards: the same updates on any layout, resumed or refused."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.optim import bitsandbytes as bnb
from ditty_di.optim import build_optimizer, combined, cosine, grouped
from tests.checkpoint.ranks import run
from tests.optim import sharded

missing = importlib.util.find_spec("bitsandbytes") is None
needs_it = pytest.mark.skipif(missing, reason="bitsandbytes is not installed")


@pytest.mark.parametrize("build", [bnb.adamw, bnb.lion])
def test_without_it_one_sentence_says_what_to_install(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'ditty_di\[bnb\]'") as error:
        build([nn.Parameter(torch.zeros(2))])
    assert "\n" not in str(error.value)


@needs_it
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_on_plain_tensors_it_is_the_librarys_own(name):
    from bitsandbytes.optim import AdamW8bit, Lion8bit

    torch.manual_seed(0)
    ours, theirs = (nn.Linear(64, 80) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    one = build_optimizer(partial(getattr(bnb, name), lr=0.1), [ours])
    other = {"adamw": AdamW8bit, "lion": Lion8bit}[name](theirs.parameters(), lr=0.1)
    for _ in range(4):
        x = torch.randn(8, 64)
        for model, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert one.state[ours.weight]["state1"].dtype == torch.uint8
    assert one.state[ours.bias]["state1"].dtype == torch.float32


@needs_it
def test_groups_and_schedules_reach_it():
    model = nn.Linear(4, 4)
    factory = partial(
        grouped,
        optimizer=partial(bnb.adamw, lr=0.1, weight_decay=1.0),
        groups=[{"max_ndim": 1, "weight_decay": 0.0}],
    )
    optimizer = build_optimizer(factory, [model])
    scheduler = cosine(optimizer, max_steps=10, warmup_steps=5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1.0, 0.0]
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rate = scheduler.get_last_lr()[0]
    assert 0 < rate < 0.1
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - rate))
    assert torch.equal(model.bias, before[1])
    with pytest.raises(ValueError, match="no such option per group; did you mean 'weight_decay'"):
        build_optimizer(
            partial(grouped, optimizer=bnb.adamw, groups=[{"max_ndim": 1, "weight_deacy": 0.0}]),
            [model],
        )
    rules = [
        {"max_ndim": 1, "optimizer": partial(torch.optim.SGD, lr=0.1)},
        {"optimizer": bnb.adamw},
    ]
    both = build_optimizer(partial(combined, rules=rules), [model])
    both.step()
    assert both.state[model.weight]["step"] == 1 and model.bias not in both.state


@needs_it
def test_it_is_the_unscaled_and_clipped_gradient_that_it_sees():
    """The scaler divides the gradients of the parameters that the trainer knows."""
    models = [nn.Linear(8, 8, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(partial(bnb.adamw, lr=0.1), [m]) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(4, 8)
    models[0](x).sum().backward()
    optimizers[0].step()
    scaler.scale(models[1](x).sum()).backward()
    scaler.step(optimizers[1])
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Parameters of whole runs by ranks, and of resumed ones by (ranks before, ranks after)."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    whole = {n: run(sharded.matrix, n, str(folder / str(n)), None) for n in (1, 2, 4)}
    resumed = {
        (a, b): run(sharded.matrix, b, str(folder / f"{a}to{b}"), str(folder / str(a)))
        for a, b in ((1, 2), (2, 1), (2, 2))
    }
    return whole, resumed


def same(one, other):
    return {name for name in one if torch.equal(one[name], other[name])} == set(one)


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_any_layout_makes_the_same_update(runs, name):
    whole, _ = runs
    for ranks in (2, 4):
        assert all(same(rank[name], whole[1][0][name]) for rank in whole[ranks])
    assert all(same(rank["hsdp"], whole[1][0]["adamw"]) for rank in whole[4])


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_any_layout_resumes_exactly(runs, name):
    whole, resumed = runs
    for ranks in resumed.values():
        assert all(same(rank[name], whole[1][0][name]) for rank in ranks)


@needs_it
@pytest.mark.slow
def test_blocks_across_shards_resume_on_their_own_layout_only(runs):
    whole, resumed = runs
    assert same(resumed[2, 2][0]["across"], whole[2][0]["across"])
    for layouts in ((1, 2), (2, 1)):
        for rank in resumed[layouts]:
            assert "other shapes of state.across.absmax1" in rank["across"]
            assert "load.optimizer=false starts it afresh" in rank["across"]
    one, two = whole[1][0]["across"], whole[2][0]["across"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.1, atol=0.1)


@needs_it
@pytest.mark.slow
def test_the_state_appears_by_parameter(tmp_path):
    first, second = run(sharded.states, 2)
    (alone,) = run(sharded.states, 1)
    assert first == second and first.keys() == alone.keys()
    for name, (shape, dtype) in alone.items():
        assert first[name][1] == dtype
        if not name.startswith(tuple(sharded.ACROSS)):
            assert first[name][0] == shape
    assert first["square.state1"] == ([64, 64], "torch.uint8")
    assert first["square.absmax2"] == ([16, 1], "torch.float32")
    assert first["small.state2"] == ([7, 3], "torch.float32")


@needs_it
@pytest.mark.slow
def test_shards_that_are_no_rows_are_refused():
    for messages in run(sharded.refusals, 2):
        assert len(messages) == 2 and all("optimizer=adamw_8bit" in m for m in messages)
