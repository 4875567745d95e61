"""The context of a batch, for imports by its former path."""

from ditty_di.batch import Context, MissingKey

__all__ = ["Context", "MissingKey"]
