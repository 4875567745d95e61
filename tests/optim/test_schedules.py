"""The schedules' values against formulas written out here, and their state."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ditty_di.optim import (
    Schedule,
    constant,
    cosine,
    exponential,
    infinite,
    linear,
    power,
    wsd,
)
from ditty_di.optim.schedules import cosine_decay, exponential_decay, linear_decay, sqrt_decay


def sgd(*lrs: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def rates(build: Callable[[Optimizer], Schedule], steps: int, lr: float = 1.0) -> list[float]:
    """The rate that each of the first updates is made with, as a training loop sees it."""
    optimizer = sgd(lr)
    schedule = build(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_linear_written_out() -> None:
    # Peak 2, 4 warm-up updates, then a fall from 2 to 0.5 over 6: 1.5 / 6 = 0.25 an update.
    got = rates(lambda o: linear(o, max_steps=10, warmup_steps=4, min_lr_ratio=0.25), 13, lr=2.0)
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.5, 0.5]
    assert got == pytest.approx(expected)


def test_constant_written_out() -> None:
    got = rates(lambda o: constant(o, max_steps=5, warmup_steps=2), 8)
    assert got == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_written_out() -> None:
    got = rates(lambda o: cosine(o, max_steps=110, warmup_steps=10, min_lr_ratio=0.1), 130)
    assert got[0] == pytest.approx(0.1)
    assert got[9] == got[10] == 1.0
    assert got[10 + 25] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert got[10 + 50] == pytest.approx(0.55)
    assert got[109] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert got[110] == got[129] == pytest.approx(0.1)


def test_cosine_equals_torch() -> None:
    """Without warm-up it is torch's CosineAnnealingLR, which is a recurrence, up to the end."""
    optimizer = sgd(0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.03)
    for rate in rates(lambda o: cosine(o, max_steps=40, min_lr_ratio=0.1), 41, lr=0.3):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_exponential_is_dolomites() -> None:
    floor, total, warmup = 0.3, 60, 10
    a = (1 - floor) * math.e / (math.e - 1)
    b = (floor * math.e - 1) / (math.e - 1)
    got = rates(
        lambda o: exponential(o, max_steps=total, warmup_steps=warmup, min_lr_ratio=floor),
        total + 5,
    )
    for step in range(warmup, total):
        assert got[step] == pytest.approx(a * math.exp(-(step - warmup) / (total - warmup)) + b)
    assert got[total:] == pytest.approx([floor] * 5)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        (linear_decay, 0.75, 0.5),
        (cosine_decay, (1 + math.sqrt(0.5)) / 2, 0.5),
        (sqrt_decay, 0.5, 1 - math.sqrt(0.5)),
        (exponential_decay, (math.e**0.75 - 1) / (math.e - 1), (math.e**0.5 - 1) / (math.e - 1)),
        (lambda p: 1 - p * p, 1 - 1 / 16, 0.75),
    ],
)
def test_wsd_written_out(shape: Callable[[float], float], quarter: float, half: float) -> None:
    got = rates(
        lambda o: wsd(
            o, max_steps=100, warmup_steps=5, decay_steps=20, min_lr_ratio=0.2, shape=shape
        ),
        110,
    )
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert got[5:81] == [1.0] * 76  # update 80 is the decay's first, at progress 0
    assert got[85] == pytest.approx(0.2 + 0.8 * quarter)
    assert got[90] == pytest.approx(0.2 + 0.8 * half)
    assert got[99] == pytest.approx(0.2 + 0.8 * shape(0.95))
    assert got[100:] == pytest.approx([0.2] * 10)


