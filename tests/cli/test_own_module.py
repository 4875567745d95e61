"""A module, rows and a loss in a file of the working folder, trained by the skeleton experiment."""

import json

import pytest

from tests import warm

MINE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)

def rows():
    return [(x, x[:1].sin()) for x in torch.randn(70, 4)]

def loss(output, labels):
    return (output - labels).abs().mean()
"""
#: As the console script starts it: without the working folder on Python's path.
SCRIPT = "import sys; from ditty_di.__main__ import main; sys.exit(main())"
FILLED = ["model._target_=mine.Net", "data.train._target_=mine.rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    (path / "mine.py").write_text(MINE)
    return path


def run(folder, *arguments):
    done = warm.run(["-P", "-c", SCRIPT, "+experiment=module", *arguments], cwd=folder)
    return done.returncode, done.stdout + done.stderr


def test_a_check_names_the_two_keys_to_fill(folder):
    code, said = run(folder, "task=check")
    assert code == 2
    assert "model._target_=" in said and "data.train._target_=" in said
    assert said.count("???") == 2


def test_a_misspelt_module_is_corrected_by_one_that_is_there(folder):
    code, said = run(folder, "model._target_=mine2.Net", FILLED[1], "task=check")
    assert code == 2 and "did you mean 'mine'?" in said


def test_it_trains_with_a_function_as_its_loss(folder):
    loss = ["loss=function", "loss._target_=mine.loss"]
    code, said = run(folder, *FILLED, *loss, "max_steps=3", "run=outputs/own")
    assert code == 0, said
    assert "loss has no num_valid(batch): its value is taken as a mean over rows" in said
    result = json.loads((folder / "outputs/own/result.json").read_text())
    assert result["status"] == "finished" and 0 < result["objective"] < 2
    assert (folder / "outputs/own/export/model.safetensors").is_file()


def test_a_class_of_torch_is_a_loss_by_its_name_alone(folder):
    code, said = run(folder, *FILLED, "loss._target_=torch.nn.SmoothL1Loss", "task=check")
    assert code == 0, said
