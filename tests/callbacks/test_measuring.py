"""Callbacks that measure, on one rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.callbacks import BlockStatistics, MemoryPoints, Stragglers
from ditty_di.data import Loader
from ditty_di.loggers import MetricsProcessor
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Recorder


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def trained(runtime, callback, *, interval=1, steps=6, **slots):
    torch.manual_seed(0)
    recorder, rows = Recorder(), [(x, x[:1]) for x in torch.randn(64, 4)]
    validation = partial(Loader, rows[:8], micro_batch_size=8, epochs=1)
    trainer = Trainer(
        runtime=runtime,
        model=Blocks(),
        loss_fn=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        dataloader=partial(Loader, rows, micro_batch_size=8),
        validator=partial(Validator, validation, eval_interval=1, validate_before_training=True),
        logger=MetricsProcessor([recorder], log_interval=interval),
        callbacks={"callback": callback},
        max_steps=steps,
        max_grad_norm=float("inf"),
        **slots,
    )
    trainer.train()
    return trainer, recorder.rows


def hooks(trainer):
    """How many hooks are left behind."""
    modules = [m for part in trainer.model_parts for m in part.modules()]
    tables = [m._forward_hooks for m in modules] + [m._forward_pre_hooks for m in modules]
    optimizer = trainer.optimizer
    tables += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return sum(map(len, tables))


def test_memory_is_logged_once_with_the_first_report(runtime):
    trainer, rows = trained(runtime, MemoryPoints(), interval=4)
    found = [{k: v for k, v in row.items() if "memory/" in k or k == "step"} for row in rows]
    (points,) = [row for row in found if len(row) > 1]
    assert points.pop("step") == 1
    assert points.keys() == {
        f"memory/{name}_gib" for name in ("model", "forward", "backward", "update")
    }
    assert all(0.01 < size < 100 for size in points.values())
    assert hooks(trainer) == 0


class ByHand(BlockStatistics):
    """Also keeps what a loop written by hand would compute."""

    def on_step_end(self, trainer):
        super().on_step_end(trainer)
        layer = trainer.model_parts[0].layers[0]
        self.gradient, self.weights = layer.weight.grad, layer.weight.detach().clone()
        self.bias, self.bias_gradient = layer.bias.detach().clone(), layer.bias.grad


def test_statistics_of_blocks_are_those_of_a_loop_written_by_hand(runtime):
    callback = ByHand(interval=3)
    trainer, rows = trained(runtime, callback, steps=3)
    (row,) = [row for row in rows if "blocks/layers.0/grad_norm" in row]
    assert row["step"] == 3
    both = torch.cat([callback.gradient.flatten(), callback.bias_gradient])
    assert row["blocks/layers.0/grad_norm"] == pytest.approx(float(both.norm()))
    # SGD: the update is the rate times the gradient.
    after = torch.cat([callback.weights.flatten(), callback.bias])
    ratio = 0.1 * both.norm() / (after + 0.1 * both).norm()
    assert row["blocks/layers.0/update_ratio"] == pytest.approx(float(ratio), rel=1e-4)
    assert 0 < row["blocks/layers.1/activation_zeros"] < 1, "some that ReLU cut off"
    assert row["blocks/layers.0/activation_zeros"] == 0
    assert row["blocks/layers.0/activation_max"] >= row["blocks/layers.0/activation_std"] > 0
    assert "blocks/head/grad_norm" in row and "blocks/head/activation_max" not in row
    assert hooks(trainer) == 0


def test_nothing_is_hooked_when_nothing_is_due(runtime):
    class Look(BlockStatistics):
        seen: tuple = ()

        def on_step_end(self, trainer):
            super().on_step_end(trainer)
            self.seen = (*self.seen, hooks(trainer) > 0)

    callback = Look(interval=3)
    trained(runtime, callback)
    assert callback.seen == (False, True, False, False, True, False)


def test_without_updates_no_weights_are_copied(runtime):
    _, rows = trained(runtime, BlockStatistics(interval=2, updates=False), steps=2)
    assert not any(name.endswith("update_ratio") for row in rows for name in row)
    assert any(name.endswith("grad_norm") and "/" in name for row in rows for name in row)


def test_one_rank_waits_for_no_other(runtime):
    trainer, rows = trained(runtime, Stragglers())
    assert not any("stragglers" in name for row in rows for name in row) and hooks(trainer) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stragglers(factor=1.0), "factor=1.0 must be above 1"),
        (lambda: BlockStatistics(interval=0), "interval=0 must be at least 1 optimizer step"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
