"""One optimizer step is the loop that anyone would write by hand."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
import torchtitan.trainer
from torch import nn

from ditty_di import Trainer
from ditty_di.batch import Batch
from ditty_di.data import Loader
from ditty_di.losses import CrossEntropyLoss
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.training.step import TrainStep

STEPS, ACCUMULATION = 5, 2


def rows(count=80):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 2, generator=generator), torch.arange(count) % 4
    y[::3] = -100  # micro-batches have different numbers of valid labels
    return list(zip(x, y, strict=True))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, 4))


def test_a_step_is_the_hand_written_loop_bit_for_bit(runtime):
    # By hand.
    expected, net = [], model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    data = iter(Loader(rows(), 8, shuffle=False))
    for _ in range(STEPS):
        micro_batches = [next(data) for _ in range(ACCUMULATION)]
        num_valid = sum((labels != -100).sum() for _, labels in micro_batches)
        optimizer.zero_grad()
        total = torch.zeros(())
        for inputs, labels in micro_batches:
            logits = net(inputs["input"])  # [batch, classes]
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_valid
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=True)
        optimizer.step()
        expected.append({"loss": total.item(), "grad_norm": norm.item()})

    # By TrainStep.
    found, trained = [], model()
    loss_fn, data = CrossEntropyLoss(), iter(Loader(rows(), 8, shuffle=False))
    step = TrainStep(
        parts=ModelParts([trained]),
        loss_fn=loss_fn,
        optimizer=torch.optim.AdamW(trained.parameters(), lr=1e-2),
        runtime=runtime,
        max_grad_norm=0.5,
    )
    for _ in range(STEPS):
        batches = [Batch.of(next(data)) for _ in range(ACCUMULATION)]
        found.append(step(batches, sum(loss_fn.num_valid(batch) for batch in batches)))
    assert found == expected
    for mine, theirs in zip(trained.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_alone_raises_for_a_loss_that_is_not_finite(runtime):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = TrainStep(
        parts=ModelParts([net]), loss_fn=CrossEntropyLoss(), optimizer=optimizer, runtime=runtime
    )
    batch = Batch({"input": torch.full((2, 2), torch.nan)}, torch.tensor([0, 1]))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(FloatingPointError, match=r"2\.0 valid elements"):
        step([batch], torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


# -- what torchtitan's Trainer offers ----------------------------------------------------------


def trainer(runtime):
    return Trainer(
        model=model(),
        loss_fn=CrossEntropyLoss(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        dataloader=partial(Loader, rows(), micro_batch_size=8, shuffle=False),
        max_steps=2,
        runtime=runtime,
    )


def a_batch():
    return {"input": torch.ones(3, 2)}, torch.tensor([0, 1, -100])


USES = {
    "Config": lambda made: made.Config,
    "batch_generator": lambda made: next(made.batch_generator([a_batch()])),
    "close": lambda made: made.close(),
    "forward_backward_step": lambda made: made.forward_backward_step(
        input_dict=a_batch()[0], labels=a_batch()[1], global_valid_tokens=torch.tensor(2.0)
    ),
    "load_state_dict": lambda made: made.load_state_dict(made.state_dict()),
    "post_dataloading_process": lambda made: made.post_dataloading_process(*a_batch()),
    "should_continue_training": lambda made: made.should_continue_training(),
    "state_dict": lambda made: made.state_dict(),
    "train": lambda made: made.train(),
    "train_step": lambda made: made.train_step(iter([Batch(*a_batch())])),
}
REFUSED = {
    "init_distributed": "pass runtime=",
    "pp_forward_backward_step": "call forward_backward_step",
}


@pytest.mark.parametrize(
    "name", [name for name in dir(torchtitan.trainer.Trainer) if not name.startswith("_")]
)
def test_every_public_method_of_torchtitan_works_or_names_what_to_call(runtime, name):
    made = trainer(runtime)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            getattr(made, name)()
    else:
        USES[name](made)
        made.close()


def test_gradients_of_torchtitans_step_are_those_of_micro_batches(runtime):
    made, (inputs, labels) = trainer(runtime), a_batch()
    loss = made.forward_backward_step(
        input_dict=[inputs], labels=[labels], global_valid_tokens=torch.tensor(2.0)
    )
    net = model()
    expected = F.cross_entropy(net(inputs["input"]), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for mine, theirs in zip(made.model_parts[0].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_micro_batches_move_to_the_device_one_by_one(runtime):
    """Pixels of all micro-batches of a step at a time would fill the device."""
    events = []

    class Moved(Batch):
        def to(self, device):
            events.append("to")
            return super().to(device)

    net = model()
    net.register_forward_hook(lambda *_: events.append("forward"))
    loss_fn = CrossEntropyLoss()
    step = TrainStep(
        parts=ModelParts([net]),
        loss_fn=loss_fn,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        runtime=runtime,
    )
    batches = [Moved(*pair) for pair in islice(Loader(rows(), 8), 3)]
    step(batches, sum(loss_fn.num_valid(batch) for batch in batches))
    assert events == ["to", "forward"] * 3
