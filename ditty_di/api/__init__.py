"""The classes of ditty: training in a few lines, with the same trainer and the same components.

They do nothing that `ditty_di.Trainer` cannot do; they choose what goes into its slots.
"""

from ditty_di.api.configs import FSDPConfig, PeftConfig, QuantConfig
from ditty_di.api.data import Data
from ditty_di.api.model_factory import ModelFactory
from ditty_di.api.pipeline import Pipeline
from ditty_di.api.tokenizer_factory import TokenizerFactory

__all__ = [
    "Data",
    "FSDPConfig",
    "ModelFactory",
    "PeftConfig",
    "Pipeline",
    "QuantConfig",
    "TokenizerFactory",
]
