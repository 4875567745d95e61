"""Losses that are normalized by the number of valid elements of a whole optimizer step."""

from ditty_di.losses.base import Loss
from ditty_di.losses.calculator import LossCalculator, LossOutput
from ditty_di.losses.composite import CompositeLoss
from ditty_di.losses.contrastive import InfoNCELoss
from ditty_di.losses.cross_entropy import (
    ClassificationLoss,
    CrossEntropyCalculator,
    CrossEntropyLoss,
)
from ditty_di.losses.distillation import DistillationLoss
from ditty_di.losses.elementwise import HuberLoss, L1Loss, MSELoss
from ditty_di.losses.hidden_states import skip_lm_head
from ditty_di.losses.liger import LigerLinearCrossEntropyLoss
from ditty_di.losses.linear_cross_entropy import LinearCrossEntropyLoss
from ditty_di.losses.plain import PlainLoss
from ditty_di.losses.routing import RoutedLoss, RouterLoss
from ditty_di.losses.uncertainty import UncertaintyWeightedLoss

__all__ = [
    "ClassificationLoss",
    "CompositeLoss",
    "CrossEntropyCalculator",
    "CrossEntropyLoss",
    "DistillationLoss",
    "HuberLoss",
    "InfoNCELoss",
    "L1Loss",
    "LigerLinearCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "Loss",
    "LossCalculator",
    "LossOutput",
    "MSELoss",
    "PlainLoss",
    "RoutedLoss",
    "RouterLoss",
    "UncertaintyWeightedLoss",
    "skip_lm_head",
]
