"""A run that goes on: what a start that fails leaves behind, changed data, more steps than before;
each command in a process forked from one that has imported torch."""

import json
import shutil

import pytest

from tests import warm

MINE = """
import json
import torch

class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)

def rows():
    return [(torch.tensor(x), torch.tensor(y)) for x, y in json.load(open("rows.json"))]
"""
ROWS = [[[i / 64, 1 - i / 64], [i / 32]] for i in range(64)]
ONE = ["model._target_=mine.Net", "data.train._target_=mine.rows", "+model.width=8"]
OPTIONS = [
    "max_steps=4",
    "global_batch_size=8",
    "data.loader.micro_batch_size=8",
    "checkpoint.save_interval=2",
    "export=none",
]
OPTIONS += ["lr_scheduler=linear", "validator=none"]


def ditty_di(folder, *arguments):
    """(exit code, standard output and error) of a command in a folder."""
    done = warm.run(["-m", "ditty_di", *arguments], cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run of four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "mine.py").write_text(MINE)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    code, said = ditty_di(folder, "+experiment=module", *ONE, *OPTIONS, "run=r")
    assert code == 0, said
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "work")


def files(run):
    """The content of every file of a run, without what is said about the last start."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in run.rglob("*")
        if file.is_file()
        and file.parent.name != "logs"
        and file.name not in (".lock", "result.json")
    }


def test_a_resume_that_cannot_load_leaves_no_trace_and_more_steps_go_on(folder):
    before = files(folder / "r")
    code, said = ditty_di(
        folder, "run=r", "model.width=16", "resume.allow=[model.width]", "max_steps=6"
    )
    assert code != 0 and "shape" in said, said
    assert files(folder / "r") == before
    code, said = ditty_di(folder, "run=r", "max_steps=6")
    assert code == 0, said
    assert "the run had max_steps=4 before; its learning rate continues at" in said
    assert json.loads((folder / "r/result.json").read_text())["step"] == 6


def test_data_changed_in_place_are_refused_until_told_otherwise(folder):
    (folder / "rows.json").write_text(json.dumps([*ROWS[:40], [[0.5, 0.5], [9.0]], *ROWS[41:]]))
    before = files(folder / "r")
    code, said = ditty_di(folder, "run=r", "max_steps=6")
    assert code != 0 and "another content" in said and "load.content=false" in said, said
    assert files(folder / "r") == before
    code, said = ditty_di(folder, "run=r", "max_steps=6", "load.content=false")
    assert code == 0, said


def test_fewer_steps_are_another_run(folder):
    code, said = ditty_di(folder, "run=r", "max_steps=3")
    assert code == 2 and "max_steps: 4 -> 3" in said and "resume.allow=[max_steps]" in said, said
