"""A step that the device skips by itself ends as one that the host decided about first."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.batch import Batch
from ditty_di.callbacks import EMA, Callback
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import Loader
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.optim import Combined
from ditty_di.optim.fused import can_skip_on_device, step_unless
from ditty_di.optim.schedules import cosine
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.processors import PreProcessor
from ditty_di.training.step import TrainStep
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Recorder
from tests.test_trainer import At, Classes, Failing, everything

STEPS, ROWS = 8, 8  # a step has the rows 8 (step - 1) to 8 step - 1
TIMES = {"tokens_per_second", "peak_memory_gib", "train_seconds"}
Fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)


class DecidedByHost(torch.optim.AdamW):
    """The same update, but the optimizer does not say that it can be skipped on the device."""

    def __init__(self, named):
        super().__init__(named, lr=1e-2, fused=True)
        self._step_supports_amp_scaling = False


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            trainer.stop("enough")


class RejectStep(PreProcessor):
    """Rejects the batches of one step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def process(self, batch, ctx):
        return (None if ctx["step"] == self.step else batch), ctx


def trainer(runtime, folder, optimizer, bad, *, rows=None, every=100, epochs=None, **slots):
    torch.manual_seed(0)
    rows = rows or Classes(STEPS * ROWS)
    for step in bad:
        rows.x[ROWS * step - 3] = torch.nan
    recorder = Recorder()
    slots = {"checkpointer": partial(Checkpointer, str(folder), save_interval=every), **slots}
    made = Trainer(
        runtime=runtime,
        model=nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.1), nn.Linear(16, 4)),
        loss_fn=CrossEntropyLoss(),
        optimizer=optimizer,
        lr_scheduler=partial(cosine, max_steps=STEPS),
        dataloader=partial(Loader, rows, micro_batch_size=ROWS, shuffle=False, epochs=epochs),
        logger=MetricsProcessor([recorder], log_interval=5),
        max_steps=STEPS,
        **slots,
    )
    return made, recorder


def outcome(runtime, folder, caplog, *arguments, **slots):
    """All that a training leaves: result or error, what it logged and reported, checkpoints."""
    caplog.clear()
    made, recorder = trainer(runtime, folder, *arguments, **slots)
    try:
        result = {k: v for k, v in made.train().items() if k not in TIMES}
    except (FloatingPointError, OSError) as error:
        result = {"error": str(error), "step": error.training_step}
    made.close()
    reported = [
        {k: row[k] for k in ("step", "loss", "grad_norm", "lr") if k in row}
        for row in recorder.rows
    ]
    messages = [
        m for m in caplog.messages if "not finite" in m or "failed;" in m or "no label" in m
    ]
    saved = {path.name: everything(path) for path in folder.glob("step-*")}
    return repr(result), repr(reported), messages, saved


def failing():
    rows = Failing(STEPS * ROWS)
    rows.bad_row = 3 * ROWS + 1  # in step 4
    return {"rows": rows}


def unlabelled():
    return {"rows": Classes(STEPS * ROWS, masked=range(3 * ROWS, 4 * ROWS))}  # step 4


def rejected():
    return {"preprocessors": [RejectStep(4)], "callbacks": {"stop": StopAt(4)}}


def validated():
    return {"validator": partial(Validator, Loader(Classes(16), 8, epochs=1), eval_interval=3)}


#: Steps with NaN, steps that may be skipped, and what else happens.
CASES = {
    "amid the steps": ([3], 1, dict),
    "several": ([3, 4, 6], 5, dict),
    "the first step": ([1], 2, dict),
    "the last step": ([8], 2, dict),
    "just before a save": ([3], 2, lambda: {"every": 3}),
    "just before a validation": ([3], 2, validated),
    "just before a stop": ([3], 2, lambda: {"callbacks": {"stop": StopAt(3)}}),
    "a stop without a save": (
        [3],
        2,
        lambda: {"callbacks": {"stop": StopAt(3)}, "checkpointer": None},
    ),
    "the last of the data": ([6], 2, lambda: {"rows": Classes(6 * ROWS), "epochs": 1}),
    "with averages of the weights": ([3], 2, lambda: {"callbacks": {"ema": EMA(0.9)}}),
    "more than allowed": ([3, 5], 1, dict),
    "one more than allowed at once": ([3, 4], 1, dict),
    "no label in the step after": ([3], 1, unlabelled),
    "the step after is rejected": ([3], 1, rejected),
    "the step after fails": ([3], 2, failing),
    "the step after fails without a save": ([3], 2, lambda: failing() | {"checkpointer": None}),
    "a callback of that step fails": ([3], 2, lambda: {"callbacks": {"bad": At("on_step_end", 3)}}),
}


