"""Started by hand under torchrun: all ranks run the one job that rank 0 composes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta

from ditty_di.launch import parent_death, worker
from ditty_di.launch.rundir import RunDirectory

_KEY = "ditty_di/job"
_RUN = "ditty_di/run"  # of the first start, for those after it
#: The answer for a task without a run directory: each rank starts the command.
_EACH = "each"
_TIMEOUT = timedelta(hours=1)  # rank 0 may be importing everything from a slow disk


def is_parent() -> bool:
    """Return whether this process is a rank of torchrun, or of a compatible launcher."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def run(arguments: Sequence[str], start: Callable[..., int]) -> int:
    """Run the command on all ranks and return this rank's exit code.

    Rank 0 starts the command and sends the path of the run directory to the others through the
    rendezvous store; they import no Hydra. When rank 0 cannot start, all exit with its code. A
    task that leaves no run has no directory to share: there each rank starts the command.

    Args:
        arguments: the command line.
        start: composes a command and runs it with a launcher (`ditty_di.__main__.start`).
    """
    from torch.distributed import PrefixStore, rendezvous

    if "TORCHELASTIC_RUN_ID" in os.environ:  # its main thread starts the ranks
        parent_death.die_with_parent_thread()
    # torchrun's own store when it keeps one; the process group will use it as well.
    store = next(iter(rendezvous("env://", timeout=_TIMEOUT)))[0]
    if int(os.environ["RANK"]):
        answer = store.get(_KEY).decode()
        if answer == _EACH:
            return start(arguments, worker.main)
        return int(answer) if answer.isdigit() else worker.main(answer)

    # Unlike `store` it is the same after a restart by torchrun, which goes on in the same run.
    lasting = store.underlying_store if isinstance(store, PrefixStore) else store
    if lasting.check([_RUN]) and RunDirectory(path := lasting.get(_RUN).decode()).is_run():
        arguments = [a for a in arguments if not a.startswith("run=")] + [f"run={path}"]

    def launch(run_dir: str) -> int:
        lasting.set(_RUN, run_dir)
        # A temporary directory is on this machine alone.
        store.set(_KEY, _EACH if RunDirectory(run_dir).is_temporary() else run_dir)
        return worker.main(run_dir)

    code = 1
    try:
        code = start(arguments, launch)
    finally:
        # Unless a run directory was sent. Only now: a rank that exits makes torchrun end rank 0,
        # which has to print its message first.
        store.compare_set(_KEY, "", str(code))
    return code


def refused_sweep(arguments: Sequence[str]) -> str:
    """Return the message for a sweep that was started under torchrun."""
    return (
        "a sweep starts the ranks of its jobs by itself; instead of torchrun, type: "
        f"python -m ditty_di {shlex.join(arguments)} "
        f"launcher.nproc={os.environ.get('LOCAL_WORLD_SIZE', 'N')}"
    )
