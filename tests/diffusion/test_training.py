"""Diffusion in the trainer: any split of a step's rows is the same step, and a run goes on as if it
had not been interrupted."""

import json
import struct
from functools import partial

import pytest
import torch

from ditty_di.callbacks import EMA
from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.diffusion import (
    DDPM,
    ClassLabels,
    Digits,
    DiT,
    FlowMatching,
    Velocity,
    cosine,
)
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import MSELoss
from ditty_di.models.weights import initialize
from ditty_di.optim import schedules
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests import warm
from tests.distributed.cases import Recorder

pytest.importorskip("sklearn")
NOISE = [DDPM(cosine(100), Velocity()), FlowMatching()]


@pytest.fixture
def runtime():
    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()


def trained(runtime, noise, *, steps=4, total=4, accumulation=1, folder=None, save=False):
    recorder, ema = Recorder(), EMA(0.9)
    loader = partial(Loader, Digits("validation"), micro_batch_size=16 // accumulation, seed=0)
    held_out = partial(Loader, Digits("validation"), micro_batch_size=100, epochs=1, shuffle=False)
    trainer = Trainer(
        runtime=runtime,
        model=DiT(hidden=16, layers=2, heads=2, device="meta"),
        weights=partial(initialize, seed=0),
        preprocessors=[ClassLabels(0.3), noise],
        loss_fn=MSELoss(mask_key="mask"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=partial(schedules.cosine, max_steps=total, warmup_steps=1),
        dataloader=loader,
        validator=partial(Validator, held_out, eval_interval=2),
        checkpointer=partial(Checkpointer, folder, save_interval=None) if folder else None,
        callbacks={"ema": ema},
        logger=MetricsProcessor(loggers=[recorder], log_interval=1),
        global_batch_size=16,
        max_steps=steps,
    )
    trainer.train()
    trainer.close()
    averages = {k: v for k, v in ema.state_dict().items() if k != "updates"}
    validation = [row["validation/loss"] for row in recorder.rows if "validation/loss" in row]
    return recorder.losses(), validation, averages


@pytest.mark.parametrize("noise", NOISE)
def test_one_micro_batch_equals_four(runtime, noise):
    whole, many = trained(runtime, noise), trained(runtime, noise, accumulation=4)
    assert whole[0] == pytest.approx(many[0], rel=1e-4)
    assert whole[1] == pytest.approx(many[1], rel=1e-4)
    assert len(set(whole[1])) == 2, "training changes the validation loss"
    torch.testing.assert_close(whole[2], many[2], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_draws_the_same_noise_and_keeps_its_averages(runtime, tmp_path):
    noise, folder = NOISE[0], str(tmp_path)
    losses, _, averages = trained(runtime, noise)
    first, _, _ = trained(runtime, noise, steps=2, folder=folder)
    second, _, resumed = trained(runtime, noise, folder=folder)
    assert first + second == losses
    torch.testing.assert_close(resumed, averages, rtol=0, atol=0)


@pytest.mark.slow
def test_the_experiment_draws_digits_that_a_classifier_recognizes(tmp_path):
    run = tmp_path / "run"
    enough = ("max_steps=600", "export.samples=200")
    warm.ditty_di(tmp_path, "+experiment=diffusion", "logger=quiet", f"run={run}", *enough)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["recognized"] >= 0.85
    assert result["recognized_real"] > 0.95
    header = (run / "samples.png").read_bytes()[16:24]
    assert struct.unpack(">II", header) == (364, 364)  # 10 x 10 digits of 8 pixels, enlarged
