"""Import what the jobs of a sweep will import; the process they are forked from imports this."""

import contextlib
import importlib
import os

from ditty_di.config.targets import locate
from ditty_di.console import quiet_imports
from ditty_di.sweeps.warm import TARGETS

_ALWAYS = ("ditty_di.cli.composing", "ditty_di.cli.job", "ditty_di.launch.worker")

# Counting GPUs must not initialize CUDA here: a forked process could not use it any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
quiet_imports()
for _module in _ALWAYS:
    importlib.import_module(_module)
for _target in os.environ.pop(TARGETS, "").split():
    with contextlib.suppress(Exception):  # the job that needs it reports what is wrong with it
        locate(_target)
