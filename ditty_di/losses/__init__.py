"""Losses that know from the batch alone how much they will weigh (`protocols.Loss`)."""

from ditty_di.losses.cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss"]