def test_power_is_dolomites() -> None:
    """`min(1, a' / lr * (c n)^b)` with a' = a batch_size, c = batch_size seq_len, n updates."""
    batch_size, seq_len, lr = 32, 1024, 0.02
    got = rates(
        lambda o: power(
            o, max_steps=3000, warmup_steps=100, batch_size=batch_size, seq_len=seq_len
        ),
        3500,
        lr=lr,
    )

    def law(n: int) -> float:
        return lr * min(1.0, 4.6 * batch_size / lr * (batch_size * seq_len * n) ** -0.51)

    assert law(100) == lr and law(3000) < 0.7 * lr, "the test covers the bound and the law"
    for step in (0, 50, 98):
        assert got[step] == pytest.approx(law(100) * (step + 1) / 100)
    for step in (99, 100, 500, 2999, 3499):
        assert got[step] == pytest.approx(law(step + 1))


def test_power_decay_and_floor() -> None:
    def build(optimizer: Optimizer) -> Schedule:
        return power(
            optimizer, max_steps=100, decay_steps=50, batch_size=1, seq_len=1, a=1.0, b=-0.5,
            min_lr_ratio=0.05, warmup_steps=4,
        )  # fmt: skip

    got = rates(build, 110)
    # The law is below the peak from the start: warm-up goes to 4^-0.5, not to 1.
    assert got[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 5**-0.5])
    begin = 51**-0.5
    assert got[50] == pytest.approx(begin)
    assert got[75] == pytest.approx(0.05 + (begin - 0.05) / 2)
    assert got[100:] == pytest.approx([0.05] * 10)
    alone = rates(
        lambda o: power(o, max_steps=10, batch_size=1, seq_len=1, a=1.0, b=-0.5, min_lr_ratio=0.25),
        30,
    )
    assert alone[8] == pytest.approx(1 / 3) and alone[20:] == [0.25] * 10


def test_power_keeps_the_ratio_of_groups() -> None:
    optimizer = sgd(0.1, 0.01)
    power(optimizer, max_steps=9, batch_size=1, seq_len=1, a=0.05, b=-0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.005])
    optimizer = sgd(0.1, 0.01)
    power(optimizer, max_steps=9, batch_size=1, seq_len=1, a=0.005, b=-0.5, reference_lr=0.01)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.005])


def test_infinite_written_out() -> None:
    def build(anneal_start: int | None) -> Callable[[Optimizer], Schedule]:
        return lambda o: infinite(
            o, max_steps=200, warmup_steps=10, cooldown_steps=40, constant_factor=0.5,
            anneal_start=anneal_start, min_lr_ratio=0.02,
        )  # fmt: skip

    got = rates(build(150), 220)
    assert got[0] == pytest.approx(0.1) and got[9] == got[10] == 1.0
    assert got[30] == pytest.approx(0.75)
    assert got[50:151] == pytest.approx([0.5] * 101)
    assert got[175] == pytest.approx(0.1)  # sqrt(0.5 * 0.02): half way in the logarithm
    assert got[200:] == pytest.approx([0.02] * 20)
    forever = rates(build(None), 400)
    assert forever[:150] == got[:150] and forever[150:] == [0.5] * 250


def test_groups_keep_their_own_rates() -> None:
    optimizer = sgd(1.0, 0.1)
    schedule = linear(optimizer, max_steps=4)
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.75, 0.075])


# -- as properties ----------------------------------------------------------------------------

FLOOR = st.floats(0.0, 1.0)
SHAPE = st.sampled_from([linear_decay, cosine_decay, sqrt_decay, exponential_decay])


@st.composite
def phases(draw: st.DrawFn) -> tuple[int, int, int]:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    return total, warmup, draw(st.integers(0, total - warmup))


