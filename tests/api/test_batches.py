"""What counts as a dataset, and what a batch may look like."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler, default_collate

from ditty_di.api import ModelFactory, Pipeline
from ditty_di.api.batches import Pairs, dataloader
from ditty_di.data import Loader
from ditty_di.processors import ContractError

ROWS = [(torch.full((3,), float(i)), torch.tensor(i)) for i in range(10)]


def made(dataset, **options):
    given = {"batch_size": 2, "collate_fn": None, "seed": 0, "shuffle": True, "num_workers": 0}
    return dataloader(dataset, **{**given, **options})


def placed(dataset, **options):
    return made(dataset, **options)(dp_rank=0, dp_world_size=1)


def forms(x, y):
    return {
        "pair": (x, y),
        "list": [x, y],
        "inputs": ({"input": x, "t": y}, y),
        "mapping": {"input": x, "labels": y, "t": y},
    }


@pytest.mark.parametrize("form", forms(0, 0))
def test_a_batch_may_have_several_forms(form):
    x, y = torch.ones(4, 3), torch.arange(4)
    inputs, labels = Pairs(lambda rows: forms(x, y)[form])([])
    assert inputs["input"] is x and labels is y
    assert set(inputs) == ({"input", "t"} if form in ("inputs", "mapping") else {"input"})


@pytest.mark.parametrize("batch", [torch.ones(4, 3), {"input": torch.ones(4, 3)}])
def test_a_batch_without_labels_has_nothing_that_a_loss_could_take(batch):
    inputs, labels = Pairs(lambda rows: batch)([])
    assert inputs["input"].shape == (4, 3)
    assert labels.shape == (4, 0) and labels.dtype == torch.int64


@pytest.mark.parametrize(
    "batch, said",
    [
        ({"inputs": torch.ones(2)}, "a mapping with inputs and no tensor 'input'"),
        ((torch.ones(2),) * 3, "tuple"),
        ("text", "it returned str"),
        (([1, 2], torch.ones(2)), "it returned list"),
    ],
)
def test_any_other_batch_is_an_error(batch, said):
    with pytest.raises(TypeError, match=said):
        Pairs(lambda rows: batch)([])


def test_workers_can_take_a_collation():
    pickle.loads(pickle.dumps(Pairs(default_collate)))
    inputs, labels = next(iter(placed(ROWS, num_workers=1)))
    assert inputs["input"].shape == (2, 3) and labels.shape == (2,)


def test_rows_are_shuffled_anew_each_epoch_or_never():
    def epochs(loader):
        batches = iter(loader)
        return [[int(n) for _ in range(5) for n in next(batches)[1]] for _ in range(2)]

    first, second = epochs(placed(ROWS))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert epochs(placed(ROWS, shuffle=False)) == [list(range(10))] * 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_of_torch_says_what_to_load(shuffle):
    def own(rows):
        return default_collate([(x + 1, y) for x, y in rows])

    loader = placed(DataLoader(ROWS, batch_size=5, shuffle=shuffle, collate_fn=own), seed=7)
    assert isinstance(loader, Loader)
    assert (loader.batch_size, loader.shuffle, loader.seed) == (5, shuffle, 7)
    inputs, labels = next(iter(loader))
    assert torch.equal(inputs["input"][:, 0], labels + 1.0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    "dataset, said",
    [
        (DataLoader(Stream(), batch_size=2), "has sampler and an iterable dataset"),
        (DataLoader(ROWS, sampler=WeightedRandomSampler([1.0] * 10, 4)), "has sampler, which"),
        (DataLoader(ROWS, batch_sampler=[[0, 1]]), "has batch_sampler"),
        (DataLoader(ROWS, batch_size=None), "has batch_sampler"),
        (Stream(), "Stream is not a map-style dataset"),
        (iter(ROWS), "is not a map-style dataset"),
    ],
)
def test_what_no_rank_could_share_is_an_error(dataset, said):
    with pytest.raises(TypeError, match=said):
        made(dataset)


def test_what_is_a_loader_stays_itself():
    factory, loader = partial(Loader, ROWS, 2), Loader(ROWS, 2)
    assert made(factory) is factory and made(loader) is loader
    for own in (factory, loader, DataLoader(ROWS)):
        with pytest.raises(TypeError, match="collates by itself"):
            made(own, collate_fn=default_collate)


def test_labels_are_one_tensor():
    y = torch.ones(4)
    with pytest.raises(TypeError, match=r"its labels are a tuple, not a tensor; .*as"):
        Pairs(lambda rows: (torch.ones(4, 3), (y, y)))([])


class Collate:
    contract = "-> input:3:f | ctx.target:2:f"

    def __call__(self, rows):
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def test_the_contract_of_a_collation_counts():
    rows = [(torch.ones(4), torch.ones(3)) for _ in range(8)]
    factory = ModelFactory.from_instance(torch.nn.Linear(4, 3))
    with pytest.raises(ContractError, match=r"gives input: expected rank 3.* found rank 2"):
        Pipeline(
            factory,
            rows,
            collate_fn=Collate(),
            max_steps=1,
            max_grad_norm=None,
            trainer_kwargs={"contracts": "runtime"},
        ).run()
