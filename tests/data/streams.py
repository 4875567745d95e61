"""Iterable datasets of numbers, and loaders of all ranks over them."""

import json

import torch

from ditty_di.data import StreamLoader


class Numbers:
    """An iterable of one's own: rows of one number, and a state."""

    def __init__(self, size, base=0):
        self.size, self.base, self.at = size, base, 0

    def __iter__(self):
        start, self.at = self.at, 0
        for at in range(start, self.size):
            self.at = at + 1
            yield torch.tensor([self.base + at]), torch.tensor([self.base + at])
        self.at = self.size

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class NumbersInFiles(Numbers):
    """The same in files, which streams share among them: file f has f, f + 6, ..."""

    def __init__(self, size, files=range(6)):
        self.files = list(files)
        self.num_shards = len(self.files)
        self.numbers = [n for n in range(size) if n % 6 in self.files]
        super().__init__(len(self.numbers))
        self.all = size

    def shard(self, num_shards, index, contiguous):
        assert not contiguous
        return NumbersInFiles(self.all, self.files[index::num_shards])

    def __iter__(self):
        for row in super().__iter__():
            value = torch.tensor([self.numbers[int(row[0])]])
            yield value, value


def take(loaders, steps):
    """The next rows of all ranks, in their global order."""
    iterators = [iter(loader) for loader in loaders]
    found = []
    for _ in range(steps):
        first = loaders[0].state_dict()["consumed"] % len(loaders)  # the rank that has the next row
        parts = [next(iterator)[0]["input"].flatten().tolist() for iterator in iterators]
        found += [row for rows in zip(*parts[first:], *parts[:first], strict=True) for row in rows]
    return found


def saved(loaders):
    """What a checkpoint has: the states of all ranks, whose common keys are equal."""
    whole = {}
    for loader in loaders:
        state = json.loads(json.dumps(loader.state_dict()))
        assert all(whole.get(key, value) == value for key, value in state.items())
        whole |= state
    return whole


def ranks(dataset, world, batch, state=None, **options):
    made = [
        StreamLoader(dataset, batch, dp_rank=rank, dp_world_size=world, seed=5, **options)
        for rank in range(world)
    ]
    for loader in made:
        if state is not None:
            loader.load_state_dict(state)
    return made
