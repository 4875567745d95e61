"""Saves and restores a training run, on all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint import space
from ditty_di.checkpoint.folder import CheckpointError, Manifest

# torch is imported when the first checkpointer is made: the command line must answer without it.
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ditty_di.checkpoint.entries import Entries
    from ditty_di.protocols import Stateful

log = logging.getLogger(__name__)


class Checkpointer:
    """Sharded, atomic checkpoints through `torch.distributed.checkpoint`.

    Every method is called by all ranks, in the same order; an error on one rank is raised on all.
    A process group must exist. The ranks share `folder` (one machine, or a shared file system).

    Args:
        folder: where `step-00000100/` and so on are.
        states: one logical object each over all ranks, sharded or replicated. A state with
            `prepare_load` (see `ditty_di.checkpoint.states`) must fit the checkpoint exactly; any
            other gets back what it saved.
        rank_states: each rank's own, restored only when as many ranks load as saved.
        every: steps between checkpoints; None saves only when forced.
        keep: how many whole checkpoints remain; None keeps all.
        async_save: write in the background, from a copy in host memory.
        load: state names that are not to be restored, as `{"optimizer": False}`.

    Raises:
        ValueError: `every` or `keep` below 1, or state names that collide.
    """

    @staticmethod
    def validate(*, every: int | None = None, keep: int | None = None) -> None:
        wrong = [
            f"checkpoint.{name}={value}: use 1 or more, or null for no limit"
            for name, value in (("every", every), ("keep", keep))
            if value is not None and value < 1
        ]
        if wrong:
            raise ValueError("\n".join(wrong))

    def __init__(
        self,
        folder: str | Path,
        *,
        states: Mapping[str, Stateful],
        rank_states: Mapping[str, Stateful],
        every: int | None = 500,
        keep: int | None = 2,
        async_save: bool = False,
        load: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        self.validate(every=every, keep=keep)
        names = [*states, *rank_states]
        if odd := [name for name in names if "." in name or names.count(name) > 1]:
            raise ValueError(f"checkpointer: state names must be unique and without dots: {odd}")

        import torch.distributed as dist

        self.folder = Path(folder).expanduser().absolute()
        self.states, self.rank_states = dict(states), dict(rank_states)
        self.every, self.keep, self.async_save = every, keep, async_save
        self._load = dict(load)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # Its own group: a background save must not meet the training's collectives. A large
        # checkpoint on a slow disk may take longer than a training step ever should.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._own_group = self._group
        self._rank_key = f"rank-{self._rank}"
        self._writer: Thread | None = None
        self._failure: BaseException | None = None
        self._damaged: dict[Path, str] = {}  # passed over by `load`, on rank 0

    # -- saving -------------------------------------------------------------------------------

    def save(self, step: int, *, force: bool = False) -> bool:
        """Saves when `step` is due, or `force`; False when it is not, or is saved already.

        With `async_save` it returns once everything is copied; what went wrong in the background
        is raised by the next `save` or by `close`.

        Raises:
            CheckpointError: nothing was saved; earlier checkpoints are as they were.
        """
        if not force and (self.every is None or step % self.every):
            return False
        self._wait()
        doing = f"saving step {step}"
        there = self._first(lambda: folders.is_whole(self.folder, step, self._damaged))
        if self._together(doing, there)[0]:
            return False
        entries: dict[str, Entries] = {}
        self._together(doing, lambda: entries.update(self._entries()))
        if self.async_save:
            # A daemon: a process that fails must not wait at its end for ranks that are gone.
            self._writer = Thread(target=self._write_behind, args=(step, entries), daemon=True)
            self._writer.start()
        else:
            self._write(step, entries)
        return True

    def require_space(self, also: int = 0) -> None:
        """Write and remove a small file in the folder, and compare the room with one checkpoint.

        The size is that of the states as they are: an optimizer has none before its first step.

        Args:
            also: further bytes that the same file system must have room for.

        Raises:
            CheckpointError: the folder cannot be written, or is clearly too small.
        """
        doing = f"preparing to save into {self.folder}"
        sizes = self._together(doing, self._size_of_states)
        needed = sum(sizes) + also
        self._together(doing, self._first(lambda: space.require(self.folder, needed)))

    def _size_of_states(self) -> int:
        from ditty_di.checkpoint.entries import key_of, leaves

        return self._size_of(
            {
                name: {key_of(path): value for path, value in leaves(state.state_dict())}
                for name, state in self.states.items()
            }
        )

    def maybe_wait_for_staging(self) -> None:
        """Returns at once: `save` itself copies what training is about to change."""

    def close(self) -> None:
        """Waits for what is being written; raises what went wrong in the background."""
        import torch.distributed as dist

        try:
            self._wait()
        finally:
            if self._own_group is not None and dist.is_initialized():
                dist.destroy_process_group(self._own_group)  # local: waits for no other rank
            self._group = self._own_group = None

    def _entries(self) -> dict[str, Entries]:
        from ditty_di.checkpoint.entries import pack, staged, to_save

        entries = {}
        for name, state in self.states.items():
            of_state = to_save(state.state_dict())
            entries[name] = staged(of_state) if self.async_save else of_state
        for name, state in self.rank_states.items():
            entries[name] = {self._rank_key: pack((), state.state_dict())}
        return entries

    def _write(self, step: int, entries: dict[str, Entries]) -> None:
        doing, start = f"saving step {step}", time.monotonic()
        try:
            self._write_checkpoint(step, entries)
        except CheckpointError as error:
            needed = sum(self._together(doing, lambda: self._size_of(entries)))
            why = str(error)
            problem = self._together(doing, self._first(lambda: self._failed(why, needed)))[0]
            if problem is None:
                raise
            raise CheckpointError(f"{doing} into {self.folder}: {problem}") from error
        if self._rank == 0:
            log.info("saved step %d in %.1f s", step, time.monotonic() - start)

    def _failed(self, problem: str, needed: int) -> str | None:
        """Remove the files of a failed save; return the message if it failed for lack of space."""
        explained = space.explained(problem, self.folder, needed)
        folders.remove_leftovers(self.folder)
        return explained

    def _write_checkpoint(self, step: int, entries: dict[str, Entries]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        doing = f"saving step {step}"
        aside = self._together(doing, self._first(lambda: folders.start_saving(self.folder, step)))
        # Copying ahead from the device is for tensors that are there; in the background it would
        # also open a context on the first device.
        ahead = 0 if self.async_save else 10_000_000  # bytes
        writer = FileSystemWriter(aside[0], sync_files=True, per_thread_copy_ahead=ahead)
        with _one_error(doing):
            save(entries, storage_writer=writer, process_group=self._group)
        # Each rank reads what it wrote itself: that is still in this machine's memory.
        own = f"__{self._rank}_*"
        of_ranks = self._together(
            doing, lambda: {file.name: folders.digest_of(file) for file in aside[0].glob(own)}
        )
        digests = {name: digest for one in of_ranks for name, digest in one.items()}
        self._together(doing, self._first(lambda: self._commit(step, aside[0], digests)))

    def _size_of(self, entries: Mapping[str, Mapping[str, Any]]) -> int:
        values = (value for of_state in entries.values() for value in of_state.values())
        return space.size_of(values, first=self._rank == 0)

    def _commit(self, step: int, aside: Path, digests: dict[str, str]) -> None:
        import torch

        from ditty_di.checkpoint.restricted import Reader

        metadata = Reader(aside).read_metadata()
        files = {path.name: path.stat().st_size for path in aside.iterdir()}
        written = {info.relative_path for info in metadata.storage_data.values()}
        if unseen := sorted(written - files.keys()):
            raise CheckpointError(
                f"rank 0 does not see {unseen[0]}, which another rank wrote; put {self.folder} on "
                f"a file system that all ranks share"
            )
        manifest = Manifest(
            step=step,
            world_size=self._world_size,
            torch=torch.__version__,
            files=files,
            keys=sorted(metadata.state_dict_metadata),
            digests=digests,
        )
        checkpoint = folders.commit(aside, self.folder, manifest)
        self._damaged.pop(checkpoint, None)
        if self.keep is not None:
            folders.prune(self.folder, keep=self.keep, relied_on=checkpoint, damaged=self._damaged)

    def _write_behind(self, step: int, entries: dict[str, Entries]) -> None:
        try:
            self._write(step, entries)
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (failure := self._failure) is not None:
            self._failure = None
            raise CheckpointError(f"in the background: {failure}") from failure

    # -- loading ------------------------------------------------------------------------------

    def use_group(self, group: Any) -> None:
        """Agree over another process group from here on.

        An exception in the middle of a save leaves ranks in different collectives of the own one.
        """
        self._group = group

    def load(self) -> int | None:
        """Restores the newest whole checkpoint, the one that rank 0 finds.

        Returns:
            Its step; None when there is none.

        Raises:
            CheckpointError: it does not fit the live states, or cannot be read.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        from ditty_di.checkpoint.load import LoadPlan
        from ditty_di.checkpoint.restricted import Planner, Reader

        self._wait()
        start = time.monotonic()
        if (found := self._newest_intact()) is None:
            return None
        checkpoint, manifest = found
        doing = f"loading {checkpoint}"
        own = self._rank_states_to_load(manifest.world_size)
        plan = LoadPlan(checkpoint, rank_key=self._rank_key)
        self._together(doing, lambda: plan.prepare(self._wanted(self.states), own))
        unclaimed = plan.unclaimed(self._group)
        self._together(doing, lambda: plan.require_claimed(unclaimed))
        with _one_error(doing, "; move it away to go on from the one before"):
            load(
                plan.targets,
                storage_reader=Reader(checkpoint),
                planner=Planner(),
                process_group=self._group,
            )
        self._together(doing, plan.restore)
        if self._rank == 0:
            log.info("loaded %s in %.1f s", checkpoint, time.monotonic() - start)
        return manifest.step

    def _newest_intact(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint whose files have the content that was written.

        The ranks share the files among them, so that each is read once for its digest.
        """
        doing = f"looking for checkpoints in {self.folder}"
        while (found := self._together(doing, self._first(self._newest))[0]) is not None:
            checkpoint, manifest = found
            mine = sorted(manifest.digests)[self._rank :: self._world_size]
            problems = self._together(doing, partial(_damage, checkpoint, manifest, mine))
            problem = next(filter(None, problems), None)
            if problem is None:
                return checkpoint, manifest
            if self._rank == 0:
                folders.pass_over_damaged(checkpoint, problem, self._damaged)
        return None

    def _newest(self) -> tuple[Path, Manifest] | None:
        folders.remove_leftovers(self.folder)
        checkpoint = folders.latest(self.folder, self._damaged)
        return None if checkpoint is None else (checkpoint, folders.read_manifest(checkpoint))

    def _wanted(self, states: Mapping[str, Stateful]) -> dict[str, Stateful]:
        return {name: state for name, state in states.items() if self._load.get(name, True)}

    def _rank_states_to_load(self, world_size: int) -> dict[str, Stateful]:
        wanted = self._wanted(self.rank_states)
        if world_size == self._world_size:
            return wanted
        if wanted and self._rank == 0:
            log.warning(
                "%s: saved by %d ranks and loaded by %d, so each rank keeps its own as it is",
                ", ".join(wanted),
                world_size,
                self._world_size,
            )
        return {}

    # -- ranks together -----------------------------------------------------------------------

    def _first(self, do: Callable[[], Any]) -> Callable[[], Any]:
        """For rank 0 only."""
        return do if self._rank == 0 else lambda: None

    def _together(self, doing: str, do: Callable[[], Any]) -> list[Any]:
        """What `do` returned on each rank.

        Raises:
            CheckpointError: on every rank, when it failed on any.
        """
        import torch.distributed as dist

        result, problem, cause = None, None, None
        try:
            result = do()
        except Exception as error:
            cause, problem = error, _described(error)
        outcomes: list[Any] = [None] * self._world_size
        dist.all_gather_object(outcomes, (result, problem), group=self._group)
        problems = {rank: p for rank, (_, p) in enumerate(outcomes) if p is not None}
        if problems:
            raise CheckpointError(f"{doing}: {_by_rank(problems)}") from cause
        return [result for result, _ in outcomes]


def _damage(checkpoint: Path, manifest: Manifest, names: list[str]) -> str | None:
    """Why a file of these has other content than was written; None if none has."""
    try:
        folders.verify(checkpoint, manifest, names)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


@contextmanager
def _one_error(doing: str, hint: str = "") -> Iterator[None]:
    """torch raises the same error, of every rank that failed, on all ranks; here without stacks."""
    from torch.distributed.checkpoint.api import CheckpointException

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
    """The problems, each once, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in problems.items():
        ranks.setdefault(problem, []).append(rank)
    return "; ".join(f"{_ranks(numbers)}: {problem}" for problem, numbers in ranks.items())


def _ranks(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    return f"rank {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
