"""Metrics of a run (speed, memory) and the loggers that get them."""

from ditty_di.loggers.loggers import JSONLines, ProgressBar, TensorBoard, WandB
from ditty_di.loggers.processor import Logger, MetricsProcessor

__all__ = ["JSONLines", "Logger", "MetricsProcessor", "ProgressBar", "TensorBoard", "WandB"]