@settings(deadline=None)
@given(phases(), FLOOR, SHAPE)
def test_warmup_rises_and_decay_falls(
    phases: tuple[int, int, int], floor: float, shape: Callable[[float], float]
) -> None:
    total, warmup, decay = phases
    schedule = wsd(
        sgd(1.0), max_steps=total, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=floor,
        shape=shape,
    )  # fmt: skip
    factors = [schedule.factor(step) for step in range(total + 20)]
    assert all(0.0 < factor <= 1.0 for factor in factors[:total]), "every update moves"
    assert factors[:warmup] == sorted(factors[:warmup])
    after = factors[warmup:]
    assert all(floor - 1e-12 <= factor <= 1.0 for factor in after)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert after[: total - warmup - decay] == [1.0] * (total - warmup - decay)
    if warmup and total > warmup:
        assert factors[warmup - 1] == factors[warmup] == 1.0
    if decay:
        assert factors[total - decay] == pytest.approx(1.0)
        assert factors[total:] == pytest.approx([floor] * 20)


@settings(deadline=None)
@given(st.sampled_from([linear, cosine, exponential]), phases(), FLOOR)
def test_no_jump_between_updates(
    build: Callable[..., Schedule], phases: tuple[int, int, int], floor: float
) -> None:
    """No two neighbours differ by more than the steepest shape (exponential) allows."""
    total, warmup, _ = phases
    factor = build(sgd(1.0), max_steps=total, warmup_steps=warmup, min_lr_ratio=floor).factor
    for step in range(total):
        slope = math.e / (math.e - 1)
        steepest = 1 / warmup if step < warmup else slope / (total - warmup)
        if step + 1 < total or total > warmup:
            assert abs(factor(step + 1) - factor(step)) <= steepest + 1e-12


@settings(deadline=None)
@given(phases(), FLOOR, st.floats(1e-3, 10.0), st.floats(-2.0, 0.0))
def test_power_is_bounded_and_falls(
    phases: tuple[int, int, int], floor: float, a: float, b: float
) -> None:
    total, warmup, decay = phases
    factor = power(
        sgd(1.0), max_steps=total, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=floor,
        a=a, b=b, batch_size=2, seq_len=3,
    ).factor  # fmt: skip
    factors = [factor(step) for step in range(total + 20)]
    assert all(0.0 < one <= 1.0 for one in factors[:total])
    after = factors[max(0, warmup - 1) :]
    assert all(floor - 1e-12 <= one <= 1.0 for one in after)
    assert all(x >= y - 1e-12 for x, y in itertools.pairwise(after))


@settings(deadline=None)
@given(st.data(), st.integers(4, 300))
def test_infinite_is_bounded_and_falls(data: st.DataObject, total: int) -> None:
    warmup = data.draw(st.integers(0, total - 2))
    cooldown = data.draw(st.integers(1, total - 1 - warmup))
    start = data.draw(st.one_of(st.none(), st.integers(warmup + cooldown, total - 1)))
    level = data.draw(st.floats(0.1, 1.0))
    floor = data.draw(st.floats(0.01, level))
    factor = infinite(
        sgd(1.0), max_steps=total, warmup_steps=warmup, cooldown_steps=cooldown,
        constant_factor=level, anneal_start=start, min_lr_ratio=floor,
    ).factor  # fmt: skip
    after = [factor(step) for step in range(max(0, warmup - 1), total + 20)]
    assert after[0] == 1.0 and factor(0) > 0
    assert all(x >= y - 1e-12 for x, y in itertools.pairwise(after))
    assert after[-20:] == pytest.approx([level if start is None else floor] * 20)
    assert factor(warmup + cooldown) == pytest.approx(level)


# -- state ------------------------------------------------------------------------------------


