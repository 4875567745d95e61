"""Saving and restoring on one rank: what comes back, when, and what is refused."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ditty_di.checkpoint import CheckpointError
from ditty_di.checkpoint.folder import MANIFEST
from ditty_di.checkpoint.model_state import ModelState
from tests.checkpoint.cases import OPTIMIZERS, Box, Run, checkpointer, without_digests

pytestmark = pytest.mark.usefixtures("process_group")
EXACT = [name for name in OPTIMIZERS if name != "adamw8bit"]  # that one compiles


def names(folder):
    return sorted(os.listdir(folder))


def roundtrip(folder, saved, live, **options):
    checkpointer(folder, {"box": Box(saved)}, save_interval=1, **options).save(1)
    box = Box(live)
    assert checkpointer(folder, {"box": box}).load() == 1
    return box.state


# -- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("optimizer", EXACT)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer, async_save):
    whole = Run(optimizer)
    saver = whole.checkpointer(tmp_path, save_interval=2, async_save=async_save)
    whole.train([1, 2])
    assert saver.save(2)
    at_2 = whole.content()
    noise, losses = torch.rand(3), whole.train([3, 4, 5])
    saver.close()

    resumed = Run(optimizer, seed=9)
    resumed.train([7])  # what was done before loading must not matter
    assert resumed.checkpointer(tmp_path).load() == 2
    assert resumed.content() == at_2
    assert torch.equal(torch.rand(3), noise)
    assert resumed.train([3, 4, 5]) == losses
    assert resumed.content() == whole.content()


TENSORS = {
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "half": torch.randn(3).bfloat16(),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "complex": torch.randn(2, dtype=torch.complex64),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(1000.0)[3:5],
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def test_tensors_of_all_kinds(tmp_path):
    live = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    loaded = roundtrip(tmp_path, TENSORS, dict(live))
    for name, value in TENSORS.items():
        assert loaded[name] is live[name], "read in place"
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], value)]
        assert torch.equal(*raw), name


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(state=st.dictionaries(st.text("ab.", min_size=1, max_size=4), VALUES, max_size=4))
def test_anything_else_comes_back_whatever_the_live_one_looks_like(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("any")
    assert roundtrip(folder, state, {}) == state
    assert roundtrip(folder, state, dict.fromkeys(state, 0)) == state


def test_tensors_inside_other_things_and_of_changing_size(tmp_path):
    saved = {
        "buffer": torch.arange(5),
        "workers": [{"generator": torch.arange(3)}, {}],
        "late": torch.ones(2),
        "pair": (torch.ones(1), 2),
    }
    loaded = roundtrip(tmp_path, saved, {"buffer": torch.zeros(0, dtype=torch.int64), "pair": None})
    assert loaded["buffer"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["workers"][0]["generator"].tolist() == [0, 1, 2] and loaded["workers"][1] == {}
    assert loaded["late"].tolist() == [1, 1]
    assert loaded["pair"][0].tolist() == [1] and loaded["pair"][1] == 2


def sharded(value):
    return distribute_tensor(value, init_device_mesh("cpu", (1,)), [Shard(0)])


def test_sharded_tensors_in_nested_dicts(tmp_path):
    saved = {"ema": {"w": sharded(torch.arange(4.0)), 7: {"n": 3}}, "x": sharded(torch.ones(2))}
    live = {"ema": {"w": sharded(torch.zeros(4)), 7: {"n": 0}}, "x": sharded(torch.zeros(2))}
    loaded = roundtrip(tmp_path, saved, live)
    assert loaded["ema"]["w"].full_tensor().tolist() == [0, 1, 2, 3]
    assert loaded["ema"][7] == {"n": 3}


def test_a_tensor_may_be_sharded_now_and_whole_before(tmp_path):
    loaded = roundtrip(tmp_path, {"x": torch.arange(2.0)}, {"x": sharded(torch.zeros(2))})
    assert loaded["x"].full_tensor().tolist() == [0, 1]
    with pytest.raises(CheckpointError, match=r"box\.x is not a tensor of shape \[3\] there"):
        checkpointer(tmp_path, {"box": Box({"x": sharded(torch.zeros(3))})}).load()


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    weight, numbers = torch.zeros(200_000), [0]
    box = Box({"weight": weight, "sharded": sharded(weight), "numbers": numbers})
    saver = checkpointer(tmp_path, {"box": box}, async_save=True)
    saver.save(1, force=True)
    saver.maybe_wait_for_staging()
    weight.fill_(1)
    box.state["sharded"].fill_(1)
    numbers[0] = 1
    saver.close()
    loaded = Box({"weight": weight, "sharded": sharded(weight), "numbers": None})
    checkpointer(tmp_path, {"box": loaded}).load()
    assert not weight.any() and not loaded.state["sharded"].to_local().any()
    assert loaded.state["numbers"] == [0]


# -- when --------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
def test_due_forced_and_already_saved(tmp_path, async_save):
    saver = checkpointer(tmp_path, {"box": Box({"x": 1})}, save_interval=3, async_save=async_save)
    assert [step for step in range(1, 8) if saver.save(step)] == [3, 6]
    assert saver.save(7, force=True) and not saver.save(7, force=True)
    saver.close()
    # A rerun after the end: the step is whole, with and without having been loaded.
    rerun = checkpointer(tmp_path, {"box": Box({"x": 2})}, save_interval=3)
    assert not rerun.save(7, force=True)
    rerun = checkpointer(tmp_path, {"box": Box({"x": 2})}, save_interval=3)
    assert rerun.load() == 7 and not rerun.save(7, force=True)
    only_forced = checkpointer(tmp_path, {"box": Box({"x": 2})}, save_interval=None)
    assert not only_forced.save(9)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("keep, left", [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_so_many_are_kept(tmp_path, keep, left, async_save):
    saver = checkpointer(
        tmp_path, {"box": Box({"x": 1})}, save_interval=1, keep_latest_k=keep, async_save=async_save
    )
    for step in range(1, 6):
        saver.save(step)
    saver.close()
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_nothing_to_load(tmp_path):
    box = Box({"x": torch.ones(1)})
    assert checkpointer(tmp_path / "none", {"box": box}).load() is None
    assert not (tmp_path / "none").exists()
    assert box.state["x"].item() == 1


def test_closing_leaves_no_thread_and_can_be_repeated(tmp_path):
    saver = checkpointer(tmp_path, {"box": Box({"x": 1})}, async_save=True)
    saver.save(1, force=True)
    saver.close()
    saver.close()
    assert not [thread for thread in threading.enumerate() if "_write_behind" in thread.name]
    assert names(tmp_path) == ["step-00000001"]


def test_states_can_be_left_out(tmp_path):
    saved, own = {"a": Box({"x": 1}), "b": Box({"y": 1})}, {"rng": Box({"z": 1})}
    checkpointer(tmp_path, saved, own).save(1, force=True)
    new = {"a": Box({"x": 2}), "b": Box({"other": 2}), "new": Box({"n": 2})}
    own = {"rng": Box({"z": 2})}
    load = {"b": False, "new": False, "rng": False, "not there": False, "a": True}
    assert checkpointer(tmp_path, new, own, load=load).load() == 1
    assert [box.state for box in (*new.values(), *own.values())] == [
        {"x": 1},
        {"other": 2},
        {"n": 2},
        {"z": 2},
    ]


# -- what is refused ------------------------------------------------------------------------------


def test_what_the_checkpoint_lacks_is_named_and_nothing_is_read(tmp_path):
    weight = torch.zeros(2)
    checkpointer(tmp_path, {"m": Box({"w": torch.ones(2)})}).save(1, force=True)
    new = {"m": Box({"w": weight, **{f"k{i}": i for i in range(9)}}), "scaler": Box({"scale": 1.0})}
    with pytest.raises(CheckpointError) as error:
        checkpointer(tmp_path, new, {"rng": Box({})}).load()
    message = str(error.value)
    assert "step-00000001: rank 0: the checkpoint does not have m.k0, m.k1" in message
    assert "and 6 more; load.m=false load.scaler=false load.rng=false starts without" in message
    assert "Traceback" not in message and "\n" not in message
    assert not weight.any()


def test_a_model_must_fit_exactly(tmp_path):
    saver = checkpointer(tmp_path, {"model": ModelState([nn.Linear(2, 3)])})
    saver.save(1, force=True)
    for other, message in {
        nn.Linear(
            2, 4
        ): r"model: it has other shapes of weight \(\[3, 2\] there, \[4, 2\] here\), b",
        nn.Linear(2, 3, bias=False): r"the checkpoint has what this run does not: model\.bias",
        nn.Sequential(nn.Linear(2, 3)): r"model: the checkpoint does not have 0\.weight, 0\.bias",
    }.items():
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(CheckpointError, match=message):
            checkpointer(tmp_path, {"model": ModelState([other])}).load()
        assert all(map(torch.equal, before, other.parameters()))


def test_another_dtype_is_cast_with_a_warning(tmp_path, caplog):
    loaded = roundtrip(tmp_path, {"x": torch.ones(2)}, {"x": torch.zeros(2).bfloat16()})
    assert loaded["x"].dtype == torch.bfloat16 and loaded["x"].all()
    assert "box.x (torch.float32 -> torch.bfloat16)" in caplog.text


@pytest.mark.parametrize(
    "state, message",
    [
        ({"f": lambda: 0}, "f cannot be saved: .*keep functions, locks"),
        ({"a": {"b": threading.Lock()}}, "a cannot be saved: .*pickle"),
        ({1: 1, "1": 2}, "two entries are called '1'"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, state, message):
    saver = checkpointer(tmp_path, {"box": Box(state)})
    with pytest.raises(CheckpointError, match=message):
        saver.save(1, force=True)
    assert not names(tmp_path)


def test_sharded_tensors_in_a_list_are_refused(tmp_path):
    saver = checkpointer(tmp_path, {"box": Box({"a": {"b": [sharded(torch.ones(2))]}})})
    with pytest.raises(CheckpointError, match=r"a\.b is a list with sharded tensors"):
        saver.save(1, force=True)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_damage_of_a_whole_checkpoint_is_an_error(tmp_path, file):
    """Without digests, as of earlier versions. The older one is not taken instead: that would lose
    steps without a word."""
    saver = checkpointer(tmp_path, {"box": Box({"x": torch.ones(1000), "y": 1})}, save_interval=1)
    saver.save(1), saver.save(2)
    without_digests(tmp_path / "step-00000002")
    path = tmp_path / "step-00000002" / file
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match=r"loading .*step-00000002: rank 0: ") as error:
        saver.load()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def flip_a_bit(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", MANIFEST])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, file, caplog):
    box = Box({"x": torch.ones(1000), "y": 1})
    saver = checkpointer(tmp_path, {"box": box}, save_interval=1, keep_latest_k=2)
    saver.save(1)
    box.state["x"].fill_(2.0)
    saver.save(2)
    damaged = tmp_path / "step-00000002" / file
    at = damaged.read_bytes().index(b"2.") if file == MANIFEST else damaged.stat().st_size // 2
    flip_a_bit(damaged, at)
    assert saver.load() == 1 and box.state["x"].eq(1).all()
    assert f"passing over a checkpoint that is damaged: {damaged}" in caplog.text
    # It neither stands for its step nor counts among those that are kept.
    saver.save(3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert saver.save(2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert checkpointer(tmp_path, {"box": box}).load() == 3


def test_damaged_checkpoints_alone_are_an_error_not_a_new_start(tmp_path):
    saver = checkpointer(tmp_path, {"box": Box({"x": torch.ones(1000)})}, save_interval=1)
    saver.save(1)
    flip_a_bit(tmp_path / "step-00000001" / "__0_0.distcp", 900)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*is damaged.*start anew"):
        saver.load()


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_loads(tmp_path):
    saver = checkpointer(tmp_path, {"box": Box({"x": torch.ones(3)})}, save_interval=1)
    saver.save(1)
    without_digests(tmp_path / "step-00000001")
    assert saver.load() == 1


# -- no room --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_with_what_is_needed_and_leaves_the_others_whole(small_disk):
    box = Box({"x": torch.rand(100_000)})
    saver = checkpointer(small_disk / "c", {"box": box}, save_interval=1, keep_latest_k=None)
    saver.save(1), saver.save(2)
    with pytest.raises(
        CheckpointError,
        match=rf"^saving step 3 into {small_disk}/c: no space left: needs about 40\d.\d kB, ",
    ):
        saver.save(3)
    assert names(small_disk / "c") == ["step-00000001", "step-00000002"]
    with pytest.raises(CheckpointError, match=r"too little room: needs about 40\d.\d kB, 1\d\d"):
        saver.require_space()
    shutil.rmtree(small_disk / "c" / "step-00000001")
    saver.require_space()
    assert saver.save(3) and saver.load() == 3


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    """In a process of its own, as the limit cannot be taken back."""
    code = f"""
        import resource, signal, torch, torch.distributed as dist
        from tests.checkpoint.cases import Box, checkpointer
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        box = Box({{"x": torch.rand(100_000)}})
        saver = checkpointer({str(tmp_path)!r}, {{"box": box}}, save_interval=1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            saver.save(1)
        except Exception as error:
            print(type(error).__name__, error)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"CheckpointError saving step 1 into {tmp_path}: a file was cut short")
    assert "needs about 400" in said and "ulimit -f" in said
    assert names(tmp_path) == []


def test_an_incomplete_newest_is_passed_over(tmp_path, caplog):
    box = Box({"x": torch.ones(1000)})
    saver = checkpointer(tmp_path, {"box": box}, save_interval=1)
    saver.save(1), saver.save(2)
    os.truncate(tmp_path / "step-00000002" / "__0_0.distcp", 100)
    assert saver.load() == 1
    assert "100 bytes instead of" in caplog.text
    assert saver.save(2), "and it is written again"
    assert saver.load() == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"save_interval": 0}, "checkpoint.save_interval=0"),
        ({"keep_latest_k": 0}, "checkpoint.keep_latest_k=0"),
        ({"rank_states": {"box": Box({})}}, r"unique and without dots: \['box'"),
        ({"rank_states": {"a.b": Box({})}}, r"unique and without dots: \['a.b'"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        checkpointer(tmp_path, {"box": Box({})}, **options)
