"""Training in a few lines: ditty's classes, composed of the same trainer and the same parts.

Nothing is done here that cannot be done with `ditty_di.Trainer`; these classes choose what goes
into its slots.
"""

from ditty_di.front.configs import FSDPConfig, PeftConfig, QuantConfig
from ditty_di.front.data import Data
from ditty_di.front.model_factory import ModelFactory
from ditty_di.front.pipeline import Pipeline
from ditty_di.front.tokenizer_factory import TokenizerFactory

__all__ = [
    "Data",
    "FSDPConfig",
    "ModelFactory",
    "PeftConfig",
    "Pipeline",
    "QuantConfig",
    "TokenizerFactory",
]
