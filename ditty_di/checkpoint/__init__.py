"""Checkpoints: sharded, atomic, resumable on another layout."""

from ditty_di.checkpoint.checkpointer import Checkpointer
from ditty_di.checkpoint.folder import CheckpointError, latest

__all__ = ["CheckpointError", "Checkpointer", "latest"]
