"""Which checkpoints are saved beside the interval, which remain, and which is the best."""

import json
import os
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di import Trainer
from ditty_di.checkpoint import Checkpointer, CheckpointError, best
from ditty_di.checkpoint.folder import MANIFEST, Checkpoint
from ditty_di.checkpoint.retention import Retention
from ditty_di.data import Loader
from ditty_di.parallelize.data_parallel import shard
from ditty_di.training import saving
from tests.checkpoint import ranks
from tests.checkpoint.cases import Box, checkpointer

LOSSES = {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: 1.0, 6: None}


@pytest.mark.parametrize(
    "keep, left",
    [
        (Retention(), {1, 2, 3, 4, 5, 6}),
        (Retention(2), {5, 6}),
        (Retention(1, every=2), {2, 4, 6}),
        (Retention(1, best=1), {3, 6}),
        (Retention(1, best=3), {3, 4, 5, 6}),
        (Retention(1, best=9), {1, 3, 4, 5, 6}),
        (Retention(1, every=4, best=1), {3, 4, 6}),
    ],
)
def test_one_rule_is_enough_to_remain(keep, left):
    assert keep.kept(LOSSES) == left


def test_what_was_just_written_counts_as_the_newest():
    assert Retention(1).kept(LOSSES, relied_on=2) == {2}
    assert Retention(2).kept(LOSSES, relied_on=2) == {2, 6}


def steps_of(folder):
    return [int(name.removeprefix("step-")) for name in sorted(os.listdir(folder))]


@pytest.mark.parametrize("async_save", [False, True])
def test_the_best_and_every_nth_are_saved_and_remain(tmp_path, process_group, async_save):
    saver = checkpointer(
        tmp_path,
        {"box": Box({"x": 1})},
        save_interval=None,
        keep_latest_k=1,
        keep_every=10,
        keep_best=2,
        async_save=async_save,
    )
    losses = {2: 5.0, 4: 4.0, 6: 4.5, 7: 9.0, 8: 3.0, 9: float("nan"), 10: 8.0, 12: 7.0, 14: 3.5}
    saved = [step for step in range(1, 16) if saver.save(step, objective=losses.get(step))]
    assert saved == [2, 4, 6, 8, 10, 14]
    saver.save(16, force=True)
    saver.close()
    assert steps_of(tmp_path) == [8, 10, 14, 16]
    assert best(tmp_path) == tmp_path / "step-00000008"
    assert Checkpoint.find(tmp_path / "best").step == 8
    assert [Checkpoint(p).manifest.objective for p in sorted(tmp_path.iterdir())] == [
        3.0,
        8.0,
        3.5,
        None,
    ]


def test_without_a_validated_step_there_is_no_best(tmp_path, process_group):
    checkpointer(tmp_path, {"box": Box({"x": 1})}).save(1, force=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint.*validated step.*keep_best=1"):
        Checkpoint.find(tmp_path / "best")
    # As earlier versions wrote it, whose digests hold.
    assert "objective" not in json.loads((tmp_path / "step-00000001" / MANIFEST).read_text())


class Losses:
    """A validator with a loss for each step."""

    def __init__(self, losses, **given):
        self.losses = losses

    def should_validate(self, step):
        return step in self.losses

    def validate(self, step):
        return {"loss": self.losses[step]} if step else {"loss": 99.0}

    def report(self):
        return None


def train(folder, validator=None, max_steps=6, **options):
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=nn.Linear(2, 1),
        loss_fn=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        dataloader=partial(Loader, [(p, p.sum().reshape(1)) for p in points], micro_batch_size=2),
        validator=validator,
        parallelize_fn=shard,
        checkpointer=partial(
            Checkpointer, folder, **{"save_interval": None, "keep_latest_k": None} | options
        ),
        max_steps=max_steps,
    )
    trainer.train()
    trainer.close()
    trainer.runtime.close()
    return steps_of(folder)


def test_only_a_validation_of_the_very_step_counts(tmp_path):
    validator = partial(Losses, {2: 3.0, 3: 5.0, 4: 2.0, 6: 4.0})
    assert train(tmp_path / "a", validator, keep_latest_k=1, keep_best=1) == [4, 6]
    assert best(tmp_path / "a").name == "step-00000004"
    # The training loss is none: it is that of a few rows.
    assert train(tmp_path / "b", keep_latest_k=1, keep_best=1) == [6]


def test_by_the_clock(tmp_path, monkeypatch):
    assert train(tmp_path / "often", save_every_minutes=1e-9) == [1, 2, 3, 4, 5, 6]
    assert train(tmp_path / "seldom", save_every_minutes=1000) == [6]


class Clock:
    """Twenty seconds a look on rank 0; on rank 1 it stands still, or runs wild."""

    def __init__(self, rate):
        self.now, self.rate = 0.0, rate

    def monotonic(self):
        self.now += self.rate
        return self.now


def train_by_different_clocks(folder):
    import torch.distributed as dist

    found = []
    for other in (0.0, 1e9):
        saving.time = Clock(20.0 if dist.get_rank() == 0 else other)
        found.append(train(folder / f"{other}", save_every_minutes=1))
    return found


def test_ranks_agree_on_the_step_by_rank_0s_clock(tmp_path):
    one, two = ranks.run(train_by_different_clocks, 2, tmp_path)
    assert one == two and one[0] == one[1]
    assert 1 < len(one[0]) < 6
