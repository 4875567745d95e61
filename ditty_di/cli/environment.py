"""Describe what a run runs on: versions, hardware, git. Imports nothing to find out."""

from __future__ import annotations

import os
import platform
import re
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
    """Return a JSON object about this process, started as `python -m ditty_di ARGUMENTS`."""
    # any installed package may be what a node imports
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    pages = 0 if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "ditty_di", *arguments]),
        "folder": os.getcwd(),
        "git": _git(),
        "hardware": {
            "host": platform.node(),
            "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 1) if pages else None,
            "gpus": [_field(file, "Model") for file in gpus],
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: packages[name] for name in sorted(filter(None, packages))},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _git() -> dict[str, Any] | None:
    """Return the commit of the working folder's repository, and whether it has other changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _field(file: str | Path, name: str) -> str | None:
    """Return the value of the first `name : value` line; None where there is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.M)
    return found[1].strip() if found else None
