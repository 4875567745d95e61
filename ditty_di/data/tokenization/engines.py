"""Engines: what runs the parts of a tokenization. Each gives the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from ditty_di.data import options
from ditty_di.data.tokenization.part import Receipt
from ditty_di.data.tokenization.plan import Part
from ditty_di.data.tokenization.ranks import rank_and_world, usable_cores

#: Tokenize one part; it can be pickled.
Work = Callable[[Part], Receipt]


class Engine(Protocol):
    """Runs the parts."""

    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the parts that this process is to see done."""

    def run(self, work: Work, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Do the work of each part, in any order, and yield the receipts."""


class _AllParts:
    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return all parts."""
        return parts


class Pool:
    """Processes on this machine, of each rank where there are several.

    Rank r of w takes the parts r, r + w, ... Ranks are those of torchrun, `srun` and `mpirun`.

    Args:
        workers: Processes of each rank; None: one for each core that the rank may use.
        rank: This rank, for starts by hand on several machines; None: as the launcher says.
        world: Number of ranks; None: as the launcher says.
    """

    @staticmethod
    def validate(
        *, workers: int | None = None, rank: int | None = None, world: int | None = None
    ) -> None:
        """Raise `ValueError` for an option out of range."""
        options.at_least(1, workers=workers, world=world)
        options.at_least(0, rank=rank)
        options.require((rank is None) == (world is None), f"rank={rank}: give rank and world")
        if rank is not None and world is not None:
            options.require(rank < world, f"rank={rank} must be below world={world}")

    def __init__(
        self, workers: int | None = None, rank: int | None = None, world: int | None = None
    ) -> None:
        self.validate(workers=workers, rank=rank, world=world)
        found, ranks, local = rank_and_world()
        self.rank, self.world = found if rank is None else rank, ranks if world is None else world
        self.workers = max(usable_cores() // local, 1) if workers is None else workers

    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the parts of this rank."""
        return parts[self.rank :: self.world]

    def run(self, work: Work, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Tokenize the parts; the first failure ends the run with its message."""
        if min(self.workers, len(parts)) <= 1:
            before = os.environ.get("TOKENIZERS_PARALLELISM")
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            try:
                yield from map(work, parts)
            finally:
                if before is None:
                    del os.environ["TOKENIZERS_PARALLELISM"]
                else:
                    os.environ["TOKENIZERS_PARALLELISM"] = before
            return
        # Not a fork: threads of this process may hold locks.
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, len(parts))
        pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
        try:
            for future in as_completed([pool.submit(work, part) for part in parts]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, probably because memory ran out: take fewer (workers=1), or "
                "a lower max_document_mb; finished parts are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Prepare a worker: one thread, and no life without its parent."""
    from ditty_di.launch.parent_death import die_with_parent_thread

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    die_with_parent_thread()
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


class Ray(_AllParts):
    """A task of Ray for each part.

    Args:
        address: The cluster; None: a new one on this machine.
        num_cpus: Cores of a task.
        **init: Further arguments of `ray.init`.
    """

    def __init__(self, address: str | None = None, num_cpus: float = 1, **init: Any) -> None:
        self.address, self.num_cpus, self.options = address, num_cpus, init

    def run(self, work: Work, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Tokenize the parts on the cluster, which reads and writes the same folders."""
        import ray

        def do(part: Part) -> Receipt:  # Ray asks for a plain function
            return work(part)

        ray.init(address=self.address, ignore_reinit_error=True, **self.options)
        variables = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        task = ray.remote(num_cpus=self.num_cpus, runtime_env=variables)(do)
        left = [task.remote(part) for part in parts]
        while left:
            (done,), left = ray.wait(left, num_returns=1)
            yield ray.get(done)


class Datatrove(_AllParts):
    """An executor of datatrove: local processes, Slurm jobs, Ray.

    An executor that only submits jobs (Slurm) leaves the parts to them: the command waits as it
    does for other ranks, and when they start late, run again it writes the manifest.

    Args:
        executor: Makes the executor of a pipeline, such as a partial of
            `datatrove.executor.SlurmPipelineExecutor`.
    """

    def __init__(self, executor: Callable[..., Any]) -> None:
        self.executor = executor

    def run(self, work: Work, parts: Sequence[Part]) -> Iterator[Receipt]:
        """Tokenize the parts as a pipeline of one step."""
        # A job of Slurm starts a script of this environment, which need not be an active one.
        scripts = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
        self.executor(pipeline=[Step(work, list(parts))]).run()
        yield from ()


class Step:
    """A step of a datatrove pipeline: task r of w tokenizes the parts r, r + w, ...

    Args:
        work: Tokenizes one part.
        parts: All parts.
    """

    def __init__(self, work: Work, parts: list[Part]) -> None:
        self.work, self.parts = work, parts

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Tokenize the parts of a task."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for part in self.parts[rank::world_size]:
            self.work(part)
        return data
