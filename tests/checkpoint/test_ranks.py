"""Many ranks: sharded state, other layouts, and errors that one rank has."""

import os
import pathlib
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ditty_di.checkpoint import CheckpointError, latest
from ditty_di.checkpoint.model_state import ModelState
from tests.checkpoint import ranks
from tests.checkpoint.cases import OPTIMIZERS, Box, Run, checkpointer

LAYOUTS = {"1": (1, "fsdp"), "2": (2, "fsdp"), "2 ddp": (2, "ddp"), "4 hsdp": (4, "hsdp")}


def train_and_save(folder, layout):
    """Saves after step 3, in the background while training goes on; what was saved, and then."""
    torch.compile = lambda function, **options: function  # AdamW8bit's step: slow to compile
    result = {}
    for name in OPTIMIZERS:
        run = Run(name, layout)
        saver = run.checkpointer(folder / name, save_interval=3, async_save=name != "sgd")
        run.train([1, 2, 3])
        assert saver.save(3)
        content = run.content()
        result[name] = content, run.train([4, 5])
        saver.close()
    return result


def load_and_train(folder, layout):
    torch.compile = lambda function, **options: function
    result = {}
    for name in OPTIMIZERS:
        run = Run(name, layout, seed=7)
        assert run.checkpointer(folder / name).load() == 3
        result[name] = run.content(), run.train([4, 5])
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return folder, {
        name: ranks.run(train_and_save, n, folder / name, layout)[0]
        for name, (n, layout) in LAYOUTS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_for_bit(saved, layout):
    folder, expected = saved
    n, kind = LAYOUTS[layout]
    for loaded in ranks.run(load_and_train, n, folder / layout, kind):
        assert loaded == expected[layout]


@pytest.mark.parametrize(
    "before, after",
    [("1", "2"), ("2", "1"), ("2", "4 hsdp"), ("4 hsdp", "1"), ("2 ddp", "2"), ("1", "2 ddp")],
)
def test_another_layout_has_the_same_values(saved, before, after):
    folder, expected = saved
    n, kind = LAYOUTS[after]
    loaded = ranks.run(load_and_train, n, folder / before, kind)[0]
    for name in OPTIMIZERS:
        (content, losses), (was, then) = loaded[name], expected[before][name]
        assert content == was
        assert losses == pytest.approx(then, rel=1e-3 if "8bit" in name else 1e-6)


# -- rank states, stages, agreement ------------------------------------------------------------


def save_own(folder):
    checkpointer(folder, {}, {"rng": Box({"rank": dist.get_rank()})}).save(1, force=True)


def load_own(folder):
    own = Box({"rank": "as it was"})
    checkpointer(folder, {}, {"rng": own}).load()
    return own.state["rank"]


def test_each_rank_gets_its_own_state_back(tmp_path):
    ranks.run(save_own, 2, tmp_path)
    assert ranks.run(load_own, 2, tmp_path) == [0, 1]
    assert ranks.run(load_own, 1, tmp_path) == ["as it was"]


def stages(numbers):
    torch.manual_seed(0)
    whole = nn.ModuleDict({str(i): nn.Linear(2, 2) for i in range(2)})
    return [nn.ModuleDict({"layers": nn.ModuleDict({str(i): whole[str(i)]})}) for i in numbers]


def save_stages(folder):
    parts = stages([dist.get_rank()])
    checkpointer(folder, {"model": ModelState(parts)}).save(1, force=True)


def load_stages(folder, numbers):
    parts = stages(numbers or [dist.get_rank()])
    for part in parts:
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
    checkpointer(folder, {"model": ModelState(parts)}).load()
    return [p.tolist() for part in parts for p in part.parameters()]


def test_pipeline_stages_are_one_model(tmp_path):
    ranks.run(save_stages, 2, tmp_path)
    whole = [p.tolist() for part in stages([0, 1]) for p in part.parameters()]
    first, second = ranks.run(load_stages, 2, tmp_path, [])
    assert first + second == whole
    assert ranks.run(load_stages, 1, tmp_path, [1, 0]) == [whole[2:] + whole[:2]]
    with pytest.raises(AssertionError, match=r"this run does not: model\.layers\.1\.bias"):
        ranks.run(load_stages, 1, tmp_path, [0])


def save_two_then_load_where_ranks_disagree(folder):
    """Rank 1 looks at a folder with a newer checkpoint."""
    box = Box({"step": torch.tensor(0)})
    for place, steps in (("shared", [1]), ("other", [1, 2])):
        for step in steps:
            box.state["step"].fill_(step)
            checkpointer(folder / place, {"box": box}).save(step, force=True)
    mine = folder / ("shared", "other")[dist.get_rank()]
    return checkpointer(mine, {"box": box}).load(), box.state["step"].item()


def test_rank_0_decides_which_is_the_newest(tmp_path):
    assert ranks.run(save_two_then_load_where_ranks_disagree, 2, tmp_path) == [(1, 1), (1, 1)]


# -- errors of one rank --------------------------------------------------------------------------


class Failing(Box):
    """Fails on one rank, in the given method."""

    def __init__(self, rank, where):
        super().__init__({"x": torch.ones(1)})
        self.failing = where if dist.get_rank() == rank else None

    def state_dict(self):
        if self.failing == "state_dict":
            raise OSError("no state today")
        return self.state

    def load_state_dict(self, state_dict):
        if self.failing == "load_state_dict":
            raise OSError("not that one")


def fail_in_state(folder):
    good, messages = checkpointer(folder, {"box": Box({"x": torch.ones(1)})}), []
    assert good.save(1, force=True)
    for call in (
        lambda: checkpointer(folder, {"box": Failing(1, "state_dict")}).save(2, force=True),
        lambda: checkpointer(folder, {"box": Failing(1, "state_dict")}).load(),
        lambda: checkpointer(folder, {"box": Failing(1, "load_state_dict")}).load(),
    ):
        with pytest.raises(CheckpointError) as error:
            call()
        messages.append(str(error.value))
    assert good.load() == 1 and good.save(2, force=True)
    return messages


def test_one_ranks_error_is_raised_on_all(tmp_path):
    one, two = ranks.run(fail_in_state, 2, tmp_path)
    assert one == two
    assert one[0] == "saving step 2: rank 1: OSError: no state today"
    assert one[1].endswith("step-00000001: rank 1: OSError: no state today")
    assert one[2].endswith("step-00000001: rank 1: OSError: not that one")


def fail_in_writing(folder, failing_rank, async_save):
    """The disk is full for one rank's files, or for the manifest (which rank 0 writes)."""
    box = Box({f"x{i}": torch.ones(4) for i in range(4)})
    saver = checkpointer(folder, {"box": box}, async_save=async_save)
    saver.save(1, force=True)
    saver._wait()
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if dist.get_rank() == failing_rank or (failing_rank is None and len(calls) > 2):
            raise OSError(28, "No space left on device")
        real(descriptor)

    os.fsync = full
    with pytest.raises(CheckpointError) as error:
        saver.save(2, force=True)
        saver.save(3, force=True)
    os.fsync = real
    assert latest(folder).name == "step-00000001"
    assert saver.load() == 1, "the process group still works"
    assert saver.save(2, force=True), "the failed step can be tried again"
    saver.close()
    return str(error.value), sorted(os.listdir(folder))


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("failing_rank", [0, 1, None])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, failing_rank, async_save):
    one, two = ranks.run(fail_in_writing, 2, tmp_path, failing_rank, async_save)
    assert one == two
    message, files = one
    assert message.startswith(
        f"{'in the background: ' if async_save else ''}saving step 2 into {tmp_path}: no space "
        "left: needs about 64 bytes, "
    )
    assert message.endswith(
        f"free (saving step 2: rank {failing_rank or 0}: OSError: [Errno 28] No space left on "
        "device)"
    )
    assert files == ["step-00000001", "step-00000002"]


