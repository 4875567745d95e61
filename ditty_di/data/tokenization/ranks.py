"""Which of several processes this is, by the variables of what started them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

#: (rank, number of ranks, ranks on this machine) of torchrun, Open MPI, PMIx and MPICH.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
)


def rank_and_world(environment: Mapping[str, str] | None = None) -> tuple[int, int, int]:
    """Return this process's rank, the number of ranks, and how many are on this machine.

    Slurm's variables count inside a step alone: a batch script sees the number of tasks as well,
    but is one process.

    Args:
        environment: Environment variables; None: those of this process.
    """
    env = os.environ if environment is None else environment
    for rank, world, local in _VARIABLES:
        if rank in env and world in env:
            return int(env[rank]), int(env[world]), int(env.get(local, "1"))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        world = env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
        local = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
        return int(env["SLURM_PROCID"]), int(world), int(local)
    return 0, 1, 1


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wait_for_others(
    missing: Callable[[], list[int]], folder: Path, patience: float, interval: float = 1.0
) -> list[int]:
    """Return the parts that are still missing once nothing changes in the folder any more.

    A rank that ends early with an error would make torchrun and mpirun end all others, so it looks
    on while they write. Nothing is sent, and a rank that is lost is not waited for.

    Args:
        missing: Returns the parts without a receipt.
        folder: Folder that all ranks write to.
        patience: Seconds without any change after which it gives up.
        interval: Seconds between two looks.
    """
    seen, changed = file_sizes(folder), time.monotonic()
    while (left := missing()) and time.monotonic() - changed < patience:
        time.sleep(min(interval, patience))
        if (now := file_sizes(folder)) != seen:
            seen, changed = now, time.monotonic()
    return left


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of what is in a folder, in bytes, by name."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found[entry.name] = entry.stat().st_size
            except OSError:  # renamed meanwhile
                continue
    return found
