"""Callbacks: hooks at the end of a step, of a validation, of the training."""

from ditty_di.callbacks.base import Callback, Callbacks
from ditty_di.callbacks.block_statistics import BlockStatistics
from ditty_di.callbacks.early_stopping import EarlyStopping
from ditty_di.callbacks.ema import EMA
from ditty_di.callbacks.memory_points import MemoryPoints
from ditty_di.callbacks.pruning import ASHA, Pruning
from ditty_di.callbacks.sample_text import SampleText
from ditty_di.callbacks.stop_file import StopFile
from ditty_di.callbacks.stragglers import Stragglers

__all__ = [
    "ASHA",
    "EMA",
    "BlockStatistics",
    "Callback",
    "Callbacks",
    "EarlyStopping",
    "MemoryPoints",
    "Pruning",
    "SampleText",
    "StopFile",
    "Stragglers",
]
