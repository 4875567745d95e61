"""Imported by the process that a sweep's jobs are forked from: imports what they will import."""

import contextlib
import importlib
import os

from ditty_di.config.targets import locate
from ditty_di.console import quiet_imports
from ditty_di.launchers.warm import TARGETS

_ALWAYS = ("ditty_di.cli.composing", "ditty_di.cli.job", "ditty_di.worker")

# Counting GPUs must not initialise CUDA here: a forked process could not use it any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
quiet_imports()
for _module in _ALWAYS:
    importlib.import_module(_module)
for _target in os.environ.pop(TARGETS, "").split():
    with contextlib.suppress(Exception):  # the job that needs it says what is wrong with it
        locate(_target)