def fail_in_background_then_close(folder):
    saver = checkpointer(folder, {"box": Box({"x": torch.ones(4)})}, async_save=True)
    folder.write_text("a file is where the folder should be")
    assert saver.save(1, force=True)
    with pytest.raises(CheckpointError, match="in the background: saving step 1: rank 0: FileExis"):
        saver.close()
    saver.close()


def test_close_raises_what_went_wrong_in_the_background(tmp_path):
    ranks.run(fail_in_background_then_close, 1, tmp_path / "file")


def one_dies(folder, async_save):
    saver = checkpointer(folder, {"box": Box({"x": torch.ones(4)})}, async_save=async_save)
    saver.save(1, force=True)
    saver._wait()
    if dist.get_rank() == 1:
        os.fsync = lambda descriptor: os._exit(ranks.KILLED)
    with pytest.raises((CheckpointError, RuntimeError)):
        saver.save(2, force=True)
        saver.close()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_rank_that_dies_hangs_no_other(tmp_path, async_save):
    _, codes = ranks.run_dying(one_dies, 2, tmp_path, async_save, timeout=30)
    assert codes == [0, ranks.KILLED]
    assert latest(tmp_path).name == "step-00000001"


def not_shared(folder):
    """Each rank writes to a folder of its own, as on machines without a shared file system."""
    rank = dist.get_rank()
    if rank == 1:
        real = pathlib.Path.open

        def elsewhere(path, *args):
            other = folder / "machine-1" / path.name
            other.parent.mkdir(parents=True, exist_ok=True)
            return real(other, *args)

        pathlib.Path.open = elsewhere
    box = Box({f"x{i}": torch.ones(4) for i in range(4)})
    with pytest.raises(CheckpointError, match="file system that all ranks share"):
        checkpointer(folder, {"box": box}).save(1, force=True)


def test_a_folder_that_ranks_do_not_share(tmp_path):
    ranks.run(not_shared, 2, tmp_path)
    assert latest(tmp_path) is None


# -- a rank that does not answer -------------------------------------------------------------------
class Slow(Box):
    """As a state that reads rows from a disk that does not answer, for a while."""

    def state_dict(self):
        if dist.get_rank() == 1:
            time.sleep(6)
        return super().state_dict()


def wait_for_a_slow_state(folder):
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    saver = checkpointer(folder, {"data": Slow({"consumed": 1})})
    try:
        saver.require_space()
    except CheckpointError as error:
        return f"the checkpointer blames {error}"
    except RuntimeError as error:
        return str(error)
    return "waited"


def test_before_the_first_step_a_rank_that_hangs_is_missed_as_soon_as_in_training(tmp_path):
    found = ranks.run(wait_for_a_slow_state, 2, tmp_path / "checkpoints")
    assert "imed out" in found[0], found