@pytest.mark.parametrize(("bad", "allowed", "more"), CASES.values(), ids=CASES.keys())
def test_it_is_as_if_the_host_had_decided(runtime, tmp_path, caplog, bad, allowed, more):
    by_host, by_device = (
        outcome(
            runtime, tmp_path / name, caplog, optimizer, bad, max_skipped_steps=allowed, **more()
        )
        for name, optimizer in (("host", DecidedByHost), ("device", Fused))
    )
    assert by_device == by_host
    assert any("is not finite" in message for message in by_host[2])


def test_a_run_that_stopped_at_a_skipped_step_goes_on_exactly(runtime, tmp_path, caplog):
    stop = {"callbacks": {"stop": StopAt(3)}, "max_skipped_steps": 1}
    outcome(runtime, tmp_path / "stopped", caplog, Fused, [3], **stop)
    again = outcome(runtime, tmp_path / "stopped", caplog, Fused, [3], max_skipped_steps=1)
    whole = outcome(runtime, tmp_path / "whole", caplog, Fused, [3], max_skipped_steps=1)
    assert again[0] == whole[0] and again[3]["step-00000008"] == whole[3]["step-00000008"]


def test_the_values_of_a_step_are_pending_until_the_passes_of_the_next_one(runtime, tmp_path):
    made, _ = trainer(runtime, tmp_path, Fused, [3], max_skipped_steps=2)
    pending, defer_read = [], made.optimizer_step.defer_read

    def watch():
        pending.append(made.guard.pending)
        return defer_read()

    made.optimizer_step.defer_read = watch
    made.train(), made.close()
    # Step 1 makes the optimizer's state, and step 5 is logged.
    assert pending == [False, False, True, True, True, False, True, True]


def test_the_host_reads_the_values_of_a_step_after_it_if_it_may(runtime):
    net = nn.Linear(2, 4)
    step = TrainStep(
        parts=ModelParts([net]),
        loss_fn=CrossEntropyLoss(),
        optimizer=Fused(net.named_parameters()),
        runtime=runtime,
        defer_read=lambda: True,
    )
    batch = Batch({"input": torch.ones(2, 2)}, torch.tensor([0, 1]))
    assert not step([batch], torch.tensor(2.0)).pending  # makes the optimizer's state
    values = step([batch], torch.tensor(2.0))
    assert values.pending and values["loss"] > 0 and not values.pending


def gradients(net, value):
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, value)


def momentum(parameters, **options):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, **options)


OPTIMIZERS = {
    "AdamW": lambda net: Fused(net.parameters()),
    "SGD": lambda net: momentum(net.parameters(), fused=True),
    "several": lambda net: Combined([Fused([net.weight]), momentum([net.bias], fused=True)]),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_step_that_is_skipped_on_the_device_changes_nothing(build):
    net = nn.Linear(3, 2)
    optimizer = build(net)
    gradients(net, 0.5)
    assert not can_skip_on_device(optimizer)  # a skipped step would leave its state uninitialized
    optimizer.step()

    def everything():
        states = [optimizer.state[p] for p in net.parameters()]
        return [v.clone() for v in (*net.parameters(), *(v for s in states for v in s.values()))]

    before = everything()
    gradients(net, torch.nan)
    assert can_skip_on_device(optimizer)
    step_unless(optimizer, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    gradients(net, 0.5)
    step_unless(optimizer, torch.tensor(0.0))
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_an_optimizer_that_is_fused_only_in_part_waits_for_the_host():
    net = nn.Linear(3, 2)
    groups = [{"params": [net.weight], "fused": False}, {"params": [net.bias]}]
    for optimizer in (
        momentum(net.parameters()),
        torch.optim.AdamW(groups, fused=True),
        Combined([Fused([net.weight]), momentum([net.bias])]),
    ):
        gradients(net, 0.5)
        optimizer.step()
        assert not can_skip_on_device(optimizer)
