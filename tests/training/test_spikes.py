"""A spike is skipped in its own step, whoever decides, and in the same one after a resume."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ditty_di.training.spikes import MedianMultiple, RobustZScore
from tests.test_trainer import Classes
from tests.training.test_non_finite import ROWS, STEPS, DecidedByHost, Fused, StopAt, outcome

Watch = partial(MedianMultiple, loss=None, grad_norm=8.0, window=4, min_steps=2)


def spiky(*steps):
    """Rows of which those of some steps are far out: loss and gradients are finite and large."""
    rows = Classes(STEPS * ROWS)
    for step in steps:
        rows.x[ROWS * (step - 1) : ROWS * step] *= -1e4
    return rows


def trained(runtime, folder, caplog, optimizer=Fused, *steps, **slots):
    slots = {"spike_policy": Watch(), "max_skipped_steps": 1} | slots
    found = outcome(runtime, folder, caplog, optimizer, [], rows=spiky(*steps), **slots)
    return *found, [m for m in caplog.messages if "is a spike" in m]


@pytest.mark.parametrize("steps", [(4,), (4, 5, 8)])
def test_the_device_skips_the_very_step_that_the_host_would(runtime, tmp_path, caplog, steps):
    by_host, by_device = (
        trained(runtime, tmp_path / name, caplog, optimizer, *steps)
        for name, optimizer in (("host", DecidedByHost), ("device", Fused))
    )
    assert by_device == by_host
    assert [int(m.split()[1]) for m in by_host[4]] == [*steps]
    assert f"'skipped_spikes': {len(steps)}" in by_host[0]


def test_a_spike_changes_as_much_as_a_step_that_is_not_finite(runtime, tmp_path, caplog):
    """Namely nothing: weights, optimizer and random numbers are the same to the bit."""
    spike = trained(runtime, tmp_path / "spike", caplog, Fused, 5)[3]["step-00000008"]
    bad = outcome(runtime, tmp_path / "nan", caplog, Fused, [5], max_skipped_steps=1)
    nan = bad[3]["step-00000008"]
    differ = {key for key in spike.keys() | nan.keys() if spike.get(key) != nan.get(key)}
    assert {key.partition(".")[0] for key in differ} == {"spike_policy", "train_state", "content"}
    without = outcome(runtime, tmp_path / "updated", caplog, Fused, [], rows=spiky(5))
    weight = next(key for key in spike if key.endswith("0.weight"))
    assert spike[weight] != without[3]["step-00000008"][weight]


def test_a_resumed_run_knows_the_steps_before(runtime, tmp_path, caplog):
    slots = {"spike_policy": Watch(min_steps=4)}  # fewer were seen since the resume
    stop = {"callbacks": {"stop": StopAt(4)}}
    trained(runtime, tmp_path / "run", caplog, Fused, 6, spike_policy=Watch(min_steps=4), **stop)
    again = trained(runtime, tmp_path / "run", caplog, Fused, 6, spike_policy=Watch(min_steps=4))
    whole = trained(runtime, tmp_path / "whole", caplog, Fused, 6, **slots)
    assert again[0] == whole[0] and again[4] == whole[4] and len(whole[4]) == 1
    assert again[3]["step-00000008"] == whole[3]["step-00000008"]


def test_without_a_budget_the_training_stops_before_the_spike(runtime, tmp_path, caplog):
    slots = {"max_skipped_steps": 5}
    stops = partial(trained, runtime, tmp_path, caplog, Fused, 5, **slots)
    result, *_, saved, messages = stops(spike_policy=Watch(max_skipped=0))
    assert "step 5 is a spike: grad_norm" in result and "above its limit" in result
    assert "rows [32, 33, 34," in result and "spike_policy.max_skipped=1 would skip it" in result
    assert saved.keys() == {"step-00000004"} and not messages
    result, *_, messages = stops(spike_policy=Watch(max_skipped=1))
    assert "'status': 'finished'" in result and len(messages) == 1


def test_a_gradient_scaler_keeps_its_scale(runtime, tmp_path, caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    result, *_, messages = trained(runtime, tmp_path, caplog, Fused, 5, grad_scaler=scaler)
    assert "'skipped_steps': 0, 'skipped_spikes': 1" in result and len(messages) == 1
    assert scaler.get_scale() == 64.0


def fed(policy, losses):
    for loss in losses:
        policy.observe({"loss": loss, "grad_norm": 1.0})
    return policy.limits()


def test_the_limits_are_those_of_the_last_steps():
    median = MedianMultiple(loss=3.0, grad_norm=None, window=4)
    assert fed(median, [2.0]) == (math.inf, math.inf)
    assert fed(median, [4.0]) == (9.0, math.inf)
    assert fed(median, [6.0, 100.0, 6.0]) == (18.0, math.inf)  # of 4, 6, 100 and 6
    again = MedianMultiple(loss=3.0, grad_norm=None, window=4)
    again.load_state_dict(median.state_dict())
    assert again.limits() == median.limits()
    z_score = RobustZScore(loss=2.0, grad_norm=2.0, window=5)
    loss, grad_norm = fed(z_score, [1.0, 2.0, 3.0, 4.0, 50.0])
    assert loss == pytest.approx(3.0 + 2.0 * 1.4826)
    assert grad_norm == math.inf, "all are equal, so nothing tells what is far"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": 0.0}, "loss=0.0 must be above 0; null does not watch it"),
        ({"window": 1}, "window=1 must be at least 2 steps"),
        ({"min_steps": 200}, "min_steps=200 must be 2 to 128, the window"),
        ({"max_skipped": -1}, "max_skipped=-1 must not be negative"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MedianMultiple(**arguments)
