"""Callbacks: hooks at the end of a step, of a validation, of the training."""

from typing import TYPE_CHECKING

from ditty_di.callbacks.base import Callback, Callbacks
from ditty_di.callbacks.block_statistics import BlockStatistics
from ditty_di.callbacks.early_stopping import EarlyStopping
from ditty_di.callbacks.ema import EMA
from ditty_di.callbacks.memory_points import MemoryPoints
from ditty_di.callbacks.pruning import ASHA, Pruning
from ditty_di.callbacks.stop_file import StopFile
from ditty_di.callbacks.stragglers import Stragglers
from ditty_di.postponed import exports

if TYPE_CHECKING:  # the type of the lazy export below
    from ditty_di.callbacks.sample_text import SampleText

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

# Imported on first use: it needs transformers, which a module of one's own does not.
__getattr__, __dir__ = exports(globals(), {"SampleText": "ditty_di.callbacks.sample_text"})
