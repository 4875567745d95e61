"""Rows of one's own: their forms, and what is held out."""

import pytest
import torch

from ditty_di.data import Loader, held_out_rows, training_rows

PAIRS = [(torch.full((2,), float(i)), torch.tensor([float(i)])) for i in range(20)]


@pytest.mark.parametrize(
    "rows",
    [
        PAIRS,
        [({"input": x}, y) for x, y in PAIRS],
        [{"input": x, "labels": y} for x, y in PAIRS],
        torch.utils.data.TensorDataset(*map(torch.stack, zip(*PAIRS, strict=True))),
    ],
)
def test_rows_of_every_form_are_read(rows):
    ((inputs, labels),) = Loader(training_rows(rows, validation_fraction=0), 20, epochs=1)
    assert inputs["input"].shape == (20, 2) and labels.shape == (20, 1)
    assert torch.equal(inputs["input"][:, :1], labels)


def test_what_is_held_out_follows_from_the_seed():
    def parts(**options):
        return [
            {float(y) for _, y in (rows[i] for i in range(len(rows)))}
            for rows in (training_rows(PAIRS, **options), held_out_rows(PAIRS, **options))
        ]

    train, held_out = parts(validation_fraction=0.2, seed=1)
    assert len(held_out) == 4 and train | held_out == {float(i) for i in range(20)}
    assert parts(validation_fraction=0.2, seed=1) == [train, held_out]
    assert parts(validation_fraction=0.2, seed=2) != [train, held_out]
    assert training_rows(PAIRS, validation=PAIRS[:3]) is PAIRS
    assert held_out_rows(PAIRS, validation=PAIRS[:3]) == PAIRS[:3]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (iter(PAIRS), {}, "has no rows by number; give a list"),
        ([], {}, "there is not one row"),
        ([torch.zeros(2)], {}, r"row 0 is a Tensor; rows are \(x, y\)"),
        ([{"input_ids": 1}] * 3, {}, "row 0 is a mapping with input_ids"),
        (PAIRS[:1], {}, "1 are too few to hold one out"),
        (PAIRS, {"validation_fraction": 1.5}, "must be at least 0 and below 1"),
        (PAIRS, {"validation_fraction": 0}, "holds out no rows"),
    ],
)
def test_other_rows_are_refused(rows, options, said):
    with pytest.raises(ValueError, match=said):
        held_out_rows(rows, **options)
