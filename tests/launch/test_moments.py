"""SIGTERM at every moment of a training: it saves or says where it goes on; the end is exact."""

from pathlib import Path

import pytest

from tests import warm
from tests.launch.chaos import differences, state
from tests.toy import result

MODULE = """
import os
import signal
import torch
from torch import nn
from ditty_di.callbacks import Callback

def at(moment):
    if os.environ.get("SIGTERM_AT") == moment:
        os.environ["SIGTERM_AT"] = ""
        print("SIGTERM in", moment)
        os.kill(os.getpid(), signal.SIGTERM)

def compiler(module, inputs):
    at("compilation")
    return module.forward

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        at(["first batch", "step"][self.steps > 1] if self.training else "validation")
        activation = torch.relu
        if os.environ.get("SIGTERM_AT") == "compilation":
            activation = torch.compile(activation, backend=compiler)
        return self.last(self.drop(activation(self.first(x))))

class Saves(Callback):
    def state_dict(self):
        at("save")
        return {"is": "saved"}

    def load_state_dict(self, state): ...

class Export:
    def __init__(self, path):
        self.path = path

    def __call__(self, modules):
        at("export")
        torch.save(modules[0].state_dict(), self.path)

def rows(size):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    return [(row, row.sum(0, keepdim=True)) for row in x]
"""

EXPERIMENT = """# @package _global_
defaults:
  - override /model: module
  - override /data: rows
  - override /tokenizer: null
  - override /weights: torch
  - override /loss: mse
  - override /optimizer: adamw
  - override /lr_scheduler: null
  - override /logger: quiet
  - override /export: null
  - _self_
name: moments
max_steps: 12
global_batch_size: 8
model: {_target_: mylib.Net}
data:
  train: {_target_: mylib.rows, size: 200}
  validation: {_target_: mylib.rows, size: 8}
  loader: {micro_batch_size: 8}
  validation_loader: {micro_batch_size: 8}
validator: {eval_interval: 4}
checkpoint: {save_interval: 4}
callbacks: {saves: {_target_: mylib.Saves}}
export: {_target_: mylib.Export, path: "${run}/weights.pt"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    (folder / "conf/experiment").mkdir(parents=True)
    (folder / "conf/experiment/moments.yaml").write_text(EXPERIMENT)
    (folder / "mylib.py").write_text(MODULE)
    return folder


def train(folder: Path, run: str, moment: str = "") -> tuple[int, str]:
    first = [] if (folder / run).exists() else ["+experiment=moments"]
    options = {"cwd": folder, "env": {"SIGTERM_AT": moment}}
    done = warm.run(["-m", "ditty_di", *first, f"run={run}"], **options)
    assert not moment or f"SIGTERM in {moment}" in done.stdout, done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_sigterm_at_every_moment_loses_nothing(folder: Path) -> None:
    assert train(folder, "calm")[0] == 0
    wild, step = folder / "wild", 0
    for moment in ("first batch", "compilation", "step", "validation", "save"):
        code, said = train(folder, "wild", moment)
        now = result(wild)
        assert (code, now["status"]) == (0, "preempted"), said
        assert now["step"] > step or moment == "validation", said
        step = now["step"]
        assert (wild / f"checkpoints/step-{step:08}/manifest.json").exists(), said
    code, said = train(folder, "wild", "export")
    assert (code, result(wild)["status"]) == (130, "interrupted"), said
    assert "SIGTERM outside the training loop; the run goes on from step 12" in said
    code, said = train(folder, "wild")
    assert (code, result(wild)["status"]) == (0, "finished"), said
    assert (wild / "weights.pt").exists()
    ends = [state(folder / run / "checkpoints/step-00000012") for run in ("calm", "wild")]
    assert differences(*ends) == []
