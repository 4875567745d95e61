"""What a run reports: speed and memory, and where to."""

from ditty_di.loggers.loggers import JSONLines, ProgressBar, TensorBoard, WandB
from ditty_di.loggers.processor import Logger, MetricsProcessor

__all__ = ["JSONLines", "Logger", "MetricsProcessor", "ProgressBar", "TensorBoard", "WandB"]
