"""Checkpoints of a model on a frozen base: what is in them, and that the base must be the same."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.checkpoint import CheckpointError
from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.model_state import BaseState, ModelState, model_states
from ditty_di.checkpoint.read import from_checkpoint, load_model, read_base
from tests.adapters import cases
from tests.checkpoint import ranks
from tests.checkpoint.cases import Box, checkpointer
from tests.distributed.cases import make_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return cases.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return cases.save_base(tmp_path_factory.mktemp("other"), seed=1)


def save(folder, base, variant):
    """Trains two steps and saves; bytes of the adapters and of the base, and their values."""
    trainer, _ = make_trainer(folder, **cases.slots(base, variant), max_steps=2)
    trainer.train()
    trainer.close()
    model = trainer.model_parts[0]
    trained = {n: p.tolist() for n, p in model.named_parameters() if p.requires_grad}
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return sum(p.nbytes for p in model.parameters() if p.requires_grad), frozen, trained


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, *ranks.run(save, 1, folder, base, "qlora", timeout=300)[0]


def test_it_holds_adapters_their_optimizer_state_and_which_base(saved):
    folder, adapter_bytes, base_bytes, trained = saved
    checkpoint = folder / "checkpoints" / "step-00000002"
    entries = Checkpoint(checkpoint).entries
    assert set(entries["model"]) == set(trained)
    assert set(entries["base"]) == {"identity"}
    size = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    overhead = 10_000 * len(trained)  # headers of their entries, and of the optimizer's
    assert 3 * adapter_bytes < size < 3 * adapter_bytes + overhead
    assert adapter_bytes < base_bytes


def resume_all(runs):
    """What `resume` gives for each run."""
    return {name: resume(*run) for name, run in runs.items()}


def resume(folder, base, load):
    trainer, recorder = make_trainer(
        None,
        **cases.slots(base, "qlora"),
        max_steps=3,
        checkpointer=cases.checkpointer(folder, load=load),
    )
    try:
        trainer.train()
    except CheckpointError as error:
        return str(error)
    finally:
        trainer.close()
    return recorder.losses()


def test_another_base_is_refused_and_a_moved_one_is_not(saved, base, other, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    runs = {"other": (other, {}), "overridden": (other, {"base": False})}
    runs |= {"moved": (str(moved), {}), "same": (base, {})}
    copies = {n: (shutil.copytree(saved[0], tmp_path / f"run-{n}"), *r) for n, r in runs.items()}
    (found,) = ranks.run(resume_all, 1, copies, timeout=300)

    assert f"trained on the base {base} (hash " in found["other"]
    assert f"the base here is {other} (hash " in found["other"]
    assert "load.base=false" in found["other"]
    assert len(found["overridden"]) == 1
    assert found["moved"] == found["same"]


def empty(base, **transforms):
    model = cases.from_pretrained(base, **transforms)
    cases.materialize(model, cases.CPU)
    return model


def test_read_without_the_run_that_wrote_it(saved, base, other):
    folder, _, _, trained = saved
    path = folder / "checkpoints"
    assert read_base(path)["path"] == base
    fill = partial(from_checkpoint, device=cases.CPU, path=path)
    model = empty(base, **cases.VARIANTS["qlora"])
    fill(model, initialize=cases.pretrained(base, seed=9))
    assert not cases.uninitialized(model)
    assert {n: p.tolist() for n, p in model.named_parameters() if p.requires_grad} == trained

    with pytest.raises(CheckpointError, match=f"trained on the base {base} .*here is {other}"):
        fill(model, initialize=cases.pretrained(other))
    fill(model, initialize=cases.pretrained(other), check_base=False)
    fill(model)  # from the base that it brings along
    model.default_weights = None
    with pytest.raises(CheckpointError, match=r"holds adapters for the base .* and not the base"):
        fill(model)
    with pytest.raises(CheckpointError, match=r"adapters that the model does not: .*lora_A"):
        fill(empty(base), initialize=cases.pretrained(base))
    with pytest.raises(CheckpointError, match=r"does not have .*lora_magnitude_vector"):
        load_model(path, empty(base, adapter=cases.lora(use_dora=True)))


def test_a_frozen_parameter_of_no_known_base_is_saved(process_group, tmp_path):
    def model():
        layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        layers[0].requires_grad_(False)
        return layers

    class Base:
        def __init__(self, hash):
            self.hash = hash

        def __call__(self, model, /, *, device): ...

        def identity(self):
            return {"path": "here", "revision": "main", "hash": self.hash}

    everything = {"0.weight", "0.bias", "1.weight", "1.bias"}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    states = model_states([model()], partial(Base))
    assert set(states) == {"model"}
    assert set(states["model"].state_dict()) == everything | buffers
    known = model_states([model()], Base("a" * 64))
    assert set(known["model"].state_dict()) == {"1.weight", "1.bias"} | buffers
    trained = model().requires_grad_(True)
    assert set(model_states([trained], Base("a" * 64))) == {"model"}

    # A checkpoint with the frozen parameters in it gives them to a model with a known base.
    whole = model()
    checkpointer(tmp_path, {"model": ModelState([whole])}).save(1, force=True)
    target = model()
    known = model_states([target], Base("a" * 64))
    assert checkpointer(tmp_path, known).load() == 1
    assert torch.equal(target[0].weight, whole[0].weight)
    assert set(known["model"].state_dict()) == {"1.weight", "1.bias"} | buffers
    assert known["base"].state_dict()["identity"]["hash"] == "a" * 64


def test_bases_are_compared_by_hash_alone(process_group, tmp_path):
    def state(path, hash, revision=None):
        return BaseState({"path": path, "revision": revision, "hash": hash})

    saver = {"base": state("user/model", "a" * 64, "main"), "box": Box({"x": 1})}
    checkpointer(tmp_path, saver).save(1, force=True)
    assert checkpointer(tmp_path, {**saver, "base": state("/moved", "a" * 64)}).load() == 1
    with pytest.raises(
        CheckpointError, match=r"user/model@main \(hash aaaaaaaaaaaa\).*/x \(hash b"
    ):
        checkpointer(tmp_path, {**saver, "base": state("/x", "b" * 64)}).load()
