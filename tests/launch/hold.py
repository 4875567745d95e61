"""A callback for runs that are to be preempted at a certain step."""

import os
import time
from pathlib import Path

from ditty_di.callbacks import Callback


class Hold(Callback):
    """In the first start of a Slurm job, wait after a step until the run is asked to stop."""

    def __init__(self, step: int, ready: str) -> None:
        self.step, self.ready = step, Path(ready)

    def on_step_end(self, trainer) -> None:
        if trainer.step != self.step or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return
        self.ready.with_name(f"{self.ready.name}-{trainer.runtime.rank}").touch()
        deadline = time.monotonic() + 60
        while not trainer.runtime.stop_requested() and time.monotonic() < deadline:
            time.sleep(0.02)
