"""Optimizers by parameter name, learning-rate schedules, and what the trainer holds of both."""

from ditty_di.optim.container import Optimizers, Schedulers, build_optimizer
from ditty_di.optim.groups import Combined, combined, grouped
from ditty_di.optim.schedules import (
    Schedule,
    constant,
    cosine,
    exponential,
    infinite,
    linear,
    power,
    wsd,
)

__all__ = [
    "Combined",
    "Optimizers",
    "Schedule",
    "Schedulers",
    "build_optimizer",
    "combined",
    "constant",
    "cosine",
    "exponential",
    "grouped",
    "infinite",
    "linear",
    "power",
    "wsd",
]
