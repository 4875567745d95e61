"""Runs of a sweep that are worse than others end early."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ditty_di import Trainer
from ditty_di.callbacks import ASHA, Pruning
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import Loader
from ditty_di.runtime import Runtime
from ditty_di.tasks.train import train
from ditty_di.training.validation import Validator


class Distance(nn.Module):
    """A weight that is trained to 0 from where it starts."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Job:
    """One job after the other of a sweep in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, start: float, callback, run: str | None = None, unit=1.0, **slots):
        run = run or str(self.count)
        self.count += 1
        rows, held_out = ([(torch.tensor([x]), torch.zeros(1))] * 8 for x in (1.0, unit))
        loader = partial(Loader, held_out, micro_batch_size=8, epochs=1)
        options = {
            "validator": partial(Validator, loader, eval_interval=2),
            "callbacks": {"pruning": callback(str(self.folder / run))},
            "max_steps": 8,
            **slots,
        }
        trainer = Trainer(
            runtime=Runtime(seed=0),
            model=Distance(start),
            loss_fn=nn.MSELoss(),
            optimizer=partial(torch.optim.SGD, lr=0.01),
            dataloader=partial(Loader, rows, micro_batch_size=8),
            **options,
        )
        exported: list[int] = []
        result = train(trainer, export=lambda modules: exported.append(1) or {})
        assert bool(exported) == (result["status"] == "finished"), "a pruned run has no export"
        return result["status"], result["step"]


@pytest.fixture
def job(tmp_path):
    (tmp_path / "multirun.yaml").touch()
    return Job(tmp_path)


def test_of_three_runs_one_goes_on_at_each_rung(job):
    asha = partial(ASHA, eta=3)
    assert job(4.0, asha) == ("finished", 8), "the first has nothing to compare with"
    assert job(5.0, asha) == ("pruned", 2)
    assert job(6.0, asha) == ("pruned", 2)
    assert job(3.0, asha) == ("finished", 8)
    assert job(2.0, asha) == ("finished", 8)
    assert job(2.5, asha) == ("pruned", 6), "second of six, and then of four"
    rungs = {p.name: len(list(p.iterdir())) for p in sorted(job.folder.glob("rungs/*"))}
    assert rungs == {"00000002": 6, "00000006": 4}
    entry = json.loads((job.folder / "rungs/00000006/5.json").read_text())
    assert (entry["job"], entry["step"]) == ("5", 6) and entry["loss"] > 1


def test_a_rung_counts_at_the_first_validation_behind_it(job):
    asha = partial(ASHA, eta=2, first_rung=3)
    assert job(1.0, asha) == ("finished", 8)
    assert job(2.0, asha) == ("pruned", 4)
    assert sorted(p.name for p in job.folder.glob("rungs/*")) == ["00000003", "00000006"]


def test_a_run_that_ends_there_anyway_has_finished(job):
    asha = partial(ASHA, eta=2)
    job(1.0, asha)
    assert job(2.0, asha, max_steps=2) == ("finished", 2)


def test_a_loss_that_is_no_number_is_the_worst(job):
    asha = partial(ASHA, eta=2)
    assert job(1.0, asha, unit=math.nan)[0] == "pruned"
    assert json.loads((job.folder / "rungs/00000002/0.json").read_text())["loss"] is None
    assert job(9.0, asha) == ("finished", 8)


def test_a_pruned_run_that_is_resumed_goes_on_to_the_next_rung(job):
    keep = partial(Checkpointer, str(job.folder / "1/checkpoints"), save_interval=None)
    asha = partial(ASHA, eta=3)
    job(1.0, asha)
    assert job(2.0, asha, checkpointer=keep) == ("pruned", 2)
    assert job(2.0, asha, run="1", checkpointer=keep) == ("pruned", 6)


def test_a_run_of_its_own_is_not_compared(job, caplog):
    (job.folder / "multirun.yaml").unlink()
    with caplog.at_level("INFO", "ditty_di"):
        assert {job(start, ASHA)[0] for start in (1.0, 5.0)} == {"finished"}
    assert "not a job of a sweep" in caplog.text and not (job.folder / "rungs").exists()


def test_a_folder_that_cannot_be_written_does_not_end_the_training(job, caplog):
    (job.folder / "rungs").write_text("a file")
    assert job(1.0, ASHA) == ("finished", 8)
    assert "step 2 is not compared" in caplog.text


def test_bad_arguments_are_refused(job):
    with pytest.raises(ValueError, match="eta"):
        ASHA("x", eta=1)
    with pytest.raises(ValueError, match="needs a validator"):
        job(1.0, ASHA, validator=None)


def test_optuna_gives_up_trials_that_are_worse_than_the_median(job):
    optuna = pytest.importorskip("optuna", minversion="4")
    storage = f"sqlite:///{job.folder}/study.db"
    study = optuna.create_study(storage=storage, study_name="x")
    (job.folder / "study.json").write_text(json.dumps({"storage": storage, "study_name": "x"}))
    pruning = partial(Pruning, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    for start, expected in ((2.0, ("finished", 8)), (5.0, ("pruned", 2)), (1.0, ("finished", 8))):
        trial = study.ask()
        trial.set_user_attr("folder", str(job.folder / str(trial.number)))
        assert job(start, pruning) == expected
        values = study.trials[trial.number].intermediate_values
        assert list(values) == [step for step in (2, 4, 6, 8) if step <= expected[1]]
        study.tell(trial, values[max(values)])
    # What has been told is over: started again, it is a run as any other.
    assert job(5.0, pruning, run="1") == ("finished", 8)
