"""Losses and counts of each source: by token, over ranks, micro-batches and resumes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditty_di import Trainer
from ditty_di.batch import Batch, Context
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import (
    Loader,
    Mixture,
    PackedCollate,
    PackedDataset,
    PaddedCollate,
    PaddingFreeCollate,
    Shards,
    TokenBudgetDataset,
)
from ditty_di.data.shards import IndexWriter
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import ClassificationLoss, CrossEntropyLoss, LinearCrossEntropyLoss
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.processors import PreProcessor
from ditty_di.runtime import Runtime
from ditty_di.training.forward import ForwardPass
from ditty_di.training.sources import BY_SOURCE, LossBySource
from ditty_di.training.validation import Validator
from tests.checkpoint import ranks
from tests.data.ragged import make_model
from tests.distributed.cases import Recorder
from tests.distributed.pipelined import Staged, split

#: Each source has labels of its own ten, so that its loss can be told without its name.
NAMES, TENS = ["web", "code", "math"], 10
RATIOS = {"web": 0.5, "code": 0.375, "math": 0.125}


class Documents:
    """Documents of different lengths in one source's tokens; the first third are no labels."""

    def __init__(self, source, lengths):
        self.lengths = np.array(lengths)
        draw = np.random.default_rng(source)
        self.ids = [
            torch.from_numpy(draw.integers(TENS * source, TENS * (source + 1), n + 1))
            for n in lengths
        ]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index][1:].clone()
        labels[: len(labels) // 3] = -100
        return {"input": self.ids[index][:-1]}, labels


SOURCES = {
    name: Documents(number, np.random.default_rng(9).integers(1, 12, rows))
    for number, (name, rows) in enumerate(zip(NAMES, (31, 17, 5), strict=True))
}


class Model(nn.Module):
    """A model whose logits depend on one token alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TENS * len(NAMES), 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, TENS * len(NAMES))

    def forward(self, ids, **others):
        return self.head(self.layers[0](self.embedding(ids)).tanh())


def made(loader, recorder, *, runtime=None, lr=0.0, log_interval=1, steps=6, **slots):
    """A trainer, of two micro-batches of a rank in each step unless told."""
    return Trainer(
        **{"model": Model(), "loss_fn": CrossEntropyLoss(), "parallelize_fn": shard} | slots,
        optimizer=partial(torch.optim.SGD, lr=lr),
        dataloader=loader,
        logger=MetricsProcessor([recorder], log_interval=log_interval),
        runtime=runtime or Runtime(seed=0),
        max_steps=steps,
    )


@torch.no_grad()
def by_hand(batches):
    """Mean loss and number of labels of each source in micro-batches, by the labels' tens."""
    sums, counts = torch.zeros(len(NAMES)), torch.zeros(len(NAMES))
    for inputs, labels in batches:
        logits = Model()(inputs["input"])
        for source in range(len(NAMES)):
            of_source = labels.masked_fill(labels // TENS != source, -100)
            sums[source] += F.cross_entropy(
                logits.flatten(0, 1), of_source.flatten(), reduction="sum"
            )
            counts[source] += (of_source != -100).sum()
    return sums / counts, counts


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents of `web` in a file of shards."""
    prefix = tmp_path_factory.mktemp("shards") / "web"
    with IndexWriter.open(prefix, np.dtype(np.uint16)) as writer:
        for ids in SOURCES["web"].ids:
            writer.add(ids.tolist())
    return f"{prefix}.bin"


def padded(shards):
    return Mixture(SOURCES, RATIOS), PaddedCollate(), 4


def padding_free(shards):
    return Mixture(SOURCES, RATIOS), PaddingFreeCollate(varlen=False), 4


def packed_together(shards):
    return PackedDataset(Mixture(SOURCES), 16), PackedCollate(varlen=False), 2


def examples_and_shards(shards):
    packs = {name: PackedDataset(SOURCES[name], 16) for name in ("code", "math")}
    return (
        Mixture({"web": Shards(shards, 16), **packs}, RATIOS),
        PackedCollate(varlen=False),
        2,
    )


def budgets(shards):
    return TokenBudgetDataset(Mixture(SOURCES), 40), PaddedCollate(), 1


def mixed_budgets(shards):
    each = {name: TokenBudgetDataset(source, 40) for name, source in SOURCES.items()}
    return Mixture(each, RATIOS), PaddedCollate(), 1


@pytest.mark.parametrize(
    "form",
    [padded, padding_free, packed_together, examples_and_shards, budgets, mixed_budgets],
)
def test_every_label_counts_for_its_source(form, shards, runtime):
    dataset, collate, rows = form(shards)
    loader = partial(Loader, dataset, rows, seed=2, collate_fn=collate)
    recorder = Recorder()
    trainer = made(
        loader, recorder, runtime=runtime, log_interval=3, global_batch_size=2 * rows,
        parallelize_fn=None,
    )  # fmt: skip
    trainer.train()
    batches = list(islice(loader(), 12))
    logged = [row for row in recorder.rows if "loss" in row]
    assert [row["step"] for row in logged] == [1, 3, 6]
    for row, (first, last) in zip(logged, [(0, 2), (2, 6), (6, 12)], strict=True):
        means, _ = by_hand(batches[first:last])
        _, counts = by_hand(batches[:last])
        for number, name in enumerate(NAMES):
            assert row[f"tokens/{name}"] == counts[number]
            if means[number].isnan():
                assert f"loss/{name}" not in row
            else:
                assert row[f"loss/{name}"] == pytest.approx(float(means[number]), abs=1e-6)
    assert logged[-1]["tokens/math"] > 0
    assert BY_SOURCE not in logged[-1] and trainer.dataloader.source_names == NAMES


def test_counts_of_rows_in_any_order(runtime):
    # Without ratios the rows of a source are counted as they come.
    recorder = Recorder()
    loader = partial(Loader, Mixture(SOURCES), 8, seed=2, collate_fn=PaddedCollate())
    made(loader, recorder, runtime=runtime, steps=9, parallelize_fn=None).train()
    seen = np.zeros(len(NAMES))
    for row, (inputs, _) in zip(recorder.rows, loader(), strict=False):
        seen += np.bincount(inputs["source"], minlength=len(NAMES))
        for number, name in enumerate(NAMES):
            assert row[f"rows/{name}"] == seen[number]
            assert row[f"epochs/{name}"] == seen[number] / len(SOURCES[name])
    assert row["step"] == 9 and row["epochs/web"] > 1, "beyond the first epoch of 53 rows"


def training(folder, steps, world, *, log_interval=1, **slots):
    """What a training on `world` ranks logs, with gradients of 16 rows a step."""
    runtime = Runtime(seed=0)
    recorder = Recorder()
    loader = partial(Loader, Mixture(SOURCES, RATIOS), 4, seed=2, collate_fn=PaddedCollate())
    held_out = partial(
        Loader, Mixture(SOURCES), 4, shuffle=False, epochs=1, collate_fn=PaddedCollate()
    )
    checkpointer = partial(Checkpointer, folder, save_interval=3)
    trainer = made(
        loader, recorder, runtime=runtime, lr=0.5, steps=steps, global_batch_size=16,
        log_interval=log_interval, checkpointer=checkpointer if folder else None,
        validator=partial(Validator, held_out, eval_interval=3), **slots,
    )  # fmt: skip
    assert trainer.gradient_accumulation_steps == 4 // world
    trainer.train()
    trainer.close()
    runtime.close()
    return recorder.rows


def same(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        named = [key for key in other if key.split("/")[-1] in NAMES]
        assert named and named == [key for key in one if key.split("/")[-1] in NAMES]
        for key in [*named, *(key for key in ("loss", "validation/loss") if key in other)]:
            assert one[key] == pytest.approx(other[key], abs=2e-6), key


@pytest.fixture(scope="module")
def alone():
    """What one rank logs in six steps."""
    (rows,) = ranks.run(training, 1, None, 6, 1)
    return rows


def test_two_ranks_log_what_one_does(alone):
    first, second = ranks.run(training, 2, None, 6, 2)
    same(first, alone)
    assert not second, "rank 0 alone logs"
    last = next(row for row in reversed(alone) if "loss" in row)
    assert [last[f"rows/{name}"] for name in NAMES] == [48, 36, 12]
    assert last["epochs/math"] == 12 / 5


def test_a_resume_on_other_ranks_goes_on_counting(alone, tmp_path):
    ranks.run(training, 2, str(tmp_path), 3, 2)
    (rows,) = ranks.run(training, 1, str(tmp_path), 6, 1)
    same(rows, [row for row in alone if row["step"] > 3])


def test_a_source_that_came_rarely_has_the_mean_since_the_last_report(alone):
    (rows,) = ranks.run(partial(training, log_interval=4), 1, None, 6, 1)
    last = [row for row in rows if "loss" in row][-1]
    each = [row for row in alone if "loss" in row]
    tokens = np.diff([row["tokens/math"] for row in each[3:]])
    total = sum(n * row["loss/math"] for n, row in zip(tokens, each[4:], strict=True))
    assert last["loss/math"] == pytest.approx(total / tokens.sum(), abs=1e-6)


class DropThird(PreProcessor):
    """Rejects every third micro-batch."""

    seen = 0

    def process(self, batch, ctx):
        self.seen += 1
        return None if self.seen % 3 == 0 else (batch, ctx)


def test_rejected_micro_batches_do_not_count(runtime):
    recorder = Recorder()
    loader = partial(Loader, Mixture(SOURCES, RATIOS), 4, seed=2, collate_fn=PaddedCollate())
    made(
        loader, recorder, runtime=runtime, preprocessors=[DropThird()], parallelize_fn=None,
        global_batch_size=8, log_interval=6,
    ).train()  # fmt: skip
    _, counts = by_hand([b for n, b in enumerate(islice(loader(), 12), 1) if n % 3])
    assert [recorder.rows[-1][f"tokens/{name}"] for name in NAMES] == counts.tolist()


def pipelined():
    """What a training on one rank, or on a pipeline of two, logs."""
    world = torch.distributed.get_world_size()
    runtime = Runtime(seed=0, dp_shard=1, pp=world)
    sources = {
        name: [({"input": ids[:8]}, ids[1:9]) for ids in SOURCES[name].ids if len(ids) > 8]
        for name in ("web", "code")
    }
    torch.manual_seed(0)
    recorder = Recorder()
    made(
        partial(Loader, Mixture(sources, {"web": 3, "code": 1}), 4, seed=2), recorder,
        runtime=runtime, model=Staged(), lr=0.5, steps=3, global_batch_size=16,
        parallelize_fn=None, pipeline_fn=partial(split, n_microbatches=4) if world > 1 else None,
    ).train()  # fmt: skip
    runtime.close()
    return recorder.rows


def test_pipeline_stages_log_what_one_rank_does():
    (alone,), staged = ranks.run(pipelined, 1), ranks.run(pipelined, 2)
    same(staged[0], alone)
    assert {"loss/web", "loss/code"} <= alone[-1].keys()


# ---------------------------------------------------------------------------------- validation


def validator(runtime, loader, **options):
    model, loss_fn = Model(), options.pop("loss_fn", CrossEntropyLoss())
    return Validator(
        loader,
        eval_interval=1,
        model_parts=[model],
        evaluate=ForwardPass(parts=ModelParts([model]), loss_fn=loss_fn, runtime=runtime).evaluate,
        loss_fn=loss_fn,
        runtime=runtime,
        **options,
    )


HELD_OUT = partial(Loader, shuffle=False, epochs=1, collate_fn=PaddedCollate())


def test_a_validation_has_one_loss_of_each_source(runtime):
    loader = partial(HELD_OUT, Mixture(SOURCES), 4)
    found = validator(runtime, loader).validate(1)
    means, counts = by_hand(loader())
    for number, name in enumerate(NAMES):
        assert found.pop(f"loss/{name}") == pytest.approx(float(means[number]), abs=1e-6)
    assert found.keys() == {"loss"}
    whole = (means * counts).sum() / counts.sum()
    assert found["loss"] == pytest.approx(float(whole), abs=1e-6)


def test_sources_that_a_validation_does_not_reach_are_named(runtime, caplog):
    loader = partial(HELD_OUT, Mixture(SOURCES), 4)
    found = validator(runtime, loader, max_batches=8).validate(1)
    assert found.keys() == {"loss", "loss/web", "loss/code"}
    assert "no valid label of the sources math, which get no loss" in caplog.text
    # In ratios all of them come at once.
    mixed = partial(HELD_OUT, Mixture(SOURCES, RATIOS), 8)
    found = validator(runtime, mixed, max_batches=2).validate(1)
    assert found.keys() == {"loss", *(f"loss/{name}" for name in NAMES)}


# -------------------------------------------------------------------------------------- losses


@dataclass
class Output:
    logits: torch.Tensor


def micro_batch(shape=(3, 7), source=(0, 2, 1)):
    torch.manual_seed(1)
    logits = torch.randn(*shape, 11, requires_grad=True)
    labels = torch.randint(11, shape)
    labels[torch.rand(shape) < 0.3] = -100
    mask = (torch.rand(shape) < 0.8).long()
    context = Context(source=torch.tensor(source), mask=mask)
    return logits, Batch({"input": labels}, labels, context)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_elements_are_the_loss(shift, masked):
    loss_fn = CrossEntropyLoss(output="logits", shift=shift)
    loss_fn.mask_key = "mask" if masked else None
    logits, batch = micro_batch()
    number = loss_fn.num_valid(batch)
    assert number == loss_fn.valid(batch).sum()
    by_source = LossBySource(loss_fn, NAMES)
    loss, metrics = by_source(Output(logits), batch, number.double())
    (gradient,) = torch.autograd.grad(loss, logits)
    plain, _ = loss_fn(Output(logits), batch, number.double())
    (expected,) = torch.autograd.grad(plain, logits)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    assert torch.equal(gradient, expected), "training does not change by a bit"
    for row, source in enumerate(batch.context["source"].tolist()):
        one = Batch({}, batch.labels[row : row + 1])
        one.context["mask"] = batch.context["mask"][row : row + 1]
        alone, _ = loss_fn(Output(logits[row : row + 1]), one, torch.tensor(1.0))
        assert metrics[BY_SOURCE][source].item() == pytest.approx(alone.item(), abs=1e-5)
        assert by_source.count([batch])[source] == loss_fn.num_valid(one)


class NoWait(TorchDispatchMode):
    """Refuses operations for whose result the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten._unique2,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", [(0, 2, 1), [[0, 2, 1, 1, 0, 0, 2]] * 3])
def test_the_host_does_not_wait_for_the_sums(source):
    logits, batch = micro_batch(source=source)
    loss_fn = LossBySource(CrossEntropyLoss(), NAMES)
    with NoWait():
        _, metrics = loss_fn(logits, batch, torch.tensor(2.0))
    assert metrics[BY_SOURCE].shape == (3,)
    with pytest.raises(AssertionError), NoWait():
        metrics[BY_SOURCE].sum().item()


@pytest.mark.parametrize("chunk", [4, 100])
def test_elements_of_a_loss_on_hidden_states(chunk):
    loss_fn = LinearCrossEntropyLoss(chunk_tokens=chunk)
    model = loss_fn.prepare_model(make_model("llama", "eager"))
    _, batch = micro_batch()
    ids = batch.labels.clamp(min=0)
    for labels in (batch.labels, torch.full_like(batch.labels, -100)):
        one = Batch({}, labels, batch.context)
        number = loss_fn.num_valid(one).double().clamp(min=1)
        found = []
        for loss_of in (loss_fn, LossBySource(loss_fn, NAMES)):
            model.zero_grad()
            loss, metrics = loss_of(model(ids), one, number)
            loss.backward()
            found.append((loss.item(), [p.grad for p in model.parameters()]))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(a, b)
        assert metrics[BY_SOURCE].sum().item() == pytest.approx(loss.item() * number.item())


class Smoothed(CrossEntropyLoss):
    """Another loss, whose elements are not those of its base class."""

    def forward(self, output, batch, num_valid_global, /):
        loss, _ = super().forward(output, batch, num_valid_global)
        return 2 * loss, {"twice": loss}


@pytest.mark.parametrize(
    ("loss_fn", "counted"),
    [
        (Smoothed(), "their rows and tokens are counted, but no losses: Smoothed does not"),
        (ClassificationLoss(), "their rows and tokens are counted, but no losses: Classification"),
        (nn.CrossEntropyLoss(), "their rows are counted, but no losses: PlainLoss does not"),
    ],
)
def test_other_losses_are_trained_as_they_are_and_counted(loss_fn, counted, runtime, caplog):
    rows = [({"input": source.ids[0][:1]}, source.ids[0][0]) for source in SOURCES.values()]
    data = Mixture(dict(zip(NAMES, ([row] for row in rows), strict=True)))
    first = nn.Sequential(Model(), nn.Flatten(1))
    recorder = Recorder()
    with caplog.at_level(logging.INFO):
        made(
            partial(Loader, data, 3), recorder, runtime=runtime, model=first, loss_fn=loss_fn,
            steps=1, parallelize_fn=None,
        ).train()  # fmt: skip
    assert f"metrics of the sources web, code, math: {counted}" in caplog.text
    row = recorder.rows[0]
    assert [row[f"rows/{name}"] for name in NAMES] == [1, 1, 1]
    assert not any(key.startswith("loss/") for key in row)
    assert any(key.startswith("tokens/") for key in row) == ("tokens" in counted)
    logits = torch.cat([first(inputs["input"][None]) for inputs, _ in rows])
    plain = F.cross_entropy(logits, torch.stack([label for _, label in rows]))
    assert row["loss"] == pytest.approx(plain.item() * (1 + ("twice" in row)), rel=1e-6)


def test_a_source_of_another_shape_is_refused():
    _, batch = micro_batch(source=(0, 2))
    with pytest.raises(ValueError, match=r"`source` has shape \[2\] and its labels have \[3, 7\]"):
        LossBySource(CrossEntropyLoss(), NAMES).count([batch])


class OwnCollate:
    """Leaves `source` out."""

    def __call__(self, rows):
        inputs, labels = PaddedCollate()(rows)
        return {"input": inputs["input"]}, labels


def test_a_collate_function_that_drops_the_source_is_told(runtime, caplog):
    recorder = Recorder()
    loader = partial(Loader, Mixture(SOURCES), 4, collate_fn=OwnCollate())
    made(loader, recorder, runtime=runtime, steps=2, parallelize_fn=None).train()
    assert caplog.text.count("no micro-batch says its `source`") == 1
    assert "loss/web" not in recorder.rows[-1] and recorder.rows[-1]["rows/web"] > 0
