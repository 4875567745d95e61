"""What all ranks do together, so that an error of one is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ditty_di.checkpoint.manifest import CheckpointError


class Together:
    """The ranks of a checkpointer, with a process group of their own.

    A background save must not meet the training's collectives. A large checkpoint on a slow disk
    may take longer than a training step ever should.

    Attributes:
        rank: this process's.
        world_size: number of ranks.
        group: the process group of all ranks, on the CPU; None once it is closed.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._own_group = self.group

    def close(self) -> None:
        """Destroy the own group, which waits for no other rank."""
        if self._own_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._own_group)
        self.group = self._own_group = None

    def on_rank_0(self, doing: str, do: Callable[[], Any], group: Any = None) -> Any:
        """Call a function on rank 0 and return its result on every rank.

        Args:
            doing: for messages.
            do: the function.
            group: process group; None is the own one.

        Raises:
            CheckpointError: on every rank, when it failed.
        """
        return self.do(doing, do if self.rank == 0 else lambda: None, group)[0]

    def do(self, doing: str, do: Callable[[], Any], group: Any = None) -> list[Any]:
        """Call a function on every rank and return the results of all.

        Args:
            doing: for messages.
            do: called on this rank.
            group: process group; None is the own one.

        Raises:
            CheckpointError: on every rank, when it failed on any.
        """
        result, problem, cause = None, None, None
        try:
            result = do()
        except Exception as error:
            cause, problem = error, _described(error)
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, problem), group=group or self.group)
        problems = {rank: p for rank, (_, p) in enumerate(outcomes) if p is not None}
        if problems:
            raise CheckpointError(f"{doing}: {_by_rank(problems)}") from cause
        return [result for result, _ in outcomes]


@contextmanager
def without_stacks(doing: str, hint: str = "") -> Iterator[None]:
    """Shorten torch's error, which has the stacks of every rank that failed, to their messages.

    Args:
        doing: the beginning of the message.
        hint: its end.
    """
    try:
        yield
    except CheckpointException as error:
        problems = {rank: _described(e) for rank, (e, _) in error.failures.items()}
        raise CheckpointError(f"{doing}: {_by_rank(problems)}{hint}") from error


def _described(error: BaseException) -> str:
    if isinstance(error, CheckpointError | ValueError):
        return str(error)
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line[:200]}"


def _by_rank(problems: Mapping[int, str]) -> str:
    """Return the problems, each once, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in problems.items():
        ranks.setdefault(problem, []).append(rank)
    parts = []
    for problem, (first, *others) in ranks.items():
        more = f" and {len(others)} more" if others else ""
        parts.append(f"rank {first}{more}: {problem}")
    return "; ".join(parts)
