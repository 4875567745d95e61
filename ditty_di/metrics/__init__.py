"""What a run reports: speed and memory, the exact validation loss, and where to."""

from ditty_di.metrics.metrics import Metrics, Writer
from ditty_di.metrics.validation import Validator
from ditty_di.metrics.writers import JSONLines, ProgressBar, TensorBoard, WandB

__all__ = [
    "JSONLines",
    "Metrics",
    "ProgressBar",
    "TensorBoard",
    "Validator",
    "WandB",
    "Writer",
]
