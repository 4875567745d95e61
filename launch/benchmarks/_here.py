"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "torchtitan", "transformers", "accelerate", "peft", "torchao", "liger-kernel")


def environment() -> dict[str, Any]:
    """The processor and how busy it is, the GPU if there is one, and versions of what is used."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
        processor = names[0] if names else processor
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": versions,
    }
