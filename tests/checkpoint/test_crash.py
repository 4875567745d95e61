"""Whenever a save is cut short, the next start finds a whole checkpoint, and goes on."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint import ranks
from tests.checkpoint.cases import Box, checkpointer
from tests.checkpoint.crash import FileSystemCalls

AT_ONCE = 6  # saves that die at the same time, each in a folder of its own
KEEP = 1  # nothing to fall back on but the one checkpoint that is there


def content(step):
    box = Box({"weight": torch.full((64,), float(step)), "other": {"step": step, "x": b"x" * 100}})
    return box, Box({"random": step})


def saver(folder, step=0, **options):
    box, own = content(step)
    return box, own, checkpointer(folder, {"box": box}, {"rng": own}, keep_latest_k=KEEP, **options)


@pytest.fixture
def prepared(process_group):
    """A whole checkpoint of step 1, and all kinds of rubbish."""
    with tempfile.TemporaryDirectory(dir=ranks.MEMORY) as parent:
        yield make_prepared(Path(parent) / "prepared")


def make_prepared(folder):
    saver(folder, 1)[2].save(1, force=True)
    for name in (".saving-step-00000002-0a0a", ".deleting-step-00000000-0b0b", "step-00000002"):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "__0_0.distcp").write_text("half of a")
    return folder


def save_and_die(folder, rank, dies_at, async_save):
    """Saves step 2, which cleans up, writes, takes the place of rubbish and removes step 1."""
    calls = FileSystemCalls(dies_at if dist.get_rank() == rank else None)
    _, _, checkpoints = saver(folder, 2, async_save=async_save)
    with calls.watched():
        checkpoints.save(2, force=True)
        checkpoints.close()
    return len(calls.log)


def require_usable(folder):
    """Loads what is there, and saves again; the step that was found."""
    box, own, checkpoints = saver(folder)
    step = checkpoints.load()
    expected, expected_own = content(step)
    assert torch.equal(box.state["weight"], expected.state["weight"])
    assert box.state["other"] == expected.state["other"]
    assert own.state in ({"random": 0}, expected_own.state)
    box.state["weight"].fill_(3.0)
    assert checkpoints.save(3, force=True)
    again, _, checkpoints = saver(folder)
    assert checkpoints.load() == 3
    assert torch.equal(again.state["weight"], box.state["weight"])
    checkpoints.close()
    # Leftovers are removed; what has a checkpoint's name and is none is the user's to look at.
    rubbish = {"step-00000002"} if step == 1 else set()
    assert {"step-00000003"} <= set(os.listdir(folder)) <= {"step-00000003"} | rubbish
    return step


def every_death(prepared, number, rank, points, async_save=False):
    """The step found after dying at each of these calls."""
    found = {}
    for first in range(0, len(points), AT_ONCE):
        groups = {}
        for point in points[first : first + AT_ONCE]:
            folder = prepared.with_name(f"{point}")
            shutil.copytree(prepared, folder)
            groups[folder] = (
                point,
                ranks.Group(save_and_die, number, folder, rank, point, async_save),
            )
        for folder, (point, group) in groups.items():
            _, codes = group.wait()
            assert codes[rank] == ranks.KILLED, (point, codes)
            found[point] = require_usable(folder)
            shutil.rmtree(folder)
    return found


def count_calls(prepared, number, rank):
    folder = prepared.with_name("counted")
    shutil.copytree(prepared, folder)
    calls = ranks.run(save_and_die, number, folder, 0, None, False)[rank]
    assert require_usable(folder) == 2
    return calls


def test_dying_at_every_file_system_call_of_a_save(prepared):
    calls = count_calls(prepared, 1, 0)
    assert calls > 30, "the calls must be seen to be counted"
    found = every_death(prepared, 1, 0, range(1, calls + 1))
    steps = list(found.values())
    assert set(steps) == {1, 2} and steps == sorted(steps), "one moment makes the new one whole"


def test_dying_in_the_background(prepared):
    calls = count_calls(prepared, 1, 0)
    assert set(every_death(prepared, 1, 0, range(1, calls + 1, 5), True).values()) == {1, 2}


@pytest.mark.parametrize("rank", [0, 1])
def test_dying_on_one_of_two_ranks(prepared, rank):
    calls = count_calls(prepared, 2, rank)
    points = range(1, calls + 1, 6 if rank == 0 else 1)
    found = set(every_death(prepared, 2, rank, points).values())
    assert found == ({1, 2} if rank == 0 else {1})


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, process_group):
    calls = FileSystemCalls()
    _, _, checkpoints = saver(tmp_path / "new", 1)
    with calls.watched():
        checkpoints.save(1, force=True)
    log = calls.log
    named = log.index(next(c for c in log if c[0] == "rename" and ".metadata" not in c[1]))
    before, after = log[:named], log[named:]
    aside = before[-1][1]
    written = {path for name, path in before if name == "write"}
    assert len(written) == 3, "data, metadata, manifest"
    for path in written:
        last_write = max(i for i, call in enumerate(before) if call == ("write", path))
        synced = {name for call, name in before[last_write:] if call == "fsync"}
        assert path in synced or path.removesuffix(".tmp") in synced
    assert before[-1] == ("fsync", aside), "the files' names, last"
    assert "manifest.json" in [path for name, path in before if name == "write"][-1]
    assert ("fsync", str(tmp_path / "new")) in after and ("fsync", str(tmp_path)) in after
