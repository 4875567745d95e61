"""Stops a training when somebody has made a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ditty_di.callbacks.base import Callback

if TYPE_CHECKING:
    from ditty_di.protocols import Training


class StopFile(Callback):
    """When the file is there, training ends as after SIGTERM: a checkpoint, and `preempted`.

    Only rank 0 looks, before the first step, after every step and after every validation; the next
    step begins with all ranks agreeing, so nothing is communicated for it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def _look(self, trainer: Training) -> None:
        if trainer.runtime.rank == 0 and self.path.exists():
            trainer.runtime.request_stop()

    train_start = step_end = validation_end = _look
