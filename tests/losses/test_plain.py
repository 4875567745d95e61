"""Any callable as a loss: micro-batches and ranks give the value of one large batch."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di import Trainer
from ditty_di.data import Loader
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CompositeLoss, PlainLoss
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.validation import Validator
from tests.checkpoint import ranks
from tests.distributed.cases import Recorder


def absolute(output, labels):
    return (output - labels).abs().mean()


def with_metrics(output, labels):
    return (output - labels).pow(2).mean(), {"largest": (output - labels).abs().mean()}


def regression(rows=44):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return [(row, row[:1].sin()) for row in x]


def classes(rows=44):
    """Of which a third is ignored, unevenly over the micro-batches."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    labels = [-100 if i % 7 < 2 + i // 20 else i % 3 for i in range(rows)]
    return [(row, torch.tensor(label)) for row, label in zip(x, labels, strict=True)]


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
LOSSES = {
    "MSELoss": (nn.MSELoss, regression),
    "sum": (partial(nn.MSELoss, reduction="sum"), regression),
    "function": (lambda: absolute, regression),
    "partial": (lambda: partial(nn.functional.huber_loss, delta=0.5), regression),
    "metrics": (lambda: with_metrics, regression),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, classes),
    "weighted": (partial(nn.CrossEntropyLoss, weight=WEIGHTS), classes),
    "cross_entropy": (lambda: nn.functional.cross_entropy, classes),
    "cross_entropy weighted": (
        lambda: partial(nn.functional.cross_entropy, weight=WEIGHTS, ignore_index=-100),
        classes,
    ),
    "mse_loss sum": (lambda: partial(nn.functional.mse_loss, reduction="sum"), regression),
}


def model(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def by_hand(loss, rows, outputs, steps, batch):
    made = model(outputs)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        some = [rows[i % len(rows)] for i in range(step * batch, (step + 1) * batch)]
        value = loss(made(torch.stack([x for x, _ in some])), torch.stack([y for _, y in some]))
        value = value[0] if isinstance(value, tuple) else value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    return found


def trained(name, *, micro, runtime=None, validate=False, **options):
    make, rows = LOSSES[name]
    recorder = Recorder()
    data = rows()
    made = Trainer(
        model=model(3 if rows is classes else 1),
        loss_fn=make(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        dataloader=partial(Loader, data, micro, shuffle=False),
        max_steps=4,
        global_batch_size=20,
        max_grad_norm=float("inf"),
        logger=MetricsProcessor([recorder], log_interval=1),
        runtime=runtime,
        validator=partial(
            Validator, partial(Loader, data, 12, shuffle=False, epochs=1), eval_interval=4
        )
        if validate
        else None,
        **options,
    )
    result = made.train()
    return recorder.losses(), result["objective"], made.model_parts[0]


@pytest.mark.parametrize("micro", [20, 5, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_gives_the_loss_of_one_large_batch(name, micro, runtime):
    make, rows = LOSSES[name]
    expected = by_hand(make(), rows(), 3 if rows is classes else 1, 4, 20)
    found, _, _ = trained(name, micro=micro, runtime=runtime)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_an_uneven_last_validation_batch_counts_its_rows(name, runtime):
    """44 rows in batches of 12."""
    _, objective, module = trained(name, micro=20, runtime=runtime, validate=True)
    make, rows = LOSSES[name]
    x, y = (torch.stack(part) for part in zip(*rows(), strict=True))
    with torch.no_grad():
        value = make()(module(x), y)
    value = value[0] if isinstance(value, tuple) else value
    assert objective == pytest.approx(float(value), rel=1e-5)


def of_a_rank():
    runtime = Runtime(seed=0)
    found = [
        trained(name, micro=5, runtime=runtime, validate=True, parallelize_fn=parallelize)[:2]
        for name, parallelize in (("MSELoss", shard_all), ("weighted", shard_all))
    ]
    runtime.close()
    return found


class Blocks(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.blocks = nn.ModuleList([module])

    def forward(self, x):
        return self.blocks[0](x)


def shard_all(module, parallel_dims):
    return shard(Blocks(module), parallel_dims=parallel_dims)


def test_two_ranks_are_one(runtime):
    """44 validation rows in batches of 12 on two ranks: 12 + 12, then 10 + 10."""
    first, second = ranks.run(of_a_rank, 2)
    for name, one, two in zip(("MSELoss", "weighted"), first, second, strict=True):
        losses, objective, _ = trained(name, micro=20, runtime=runtime, validate=True)
        assert one[0] == pytest.approx(losses, rel=1e-5)
        assert one[1] == two[1] == pytest.approx(objective, rel=1e-5)


def test_it_is_said_what_is_counted(runtime, caplog):
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        trained("MSELoss", micro=20, runtime=runtime)
    assert (
        "loss mse_loss has no num_valid(batch): its value is taken as a mean over rows"
        in caplog.text
    )
    built = {"loss_fn": nn.CrossEntropyLoss()}
    (said,) = Trainer.rehearse(built.get)
    assert "a mean over labels other than ignore_index=-100" in said


def test_what_gives_no_number_is_refused(runtime):
    with pytest.raises(ValueError, match="reduction='none'"):
        PlainLoss(nn.MSELoss(reduction="none"))
    with pytest.raises(TypeError, match="is not an object with num_valid"):
        trained_with(nn.MSELoss, runtime)
    with pytest.raises(ValueError, match=r"tensor of shape \[20, 1\].*take its mean"):
        trained_with(lambda output, labels: (output - labels) ** 2, runtime)


def test_labels_that_would_be_broadcast_are_refused(runtime):
    flat = [(x, y[0]) for x, y in regression()]
    with pytest.raises(ValueError, match=r"prediction \[20, 1\] and labels \[20\] differ in shape"):
        trained_with(nn.MSELoss(), runtime, rows=flat)


def trained_with(loss, runtime, rows=None):
    return Trainer(
        model=model(1),
        loss_fn=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        dataloader=partial(Loader, rows or regression(), 20, shuffle=False),
        max_steps=1,
        runtime=runtime,
    ).train()


def test_a_part_of_a_composite(runtime):
    both = CompositeLoss([(nn.MSELoss(), 1.0), (absolute, 0.5)])
    assert [name for name, _ in both.parts] == ["mse_loss", "absolute"]
    trained_with(both, runtime)


def test_steps_may_not_be_left_empty(runtime):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=None: give the number"):
        Trainer(
            model=model(1), loss_fn=nn.MSELoss(), optimizer=torch.optim.SGD, dataloader=regression,
            max_steps=None, runtime=runtime,
        )  # fmt: skip