def train(optimizer: Optimizer, schedule: Schedule, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return seen


def test_state_round_trip_is_exact() -> None:
    def build(optimizer: Optimizer) -> Schedule:
        return cosine(optimizer, max_steps=30, warmup_steps=7, min_lr_ratio=0.1)

    whole = rates(build, 30, lr=0.3)
    optimizer = sgd(0.3)
    schedule = build(optimizer)
    train(optimizer, schedule, 11)
    state = copy.deepcopy(schedule.state_dict())
    assert state == {"last_epoch": 11}, "plain data, the same on every rank"

    resumed_optimizer = sgd(0.3)
    resumed = build(resumed_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
        assert resumed.get_last_lr() == [whole[11]]
        assert train(resumed_optimizer, resumed, 19) == whole[11:]


def test_state_round_trip_with_tensor_rates() -> None:
    """torchao's optimizers keep the rate in a tensor that their compiled step holds on to."""

    def start() -> tuple[Optimizer, Schedule]:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = AdamW([parameter], lr=torch.tensor(0.3), capturable=False, foreach=False)
        return optimizer, linear(optimizer, max_steps=9, warmup_steps=2)

    optimizer, schedule = start()
    whole = train(optimizer, schedule, 9)
    optimizer, schedule = start()
    train(optimizer, schedule, 4)
    resumed_optimizer, resumed = start()
    held = resumed_optimizer.param_groups[0]["lr"]
    resumed.load_state_dict(schedule.state_dict())
    assert resumed_optimizer.param_groups[0]["lr"] is held
    assert train(resumed_optimizer, resumed, 5) == whole[4:]


def test_curve_is_configuration() -> None:
    """A longer training_steps, or the start of annealing, takes effect on a resumed run."""
    optimizer = sgd(1.0)
    short = linear(optimizer, max_steps=10)
    train(optimizer, short, 5)
    longer_optimizer = sgd(1.0)
    longer = linear(longer_optimizer, max_steps=20)
    longer.load_state_dict(short.state_dict())
    assert longer_optimizer.param_groups[0]["lr"] == 0.75
    assert train(longer_optimizer, longer, 2) == [0.75, 0.7]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (cosine, {"max_steps": 0}, r"max_steps=0; write .* at least 1"),
        (cosine, {"max_steps": 10.5}, r"max_steps=10.5; write .*whole number"),
        (linear, {"max_steps": 100, "warmup_steps": 200}, r"warmup_steps=200 is longer .*=100"),
        (linear, {"max_steps": 100, "warmup_steps": 0.1}, r"warmup_steps=0.1; .*warmup_steps=10"),
        (linear, {"max_steps": 100, "warmup_steps": -1}, r"warmup_steps=-1; write"),
        (linear, {"max_steps": 100, "warmup_ratio": 1.5}, r"warmup_ratio=1.5; write a fraction"),
        (wsd, {"max_steps": 100, "decay_ratio": -0.1}, r"decay_ratio=-0.1; write a fraction"),
        (
            exponential,
            {"max_steps": 9, "min_lr_ratio": 1.5},
            r"min_lr_ratio=1.5; write .*fraction of the peak",
        ),
        (cosine, {"max_steps": 9, "min_lr_ratio": -0.1}, r"min_lr_ratio=-0.1; write"),
        (constant, {"max_steps": 9, "warmup_steps": 10}, r"warmup_steps=10 is longer"),
        (
            wsd,
            {"max_steps": 100, "warmup_steps": 60, "decay_steps": 50},
            r"warmup_steps=60 \+ decay_steps=50 is longer than the run \(max_steps=100\)",
        ),
        (power, {"max_steps": 9, "batch_size": 0, "seq_len": 8}, r"batch_size=0; write"),
        (power, {"max_steps": 9, "batch_size": 8, "seq_len": 8, "b": 0.5}, r"b=0.5; write"),
        (
            infinite,
            {"max_steps": 9, "cooldown_steps": 4, "min_lr_ratio": 0.0},
            r"0 < min_lr_ratio",
        ),
        (infinite, {"max_steps": 9, "cooldown_steps": 0}, r"cooldown_steps=0 would drop"),
        (
            infinite,
            {"max_steps": 9, "cooldown_steps": 4, "anneal_start": 2},
            r"anneal_start=2; write a step .* from 4 .* to 8",
        ),
    ],
)
def test_refusals_say_what_to_write(
    build: Callable[..., Schedule], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(sgd(1.0), **arguments)
