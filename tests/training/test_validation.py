"""The validation loss is exact, and validating leaves no trace in the training."""

import math
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ditty_di.data import Loader
from ditty_di.losses import CrossEntropyLoss
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.runtime import Runtime
from ditty_di.training.forward import ForwardPass
from ditty_di.training.validation import Validator
from tests import warm

VOCAB = 11


@pytest.fixture
def runtime():
    runtime = Runtime()
    yield runtime
    runtime.close()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 8), nn.Dropout(0.5), nn.Linear(8, VOCAB))


def batches(valid=(9, 1, 4)):
    """Batches [3, 3] with so many labels that count."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in valid:
        ids = torch.randint(VOCAB, (3, 3), generator=generator)
        labels = torch.randint(VOCAB, (3, 3), generator=generator)
        labels.view(-1)[number:] = -100
        made.append(({"input": ids}, labels))
    return made


def validator(runtime, model, data, loss_fn=None, **options):
    loss_fn = loss_fn or CrossEntropyLoss()
    return Validator(
        data,
        **{"eval_interval": 10} | options,
        model_parts=[model],
        evaluate=ForwardPass(parts=ModelParts([model]), loss_fn=loss_fn, runtime=runtime).evaluate,
        loss_fn=loss_fn,
        runtime=runtime,
    )


def _ids(batch):
    return batch[0]["input"]


def _labels(batch):
    return batch[1]


def exact(model, data):
    model.eval()
    with torch.no_grad():
        total = sum(
            F.cross_entropy(model(i["input"]).flatten(0, 1), y.flatten(), reduction="sum").double()
            for i, y in data
        )
    model.train()
    return float(total) / sum(int((y != -100).sum()) for _, y in data)


def test_loss_is_the_global_mean_not_the_mean_of_batch_means(runtime, model):
    data = batches()
    made = validator(runtime, model, data, perplexity=True, baselines={"unigram_entropy": 2.5})
    values = made.validate(10)
    assert values.pop("loss") == pytest.approx(exact(model, data), abs=1e-6)
    assert values.pop("perplexity") == pytest.approx(math.exp(exact(model, data)), rel=1e-6)
    assert values == {"unigram_entropy": 2.5}
    assert validator(runtime, model, data, max_batches=2).validate(10)["loss"] == pytest.approx(
        exact(model, data[:2]), abs=1e-6
    )


def test_is_due_every_nth_step(runtime, model):
    made = validator(runtime, model, batches(), eval_interval=10)
    assert [step for step in range(1, 31) if made.should_validate(step)] == [10, 20, 30]
    with pytest.raises(ValueError, match="validator: max_batches must be at least 1; got 0"):
        validator(runtime, model, batches(), max_batches=0)


def test_before_the_first_step_when_asked_and_reported_beside_the_last(runtime, model):
    assert not validator(runtime, model, batches()).should_validate(0)
    made = validator(runtime, model, batches(), validate_before_training=True)
    assert made.should_validate(0)
    before = made.validate(0)["loss"]
    assert made.report() == ""
    made.validate(10)
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    after = made.validate(20)["loss"]
    assert made.report() == f"held-out loss {before:.4f} at step 0, {after:.4f} at step 20"


def test_parts_of_a_composite_are_divided_by_their_own_counts(runtime, model):
    class Composite:
        def num_valid(self, batch):
            labels = batch.labels
            return torch.stack([(labels != -100).sum(), torch.tensor(labels.numel())])

        def __call__(self, output, batch, num_valid_global):
            labels = batch.labels
            first = F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum")
            second = output.square().mean(-1).sum()
            parts = {"ce": first / num_valid_global[0], "z": second / num_valid_global[1]}
            return parts["ce"] + 0.1 * parts["z"], parts

    data = batches()
    made = validator(runtime, model, data, Composite())
    values = made.validate(10)
    assert values["ce"] == pytest.approx(exact(model, data), abs=1e-6)
    assert values["loss"] == pytest.approx(values["ce"] + 0.1 * values["z"], abs=1e-6)


def test_leaves_training_flags_gradients_and_random_numbers_alone(runtime, model):
    rows = TensorDataset(*(torch.stack([pick(b) for b in batches()]) for pick in (_ids, _labels)))
    # A torch loader draws a seed from the global generator whenever it is iterated.
    loader = DataLoader(rows, collate_fn=lambda b: ({"input": b[0][0]}, b[0][1]))

    def draw(batch):
        random.random(), np.random.rand(), torch.rand(1)
        return batch

    model[2].eval()
    made = validator(runtime, model, loader, prepare=draw)

    def draws():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        return lambda: (random.random(), np.random.rand(), torch.rand(2).tolist())

    plain = draws()()
    after = draws()
    made.validate(10)
    assert after() == plain
    assert [m.training for m in model] == [True, True, False] and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_factory_is_completed_with_this_ranks_place(runtime, model):
    seen = []

    def factory(*, dp_rank, dp_world_size):
        seen.append((dp_rank, dp_world_size))
        return batches()

    made = validator(runtime, model, factory)
    plain = validator(runtime, model, batches())
    assert made.validate(10) == made.validate(20) == plain.validate(10)
    assert set(seen) == {(0, 1)}


class Positioned:
    """A loader that remembers where it is, as a resumable one does."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def __iter__(self):
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_with_a_position_starts_over_each_time(runtime, model):
    made = validator(runtime, model, Positioned(batches()))
    assert made.validate(10)["loss"] == made.validate(20)["loss"]
    assert made.validate(30)["loss"] == pytest.approx(exact(model, batches()), abs=1e-6)


def test_what_cannot_be_averaged_is_refused(runtime, model):
    with pytest.raises(ValueError, match="yields no batch"):
        validator(runtime, model, []).validate(10)
    with pytest.raises(ValueError, match="the validation data has no valid label"):
        validator(runtime, model, batches([0, 0])).validate(10)
    shrinking = batches([9, 4])
    made = validator(runtime, model, shrinking)
    made.validate(10)
    shrinking[0] = batches([3])[0]
    with pytest.raises(ValueError, match=r"other data than the first time \(13.0 labels, then"):
        made.validate(20)


def test_a_loader_without_an_end_is_refused_before_training(runtime, model):
    rows = [({"input": torch.zeros(2, dtype=torch.int64)}, torch.zeros(2, dtype=torch.int64))] * 4
    with pytest.raises(ValueError, match="epochs=1, or the validator max_batches"):
        validator(runtime, model, partial(Loader, rows, 2)).try_first_batch()
    validator(runtime, model, partial(Loader, rows, 2), max_batches=2).try_first_batch()
    validator(runtime, model, partial(Loader, rows, 2, epochs=1)).try_first_batch()


def test_a_signal_ends_validation_early(runtime, model):
    seen = []
    runtime.catch_signals()

    def count(module, inputs):
        seen.append(1)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)

    model.register_forward_pre_hook(count)
    made = validator(runtime, model, batches([9] * 6))
    assert made.validate(10) == {}
    assert len(seen) == 2 and model.training
    # And while the first pass counts.
    assert validator(runtime, model, batches()).validate(10) == {}


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_many_ranks_with_uneven_batches_agree_with_one(layout, tmp_path):
    said = warm.ranks([Path(__file__).parent / "ranks_validation.py", layout])
    assert ["exact" in text for text in said] == [True, True]
