"""What processors, losses and callbacks may do in a trainer, what is kept of them, and what is
refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.callbacks import EMA
from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import (
    CompositeLoss,
    CrossEntropyLoss,
    LossCalculator,
    LossOutput,
    MSELoss,
)
from ditty_di.optim import constant
from ditty_di.processors import Context, KeepInput, PostProcessor, PreProcessor
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Recorder


class Rewrite(PostProcessor):
    """Writes another target behind the model."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def process(self, output, ctx):
        ctx["target"] = self.way(ctx["target"])
        return output, ctx


def points(*processors, loss=None, callbacks=None, **slots):
    """A linear model on points, with the loss of its first step."""
    rows = [
        ({"input": x}, x[:3])
        for x in torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    ]
    pre = [p for p in processors if isinstance(p, PreProcessor)]
    recorder = Recorder()
    torch.manual_seed(0)
    options = {
        "model": nn.Linear(4, 3),
        "loss_fn": loss or MSELoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "lr_scheduler": partial(constant, max_steps=10),
        "dataloader": partial(Loader, rows, micro_batch_size=4, shuffle=False),
        "max_steps": 1,
        "logger": MetricsProcessor([recorder], log_interval=1),
        "preprocessors": pre,
        "postprocessors": [p for p in processors if p not in pre],
        "callbacks": callbacks,
    }
    trainer = Trainer(**{**options, **slots})
    trainer.train()
    trainer.close()
    return trainer, recorder


def test_a_postprocessor_may_change_a_target_but_not_how_many_elements_are_valid(runtime):
    (plain,) = points()[1].losses()
    (halved,) = points(Rewrite(lambda y: y / 2))[1].losses()
    assert halved != plain
    with pytest.raises(ValueError, match=r"changed the number of valid elements .* from 12 to 36"):
        points(Rewrite(lambda y: y.repeat(3, 1)))
    ignored = CrossEntropyLoss(ignore_index=7)
    rows = [({"input": x}, torch.tensor(1)) for x in torch.randn(8, 4)]
    with pytest.raises(ValueError, match=r"from 4 to 2"):
        points(
            Rewrite(lambda y: y.masked_fill_(torch.arange(4) < 2, 7)),
            loss=ignored,
            dataloader=partial(Loader, rows, micro_batch_size=4),
        )


def test_metrics_of_a_loss_do_not_hide_those_of_the_trainer(runtime):
    class Loud(MSELoss):
        def compute(self, model_output, ctx):
            computed = super().compute(model_output, ctx)
            return LossOutput(computed.loss, {"loss": -1.0, "grad_norm": -1.0, "own": -1.0})

    _, recorder = points(loss=Loud())
    (row,) = recorder.rows
    assert row["loss"] > 0 and row["grad_norm"] > 0 and row["own"] == -1
    _, recorder = points(loss=CompositeLoss([(Loud(), 1.0)]))
    assert recorder.rows[0]["loud/loss"] > 0 and recorder.rows[0]["loud/own"] == -1


class Augment(PreProcessor, nn.Module):
    """Counts batches in a buffer; notes whether it is in training."""

    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("seen", torch.zeros(()))
        self.modes = []

    def process(self, batch, ctx):
        self.seen += self.training
        self.modes.append(self.training)
        return batch, ctx


def test_processors_and_losses_that_are_modules_are_evaluated_and_resumed(runtime, tmp_path):
    class Normed(MSELoss):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False)

        def compute(self, model_output, ctx):
            return super().compute(self.norm(model_output), ctx)

    def trained(steps, *more):
        loss, augment = Normed(), Augment()
        rows = [({"input": x}, x[:3]) for x in torch.randn(8, 4)]
        held_out = partial(Loader, rows, micro_batch_size=4, shuffle=False, epochs=1)
        keep = partial(Checkpointer, str(tmp_path), save_interval=None)
        points(
            augment,
            *more,
            loss=loss,
            max_steps=steps,
            validator=partial(Validator, held_out, eval_interval=10),
            checkpointer=keep,
        )
        return int(loss.norm.num_batches_tracked), int(augment.seen), augment.modes

    tracked, seen, modes = trained(2)
    # The first batch of the validation data is tried before the training, in evaluation mode.
    assert (tracked, seen) == (2, 2) and modes[:3] == [False, True, True]
    assert trained(3)[:2] == (3, 3), "they go on where they were"


def test_parameters_that_nothing_would_train_are_refused(runtime):
    class Head(PostProcessor, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            self.head = nn.Linear(3, 3)

        def process(self, output, ctx):
            return self.head(output), ctx

    with pytest.raises(ValueError, match=r"head: nothing would train its parameters"):
        points(Head())
    points(Head().requires_grad_(False))


class Gives(PreProcessor):
    def __init__(self, ctx):
        super().__init__()
        self.ctx = ctx

    def process(self, batch, ctx):
        return batch, self.ctx or ctx


@pytest.mark.parametrize(
    "slots, message",
    [
        ({"preprocessors": Gives(None)}, r"preprocessors: it must be a list of processors; got gi"),
        (
            {"preprocessors": [Gives]},
            r"preprocessors.0: <class .* is not a processor; give",
        ),
        (
            {"postprocessors": [len]},
            r"postprocessors.0: <built-in function len> is not a proc",
        ),
        ({"preprocessors": [Gives({"a": 1})]}, r"left forward_kwargs=None in the context"),
        (
            {"preprocessors": [Gives({"forward_kwargs": {"input": 1}})]},
            r"without \"input\", which is the batch",
        ),
        ({"callbacks": [EMA()]}, r"callbacks: give them names, as in \{'ema': EMA\(\)\}; got \["),
        ({"callbacks": {"ema": EMA}}, r"callbacks.ema: EMA is a class; call it"),
        ({"loss_fn": "mse"}, r"loss_fn: 'mse' is not an object with num_valid\(batch\)"),
        ({"loss_fn": MSELoss}, r"loss_fn: <class .* is not an object with num_valid\(batch\)"),
    ],
)
def test_what_does_not_fit_a_slot_is_named(runtime, slots, message):
    with pytest.raises(TypeError, match=message):
        points(**slots)


@pytest.mark.parametrize("returned", [torch.zeros(()), LossOutput(torch.zeros(3))])
def test_what_a_loss_must_compute_is_said(runtime, returned):
    class Odd(LossCalculator):
        def compute(self, model_output, ctx):
            return returned

    with pytest.raises(TypeError, match=r"odd.compute returned .*it must return LossOutput"):
        points(loss=Odd())


@pytest.mark.parametrize("flat", [True, False])
def test_rows_that_only_fill_up_the_last_batch_are_masked(flat):
    images = torch.randn(3, 1, 2, 2)
    keep = KeepInput(flat=flat, mask="kept")
    for target in (torch.tensor([5, -100, 0]), torch.tensor([[5, -100], [-100, -100], [-100, 1]])):
        _, ctx = keep.process(images, Context(target=target))
        assert ctx["image"].shape == ((3, 4) if flat else images.shape)
        assert ctx["kept"].dim() == ctx["image"].dim()
        assert ctx["kept"].flatten().tolist() == [True, False, True]
