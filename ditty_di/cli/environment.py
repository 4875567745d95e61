"""What a run ran on: versions, hardware, git. Nothing is imported to find out."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "SLURM_JOB_ID")


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """A JSON object about this process, started as `python -m ditty_di ARGUMENTS`."""
    return {
        "date": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "ditty_di", *arguments]),
        "folder": os.getcwd(),
        "git": _git(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _packages() -> dict[str, str]:
    """Name -> version of everything installed, sorted: any of them may be what a node imports."""
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name))


def _git() -> dict[str, Any] | None:
    """Commit of the working folder's repository, and whether anything there is uncommitted."""
    try:
        run = {"capture_output": True, "text": True, "timeout": 5, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run)  # type: ignore[call-overload]
        status = subprocess.run(["git", "status", "--porcelain"], **run)  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _hardware() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": [
            _first_value(file, "Model")
            for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        ],
    }


def _first_value(file: str | Path, name: str) -> str | None:
    """The value of the first `name : value` line; None where there is no such file or line."""
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return None


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
