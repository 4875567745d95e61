from hypothesis import given
from hypothesis import strategies as st

from ditty_di.data.order import Order, permutation


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed, epoch, rows):
    assert sorted(permutation(seed, epoch, rows).tolist()) == list(range(rows))


def test_seeds_and_epochs_have_their_own_orders():
    orders = [permutation(seed, epoch, 50).tolist() for seed in range(5) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 25


def test_the_order_never_changes_between_versions():
    """A run that was saved must resume: these numbers are for ever."""
    assert permutation(0, 0, 8).tolist() == FIRST
    assert permutation(1234, 5, 8).tolist() == SECOND


FIRST = [0, 3, 7, 5, 1, 2, 6, 4]
SECOND = [3, 6, 5, 7, 2, 4, 1, 0]


@given(st.integers(1, 20), st.booleans(), st.integers(0, 100), st.integers(0, 100))
def test_a_part_of_the_stream_is_what_lies_there(rows, shuffle, start, count):
    order = Order(rows, 3, shuffle)
    stream = [
        row
        for epoch in range(200 // rows + 1)
        for row in (permutation(3, epoch, rows).tolist() if shuffle else range(rows))
    ]
    assert order.between(start, start + count) == stream[start : start + count]
    assert order.between(start, start - 1) == []
