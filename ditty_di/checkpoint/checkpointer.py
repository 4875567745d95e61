"""Save and restore a training run, on all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint import space
from ditty_di.checkpoint.folder import Checkpoint, CheckpointError, Manifest
from ditty_di.checkpoint.load import LoadPlan
from ditty_di.checkpoint.restricted import Reader
from ditty_di.checkpoint.serialization import Entries, leaves, pack, shown, to_host, to_save
from ditty_di.protocols import Stateful

log = logging.getLogger(__name__)


class Checkpointer:
    """Sharded, atomic checkpoints through `torch.distributed.checkpoint`.

    Every method is called by all ranks, in the same order; an error on one rank is raised on all.
    A process group must exist. The ranks share `folder` (one machine, or a shared file system).

    Args:
        folder: the folder of `step-00000100/` and so on.
        states: by name; one logical object each over all ranks, sharded or replicated. A state with
            `prepare_load` (see `ditty_di.checkpoint.states`) must fit the checkpoint exactly; any
            other gets back what it saved.
        rank_states: by name; each rank's own, restored only when as many ranks load as saved.
        save_interval: steps between checkpoints; None saves only when forced.
        keep_latest_k: number of whole checkpoints that remain; None keeps all.
        async_save: write in the background, from a copy in host memory.
        load: state names that are not to be restored, as `{"optimizer": False}`.

    Raises:
        ValueError: `save_interval` or `keep_latest_k` below 1, or state names that collide.
    """

    @staticmethod
    def validate(*, save_interval: int | None = None, keep_latest_k: int | None = None) -> None:
        """Check the arguments without touching anything; see the class.

        Args:
            save_interval: steps between checkpoints.
            keep_latest_k: number of whole checkpoints that remain.
        """
        wrong = [
            f"checkpoint.{name}={value}: use 1 or more, or null for no limit"
            for name, value in (("save_interval", save_interval), ("keep_latest_k", keep_latest_k))
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
        save_interval: int | None = 500,
        keep_latest_k: int | None = 2,
        async_save: bool = False,
        load: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        self.validate(save_interval=save_interval, keep_latest_k=keep_latest_k)
        names = [*states, *rank_states]
        if odd := [name for name in names if "." in name or names.count(name) > 1]:
            raise ValueError(f"checkpointer: state names must be unique and without dots: {odd}")
        self.folder = Path(folder).expanduser().absolute()
        self.states, self.rank_states = dict(states), dict(rank_states)
        self.save_interval, self.keep_latest_k, self.async_save = (
            save_interval,
            keep_latest_k,
            async_save,
        )
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
        """Save a step that is due; return whether a checkpoint was started.

        With `async_save` it returns once everything is copied; errors in the background are raised
        by the next `save` or by `close`.

        Args:
            step: optimizer steps done; one that is saved already is not saved again.
            force: save even if the step is not due.

        Raises:
            CheckpointError: nothing was saved; earlier checkpoints are as they were.
        """
        if not force and (self.save_interval is None or step % self.save_interval):
            return False
        self._wait()
        doing = f"saving step {step}"
        if self._on_rank_0(doing, lambda: folders.is_whole(self.folder, step, self._damaged)):
            return False
        entries: dict[str, Entries] = {}
        self._together(doing, lambda: entries.update(self._entries()))
        if self.async_save:
            # A daemon: a process that fails must not wait at exit for ranks that are gone.
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

        def values() -> Iterator[Any]:
            for state in self.states.values():
                yield from (value for _, value in leaves(state.state_dict()))

        # In the training's group: a rank that hangs as its states read rows is missed soon.
        sizes = self._together(doing, lambda: self._size_of(values()), group=dist.group.WORLD)
        needed = sum(sizes) + also
        self._on_rank_0(doing, lambda: space.require(self.folder, needed))

    def maybe_wait_for_staging(self) -> None:
        """Return at once: `save` itself copies what training is about to change."""

    def close(self) -> None:
        """Wait for a save in the background; raise its error."""
        try:
            self._wait()
        finally:
            if self._own_group is not None and dist.is_initialized():
                dist.destroy_process_group(self._own_group)  # local: waits for no other rank
            self._group = self._own_group = None

    def _entries(self) -> dict[str, Entries]:
        entries = {name: to_save(state.state_dict()) for name, state in self.states.items()}
        if self.async_save:
            entries = {
                name: {k: to_host(v) if isinstance(v, Tensor) else v for k, v in values.items()}
                for name, values in entries.items()
            }
        for name, state in self.rank_states.items():
            entries[name] = {self._rank_key: pack((), state.state_dict())}
        return entries

    def _size_of(self, values: Iterable[Any]) -> int:
        return sum(space.size_of(value, first=self._rank == 0) for value in values)

    def _write(self, step: int, entries: dict[str, Entries]) -> None:
        doing, start = f"saving step {step}", time.monotonic()
        try:
            self._write_checkpoint(step, doing, entries)
        except CheckpointError as error:
            values = [value for state in entries.values() for value in state.values()]
            needed = sum(self._together(doing, lambda: self._size_of(values)))
            why = str(error)

            def explain() -> str | None:
                explanation = space.explained(why, self.folder, needed)
                folders.remove_leftovers(self.folder)
                return explanation

            explanation = self._on_rank_0(doing, explain)
            if explanation is None:
                raise
            raise CheckpointError(f"{doing} into {self.folder}: {explanation}") from error
        if self._rank == 0:
            log.info("saved step %d in %.1f s", step, time.monotonic() - start)

    def _write_checkpoint(self, step: int, doing: str, entries: dict[str, Entries]) -> None:
        temporary = self._on_rank_0(doing, lambda: folders.start_saving(self.folder, step))
        # Copying ahead from the device is for tensors on it; in the background it would also open
        # a context on the first device.
        ahead = 0 if self.async_save else 10_000_000  # bytes
        writer = FileSystemWriter(temporary, sync_files=True, per_thread_copy_ahead=ahead)
        with _without_stacks(doing):
            save(entries, storage_writer=writer, process_group=self._group)
        # Each rank reads what it wrote itself: that is still in this machine's memory.
        own = f"__{self._rank}_*"
        of_ranks = self._together(
            doing, lambda: {file.name: folders.digest_of(file) for file in temporary.glob(own)}
        )
        digests = {name: digest for one in of_ranks for name, digest in one.items()}
        self._on_rank_0(doing, lambda: self._commit(step, temporary, digests))

    def _commit(self, step: int, temporary: Path, digests: dict[str, str]) -> None:
        metadata = Reader(temporary).read_metadata()
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
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
        checkpoint = folders.commit(temporary, self.folder, manifest)
        self._damaged.pop(checkpoint, None)
        if self.keep_latest_k is not None:
            folders.prune(
                self.folder, keep=self.keep_latest_k, relied_on=checkpoint, damaged=self._damaged
            )

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
        """Use another process group from here on.

        An exception in the middle of a save leaves ranks in different collectives of the own one.

        Args:
            group: of all ranks, on the CPU.
        """
        self._group = group

    def load(self) -> int | None:
        """Restore the newest whole checkpoint that rank 0 finds, and return its step.

        Returns:
            None when there is none.

        Raises:
            CheckpointError: it does not fit the live states, or cannot be read.
        """
        self._wait()
        start = time.monotonic()
        checkpoint = self._newest_undamaged()
        if checkpoint is None:
            return None
        doing = f"loading {checkpoint.path}"
        plan = LoadPlan(checkpoint, rank_key=self._rank_key)
        own = self._rank_states_to_load(checkpoint.manifest.world_size)
        self._together(doing, lambda: plan.prepare(self._wanted(self.states), own))
        if unclaimed := plan.unclaimed(self._group):
            problem = f"the checkpoint has what this run does not: {shown(unclaimed)}"
            raise CheckpointError(f"{doing}: {problem}")
        with _without_stacks(doing, "; move it away to go on from the one before"):
            checkpoint.read(plan.targets, group=self._group)
        self._together(doing, plan.restore)
        if self._rank == 0:
            log.info("loaded %s in %.1f s", checkpoint.path, time.monotonic() - start)
        return checkpoint.step

    def _newest_undamaged(self) -> Checkpoint | None:
        """Return the newest checkpoint whose files have the content that was written.

        The ranks share the files among them, so that each is read once for its digest.
        """
        doing = f"looking for checkpoints in {self.folder}"
        while (found := self._on_rank_0(doing, self._newest)) is not None:
            checkpoint: Checkpoint = found
            mine = sorted(checkpoint.manifest.digests)[self._rank :: self._world_size]
            problems = self._together(doing, partial(checkpoint.damage, mine))
            problem = next(filter(None, problems), None)
            if problem is None:
                return checkpoint
            if self._rank == 0:
                folders.pass_over_damaged(checkpoint.path, problem, self._damaged)
        return None

    def _newest(self) -> Checkpoint | None:
        folders.remove_leftovers(self.folder)
        path = folders.latest(self.folder, self._damaged)
        return None if path is None else Checkpoint(path)

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

    def _on_rank_0(self, doing: str, do: Callable[[], Any]) -> Any:
        """Call `do` on rank 0 and return its result on every rank."""
        return self._together(doing, do if self._rank == 0 else lambda: None)[0]

    def _together(self, doing: str, do: Callable[[], Any], group: Any = None) -> list[Any]:
        """Call `do` on every rank and return the results of all.

        Args:
            doing: for messages.
            do: called on this rank.
            group: process group; None is the checkpointer's own.

        Raises:
            CheckpointError: on every rank, when it failed on any.
        """
        result, problem, cause = None, None, None
        try:
            result = do()
        except Exception as error:
            cause, problem = error, _described(error)
        outcomes: list[Any] = [None] * self._world_size
        dist.all_gather_object(outcomes, (result, problem), group=group or self._group)
        problems = {rank: p for rank, (_, p) in enumerate(outcomes) if p is not None}
        if problems:
            raise CheckpointError(f"{doing}: {_by_rank(problems)}") from cause
        return [result for result, _ in outcomes]


@contextmanager
def _without_stacks(doing: str, hint: str = "") -> Iterator[None]:
    """Shorten torch's error, which has the stacks of every rank that failed, to their messages."""
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
