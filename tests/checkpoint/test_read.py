"""A model out of a checkpoint, without the run that wrote it."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ditty_di.checkpoint import CheckpointError
from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.model_state import ModelState
from ditty_di.checkpoint.read import from_checkpoint, load_model
from tests.checkpoint import ranks
from tests.checkpoint.cases import Box, Model, Run, checkpointer, without_digests


def save_sharded(folder):
    run = Run("adamw")
    saver = run.checkpointer(folder, save_interval=1)
    for step in (1, 2):
        run.train([step])
        saver.save(step)
    return run.content()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, ranks.run(save_sharded, 2, folder)[0]


def matches(model, content):
    return all(content[name] == value.tolist() for name, value in model.state_dict().items())


def read_alone(folder):
    dist.destroy_process_group()
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(folder, model) == 2
    return {name: value.tolist() for name, value in model.state_dict().items()}


def test_a_sharded_checkpoint_without_a_process_group(saved):
    folder, content = saved
    (values,) = ranks.run(read_alone, 1, folder)
    assert values == {name: content[name] for name in values}


def test_the_newest_or_a_given_one(saved):
    folder, content = saved
    newest, older = Model(), Model()
    assert load_model(str(folder), newest) == 2 and matches(newest, content)
    assert load_model(folder / "step-00000001", older) == 1 and not matches(older, content)
    assert Checkpoint.find(folder).path.name == "step-00000002"


def read_sharded(folder):
    """Only rank 1 reads: no collective is waited for."""
    run = Run("adamw", seed=5)
    if dist.get_rank() == 1:
        load_model(folder, run.model)
    dist.barrier()
    if dist.get_rank() == 0:
        load_model(folder, run.model)
    return run.content()


def test_each_rank_reads_its_shards_alone(saved):
    folder, content = saved
    read = ranks.run(read_sharded, 2, folder)[0]
    names = Model().state_dict()
    assert {name: read[name] for name in names} == {name: content[name] for name in names}


class WithFrequencies(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(3), persistent=False)


def test_as_weights_of_a_model_that_was_on_meta(saved):
    folder, content = saved
    with torch.device("meta"):
        model = WithFrequencies()
    model.to_empty(device="cpu")
    device = torch.device("cpu")

    def initialize(model, /, *, device):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(7)

    from_checkpoint(model, device=device, path=folder, initialize=initialize)
    assert matches(model, content) and model.frequencies.tolist() == [7, 7, 7]


def test_a_model_that_does_not_fit(saved, caplog):
    folder, _ = saved
    other = Model()
    other.head = nn.Linear(128, 6, bias=False)
    other.more = nn.Linear(1, 1)
    message = (
        r"step-00000002 does not fit the model: the checkpoint does not have more\.weight, "
        r"more\.bias; it has other shapes of head\.weight \(\[5, 128\] there, \[6, 128\] here\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, other)
    smaller = Model()
    del smaller.unused
    assert load_model(folder, smaller) == 2
    assert "what the model does not: unused" in caplog.text


@pytest.mark.usefixtures("process_group")
def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"missing is not a folder; give a folder with step-0"
    ):
        load_model(tmp_path / "missing", Model())
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        load_model(tmp_path, Model())
    checkpointer(tmp_path, {"box": Box({"x": 1})}).save(1, force=True)
    with pytest.raises(CheckpointError, match=r"does not have scale, unused, .* and \d more"):
        load_model(tmp_path, Model())
    model = nn.Linear(50, 50)
    checkpointer(tmp_path, {"model": ModelState([model])}).save(2, force=True)
    data = tmp_path / "step-00000002" / "__0_0.distcp"
    size = data.stat().st_size
    data.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is damaged: its content has another"):
        load_model(data.parent, model)
    without_digests(data.parent)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be read"):
        load_model(tmp_path, model)
    os.truncate(data, 10)
    with pytest.raises(CheckpointError, match=f"has 10 bytes instead of {size}"):
        load_model(tmp_path / "step-00000002", model)
