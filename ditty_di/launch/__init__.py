"""Start the ranks of a run and supervise them: processes, signals, failures, the run directory."""

from ditty_di.launch.elastic import Torchrun
from ditty_di.launch.local import Local

__all__ = ["Local", "Torchrun"]
