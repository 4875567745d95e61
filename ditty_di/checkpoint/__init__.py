"""Checkpoints: sharded, atomic, resumable on another layout."""

from ditty_di.checkpoint.checkpointer import Checkpointer
from ditty_di.checkpoint.folder import best, latest
from ditty_di.checkpoint.manifest import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "best", "latest"]
