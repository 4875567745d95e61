"""Checkpoints from elsewhere: their pickles give plain data back, and run nothing."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditty_di.checkpoint import CheckpointError
from ditty_di.checkpoint.folder import METADATA, Checkpoint
from ditty_di.checkpoint.restricted import loads
from tests.checkpoint.cases import Box, checkpointer


@dataclass
class Progress:
    """A class of the user's own in a state."""

    rows: int


PLAIN = [
    {"a": [1, 2.5, None, True, b"x"], (1, "b"): {3}},
    np.arange(3),
    np.float32(2),
    np.random.default_rng(0).bit_generator.state,
    np.random.default_rng(0),
    np.random.RandomState(0).get_state(),
    random.getstate(),
    torch.arange(3),
    torch.ones(2, 3, dtype=torch.bfloat16).t(),
    torch.nn.Parameter(torch.ones(2)),
    torch.float32,
    torch.Size([1]),
    torch.device("cpu"),
    collections.OrderedDict(a=1),
    collections.deque([1]),
    collections.Counter("aa"),
    datetime.datetime(2026, 1, 1),
    Path("x"),
    Progress(3),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_comes_back(value: Any) -> None:
    found = loads(pickle.dumps(value))
    assert type(found) is type(value)
    assert pickle.dumps(found) == pickle.dumps(value) or repr(found) == repr(value)


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, __import__, shutil.rmtree, pickle.loads, torch.load,
     torch.utils.data.DataLoader, np.load, print],
)  # fmt: skip
def test_functions_are_not_called(function: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="could run code"):
        loads(pickle.dumps({"state": [Calls(function, "x")]}))


def test_a_storage_inside_is_read_with_the_same_restriction(tmp_path: Path) -> None:
    torch.save(Calls(os.mkdir, str(tmp_path / "made")), tmp_path / "evil.pt")
    inner = Calls(torch.storage._load_from_bytes, (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(pickle.UnpicklingError):
        loads(pickle.dumps(inner))
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_is_read_without_running_its_pickles(tmp_path: Path, process_group) -> None:
    checkpointer(tmp_path, {"box": Box({"a": 1, "b": torch.ones(2)})}, save_interval=1).save(1)
    checkpoint = tmp_path / "step-00000001"
    assert set(Checkpoint(checkpoint).entries["box"]) == {"a", "b"}
    evil, opened = pickle.dumps(Calls(os.mkdir, str(tmp_path / "made"))), Checkpoint(checkpoint)
    (checkpoint / METADATA).write_bytes(evil)
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir|nt\.mkdir"):
        print(opened.entries)
    assert not (tmp_path / "made").exists()


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path, process_group) -> None:
    box = Box({"loader": torch.utils.data.DataLoader([1])})
    with pytest.raises(CheckpointError, match=r"cannot be saved.*could run code"):
        checkpointer(tmp_path, {"box": box}, save_interval=1).save(1)
