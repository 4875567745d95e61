"""Whether the kernel killed a process for want of memory."""

from __future__ import annotations

from pathlib import Path


def kills_so_far() -> int | None:
    """Return how many processes the kernel's out-of-memory killer has ended since boot, in this
    machine and its containers (`/proc/vmstat`); None where that is not known."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return None


def how_killed(before: int | None) -> str:
    """Say what sent a SIGKILL, from the count before it."""
    now = kills_so_far()
    if before is None or now is None:
        return "SIGKILL: did the machine run out of memory?"
    if now > before:
        return "SIGKILL: the kernel ran out of memory"
    return "SIGKILL, and not by the kernel for want of memory"
