"""Metrics of a run (speed, memory) and the loggers that get them."""

from ditty_di.loggers.loggers import JSONLines, TensorBoard
from ditty_di.loggers.processor import Logger, MetricsProcessor
from ditty_di.loggers.progress import ProgressBar
from ditty_di.loggers.prometheus import Prometheus
from ditty_di.loggers.trackers import MLflow, Trackio, WandB

__all__ = [
    "JSONLines",
    "Logger",
    "MLflow",
    "MetricsProcessor",
    "ProgressBar",
    "Prometheus",
    "TensorBoard",
    "Trackio",
    "WandB",
]
