"""Stop a training when a file appears."""

from __future__ import annotations

import os
from pathlib import Path

from ditty_di.callbacks.base import Callback
from ditty_di.protocols import Training


class StopFile(Callback):
    """Stop the training as SIGTERM does when a file exists: save, exit with status `preempted`.

    Only rank 0 looks, before the first step, after every step and after every validation. The next
    step begins with all ranks agreeing on it, so nothing is communicated here.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def _look(self, trainer: Training) -> None:
        if trainer.runtime.rank == 0 and self.path.exists():
            trainer.runtime.request_stop()

    on_train_start = on_step_end = on_validation_end = _look
