from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ditty_di.losses import CrossEntropyLoss
from tests.losses import as_batch, families
from tests.losses.families import build


def batch(rows: int, seq: int, ignored: float, ignore_index: int = -100):
    generator = torch.Generator().manual_seed(rows * 100 + seq)
    labels = torch.randint(0, 11, (rows, seq), generator=generator)
    labels[torch.rand(rows, seq, generator=generator) < ignored] = ignore_index
    return torch.randn(rows, seq, 11, generator=generator), labels


@given(rows=st.integers(1, 6), seq=st.integers(1, 9), ignored=st.floats(0, 0.9))
def test_parts_of_a_ragged_batch_add_up_to_the_mean_over_valid_labels(rows, seq, ignored):
    loss_fn = CrossEntropyLoss()
    logits, labels = batch(rows, seq, ignored)
    count = loss_fn.num_valid(as_batch(labels))
    if count == 0:
        return
    whole = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    parts = [loss_fn(logits[i : i + 1], as_batch(labels[i : i + 1]), count)[0] for i in range(rows)]
    torch.testing.assert_close(sum(parts), whole)


def test_a_custom_ignore_index_is_counted_and_ignored():
    loss_fn = CrossEntropyLoss(ignore_index=3)
    logits, labels = batch(2, 5, 0.0)
    assert loss_fn.num_valid(as_batch(labels)) == (labels != 3).sum()
    assert loss_fn(logits, as_batch(torch.full_like(labels, 3)), torch.tensor(1.0))[0] == 0


def test_shifted_labels_are_those_that_the_data_would_have_shifted():
    tokens = torch.randint(0, 11, (2, 6))
    logits = torch.randn(2, 6, 11)
    inside, outside = CrossEntropyLoss(shift=True), CrossEntropyLoss()
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    count = inside.num_valid(as_batch(tokens))
    assert count == outside.num_valid(as_batch(shifted)) == 10
    torch.testing.assert_close(
        inside(logits, as_batch(tokens), count)[0], outside(logits, as_batch(shifted), count)[0]
    )


def test_the_logits_are_taken_from_where_the_configuration_says():
    logits, labels = batch(2, 3, 0.0)
    output = SimpleNamespace(logits=logits, loss="not ours")
    count = torch.tensor(6)
    named, plain = CrossEntropyLoss(output="logits"), CrossEntropyLoss()
    assert named(output, as_batch(labels), count)[0] == plain(logits, as_batch(labels), count)[0]
    with pytest.raises(LookupError, match="SimpleNamespace of no values"):
        plain(output, as_batch(labels), count)


def test_classes_without_a_sequence():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, -100])
    loss_fn = CrossEntropyLoss()
    count = loss_fn.num_valid(as_batch(labels))
    assert count == 4
    torch.testing.assert_close(
        loss_fn(logits, as_batch(labels), count)[0],
        F.cross_entropy(logits, labels, ignore_index=-100),
    )


def test_half_precision_logits_are_compared_in_float32():
    logits, labels = batch(1, 4, 0.0)
    loss, _ = CrossEntropyLoss()(logits.bfloat16(), as_batch(labels), torch.tensor(4))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoder_targets_are_compared_as_they_are(family):
    model = build(family)
    inputs, labels = families.batch(family)
    loss_fn = CrossEntropyLoss(output="logits")
    loss, _ = loss_fn(
        model(**inputs), as_batch(labels), loss_fn.num_valid(as_batch(labels, inputs))
    )
    torch.testing.assert_close(loss, model(**inputs, labels=labels).loss)
