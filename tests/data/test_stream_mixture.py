"""Streams and other datasets in exact ratios, resumed exactly."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from ditty_di.data import Streamed, StreamLoader, StreamMixture
from tests.data.streams import Numbers


def test_mixed_streams_have_their_ratios_and_resume_exactly():
    def mixture():
        return StreamMixture(
            {
                "a": Streamed(Numbers(30), streams=2, shuffle_rows=3),
                "b": Streamed(Numbers(50, base=100), streams=2, shuffle_rows=2),
                "c": [(torch.tensor([n]), torch.tensor([n])) for n in range(200, 209)],
            },
            {"a": 0.5, "b": 0.3, "c": 0.2},
        )

    def numbers(loader, steps):
        batches = iter(loader)
        found = []
        for _ in range(steps):
            inputs, _ = next(batches)
            pairs = zip(inputs["input"].flatten(), inputs["source"], strict=True)
            found += [(int(n), int(source)) for n, source in pairs]
        return found

    loader = StreamLoader(mixture(), 3)
    whole = numbers(loader, 40)
    assert all(source == min(n // 100, 2) for n, source in whole)
    taken = np.array([source for _, source in whole])
    for stop in range(1, len(whole) + 1):
        shares = np.bincount(taken[:stop], minlength=3) - stop * np.array([0.5, 0.3, 0.2])
        assert np.abs(shares).max() < 2  # one a stream
    metrics = loader.get_metrics()
    counted = np.bincount(taken)
    assert metrics == {
        **{f"rows/{name}": counted[n] for n, name in enumerate("abc")},
        "epochs/c": counted[2] / 9,
    }
    assert Counter(n for n, _ in whole if n >= 200)[200] in (2, 3)  # 24 rows of 9
    for workers in (0, 2):
        first = StreamLoader(mixture(), 3, num_workers=workers)
        seen = numbers(first, 7)
        second = StreamLoader(mixture(), 2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + numbers(second, 20) == whole[:61]


def test_mixtures_that_are_none_are_refused():
    stream = Streamed(Numbers(9), streams=2)
    with pytest.raises(
        ValueError, match=r"none of the sources \['a'\] is a stream: take a Mixture"
    ):
        StreamMixture({"a": [1]}, {"a": 1})
    with pytest.raises(ValueError, match=r"ratios are those of \['b'\], the sources are \['a'\]"):
        StreamMixture({"a": stream}, {"b": 1})
    with pytest.raises(ValueError, match=r"streams=\{'a': 2, 'b': 3\}: all sources"):
        StreamMixture({"a": stream, "b": Streamed(Numbers(9), streams=3)}, {"a": 1, "b": 1})
