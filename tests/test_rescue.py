"""One of two ranks fails: both save the last complete step, and going on from it is exact."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ditty_di.callbacks import Callback
from ditty_di.training.rescue import NumPyState, _version
from tests.checkpoint.ranks import run

STEPS = 8


class Rows:
    """Row `bad` cannot be read on rank 1."""

    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 128  # more than are read, so that `bad` comes once

    def __getitem__(self, index):
        if index == self.bad and dist.get_rank() == 1:
            raise OSError("shard 7 is unreadable")
        x = torch.randn(8, generator=torch.Generator().manual_seed(index)) + torch.rand(8) / 9
        return {"input": x}, x[:4].sin()


class Unwell(Callback):
    """Raises after a step on rank 1."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.step == self.step and dist.get_rank() == 1:
            raise OSError("the callback is unwell")


class Interrupted(Callback):
    """Fails as after an exception inside a save: rank 0 is in a collective that rank 1 has left."""

    def on_step_end(self, trainer):
        if trainer.step == 5:
            if dist.get_rank() == 0:
                own = trainer.checkpointer._ranks.group
                self.left = dist.all_reduce(torch.ones(1), group=own, async_op=True)
            raise OSError("a loader worker was killed")


def trained(folder, *, rows=None, callbacks=None):
    """A trainer after its training, and how that failed."""
    from ditty_di.checkpoint import Checkpointer
    from ditty_di.data import Loader
    from ditty_di.parallelize.data_parallel import shard
    from ditty_di.runtime import Runtime
    from ditty_di.training.trainer import Trainer

    torch.manual_seed(0)
    trainer = Trainer(
        runtime=Runtime(seed=3),
        model=nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 4)),
        loss_fn=nn.functional.mse_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        dataloader=partial(Loader, rows or Rows(), micro_batch_size=4, seed=1),
        parallelize_fn=shard,
        checkpointer=partial(Checkpointer, folder, save_interval=100),
        callbacks=callbacks,
        max_steps=STEPS,
        global_batch_size=16,
    )
    said = None
    try:
        trainer.train()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    trainer.close()
    return trainer, said


def bad_row():
    """In the second micro-batch of rank 1 in step 6."""
    from ditty_di.data import Loader

    return Loader(Rows(), 4, seed=1).sampler.between(5 * 16 + 8 + 5, 5 * 16 + 8 + 6)[0]


def failures(folder):
    """By what fails: (what the rank said, the step that was saved, whether going on is exact)."""

    def weights(trainer):
        return [p.detach().full_tensor() for p in trainer.parts.parameters()]

    undisturbed, _ = trained(f"{folder}/undisturbed")
    found = {}
    for name, slots in {
        "loader": {"rows": Rows(bad_row())},
        "callback": {"callbacks": {"unwell": Unwell(5)}},
        "save": {"callbacks": {"interrupted": Interrupted()}},
    }.items():
        failed, said = trained(f"{folder}/{name}", **slots)
        resumed, none = trained(f"{folder}/{name}")
        assert none is None and resumed.step == STEPS
        pairs = zip(weights(resumed), weights(undisturbed), strict=True)
        found[name] = said, failed.saving.saved_step, all(torch.equal(*pair) for pair in pairs)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescue")
    return run(failures, 2, str(folder), timeout=400), folder


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("loader", "shard 7 is unreadable"),
        ("callback", "the callback is unwell"),
        ("save", "a loader worker was killed"),
    ],
)
def test_what_fails_on_one_rank_saves_the_last_good_step_of_both(both, what, error):
    found, folder = both
    told = "OSError" if what == "save" else "RankFailedError: rank 1: OSError"  # both failed there
    assert found[0][what] == (f"{told}: {error}", 5, True)
    assert found[1][what] == (f"OSError: {error}", 5, True)
    assert sorted(p.name for p in Path(folder / what).glob("step-*")) == [
        "step-00000005",
        "step-00000008",
    ]


def test_numpys_state_is_the_present_one_whatever_was_drawn():
    state = NumPyState()
    draws = [
        lambda: None,
        np.random.rand,
        np.random.randn,  # makes two numbers, and keeps one back
        np.random.randn,
        lambda: np.random.seed(5),
        lambda: np.random.standard_normal(3),
    ]
    before = np.random.get_state()
    for draw in [*draws, *draws]:
        draw()
        kind, words, *rest = state.read()
        now, expected, *also = np.random.get_state()
        assert (kind, rest) == (now, also) and (words == expected).all()
    np.random.seed(6)  # without a number that is kept back
    copy = state.read()
    assert state.read() is copy, "nothing was drawn, nothing is copied"
    np.random.set_state(before)


@pytest.mark.filterwarnings("error")
def test_the_imaginary_part_of_a_buffer_is_a_part_of_its_version():
    tensor = torch.ones(3, dtype=torch.complex64)
    before = _version(tensor)
    tensor.data[1] += 2j  # uncounted, as by the kernels of some layers
    assert _version(tensor)[2] != before[2]
