"""Evaluating a checkpoint gives what validation in training gave."""

from functools import partial

import pytest
import torch

from ditty_di.losses import CrossEntropyLoss
from ditty_di.runtime import Runtime
from ditty_di.tasks.evaluate import evaluate
from ditty_di.tasks.loading import ready
from ditty_di.training.validation import Validator


def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for valid in (30, 7):
        ids, labels = torch.randint(2, 250, (2, 4, 8), generator=generator)
        labels.view(-1)[valid:] = -100
        made.append(({"input": ids}, labels))
    return made


@pytest.fixture
def runtime():
    runtime = Runtime()
    yield runtime
    runtime.close()


def test_loss_of_a_checkpoint(runtime, build, tokenizer, checkpoint, capsys):
    parts = {"loss_fn": CrossEntropyLoss(output="logits"), "runtime": runtime}
    found = evaluate(
        model=build(),
        weights=checkpoint,
        validator=partial(Validator, batches(), eval_interval=1),
        **parts,
    )
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    with torch.no_grad():
        logits = torch.cat([model(inputs["input"]).logits for inputs, _ in batches()])
    labels = torch.cat([labels for _, labels in batches()])
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found == {"loss": pytest.approx(exact.item(), abs=1e-5), "objective": found["loss"]}
    shown = capsys.readouterr().out
    assert f"{found['loss']:.6f}" in shown


def test_a_stop_request_is_no_result(runtime, build, checkpoint):
    runtime.request_stop()
    validator = partial(Validator, batches(), eval_interval=1)
    found = evaluate(
        model=build(),
        weights=checkpoint,
        validator=validator,
        loss_fn=CrossEntropyLoss(output="logits"),
        runtime=runtime,
    )
    assert found == {"status": "preempted"}


def test_a_run_without_a_validator_is_told_how_to_get_one(build):
    with pytest.raises(ValueError, match="add validator=default"):
        evaluate(model=build(), validator=None, loss_fn=CrossEntropyLoss())
