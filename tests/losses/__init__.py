"""Batches for tests of losses."""

from ditty_di.batch import Batch, Context


def as_batch(value, inputs=None):
    """A batch of labels, or of a context."""
    labels, context = (None, value) if isinstance(value, Context) else (value, Context())
    return Batch(inputs or {}, labels, context)
