"""Save and restore a training run, on all ranks together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint import space
from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.load import LoadPlan
from ditty_di.checkpoint.manifest import CheckpointError
from ditty_di.checkpoint.mirror import Mirror
from ditty_di.checkpoint.remote import require_url
from ditty_di.checkpoint.retention import Retention
from ditty_di.checkpoint.serialization import Entries, leaves, pack, to_save
from ditty_di.checkpoint.staging import Staging
from ditty_di.checkpoint.together import Together, without_stacks
from ditty_di.checkpoint.writing import Writer
from ditty_di.config.early import validated
from ditty_di.data.reading.remote import is_url
from ditty_di.messages import first_of, refuse
from ditty_di.protocols import Stateful

log = logging.getLogger(__name__)


@validated
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
        save_every_minutes: minutes between the starts of two checkpoints, by rank 0's clock; the
            trainer, whose ranks agree on the step, forces a save when they have passed.
        keep_latest_k: number of the newest whole checkpoints that remain; None keeps all.
        keep_every: steps that are multiples of it are saved, and remain for ever.
        keep_best: number of checkpoints with the lowest objective that remain; a validated step
            that is one of them is saved.
        mirror: URL of a folder, of this run alone, that rank 0 copies the checkpoints to in the
            background, and that a checkpoint is fetched from if it is newer than all in `folder`.
        async_save: write in the background, from a copy in host memory.
        load: state names that are not to be restored, as `{"optimizer": False}`.

    Raises:
        ValueError: a number that is too low, a `mirror` that is not a URL or a `folder` that is
            one, or state names that collide.
        ImportError: the package for the protocol of `mirror` is not installed.
    """

    @staticmethod
    def validate(
        *,
        folder: str | Path = "",
        save_interval: int | None = None,
        save_every_minutes: float | None = None,
        keep_latest_k: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        mirror: str | None = None,
    ) -> None:
        """Check the arguments without touching anything; see the class.

        Args:
            folder: the folder of checkpoints.
            save_interval: steps between checkpoints.
            save_every_minutes: minutes between checkpoints.
            keep_latest_k: number of the newest whole checkpoints that remain.
            keep_every: steps that remain for ever.
            keep_best: number of the best that remain.
            mirror: URL of the copies.
        """
        wrong = [
            f"checkpoint.{name}={value}: use 1 or more, or null for {null}"
            for name, value, null in (
                ("save_interval", save_interval, "no limit"),
                ("keep_latest_k", keep_latest_k, "no limit"),
                ("keep_every", keep_every, "none"),
                ("keep_best", keep_best, "none"),
            )
            if value is not None and value < 1
        ]
        if save_every_minutes is not None and not save_every_minutes > 0:
            wrong.append(
                f"checkpoint.save_every_minutes={save_every_minutes}: use more than 0, or null"
            )
        if is_url(folder):
            wrong.append(
                f"checkpoint.folder={folder}: checkpoints are written to this machine, and copied "
                f"in the background: leave checkpoint.folder, and write checkpoint.mirror={folder}"
            )
        if mirror is not None and (problem := require_url("checkpoint.mirror", mirror)):
            wrong.append(problem)
        refuse(wrong)

    def __init__(
        self,
        folder: str | Path,
        *,
        states: Mapping[str, Stateful],
        rank_states: Mapping[str, Stateful],
        save_interval: int | None = 500,
        save_every_minutes: float | None = None,
        keep_latest_k: int | None = 2,
        keep_every: int | None = None,
        keep_best: int | None = None,
        mirror: str | None = None,
        async_save: bool = False,
        load: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        names = [*states, *rank_states]
        if odd := [name for name in names if "." in name or names.count(name) > 1]:
            raise ValueError(f"checkpointer: state names must be unique and without dots: {odd}")
        self.folder = Path(folder).expanduser().absolute()
        self.states, self.rank_states = dict(states), dict(rank_states)
        self.save_interval, self.save_every_minutes = save_interval, save_every_minutes
        self.keep = Retention(keep_latest_k, every=keep_every, best=keep_best)
        self.async_save = async_save
        self._load = dict(load)
        self._ranks = Together()
        self._rank_key = f"rank-{self._ranks.rank}"
        self._staging = Staging()
        self._started: dict[int, float | None] = {}  # the newest save, with its objective
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._damaged: dict[Path, str] = {}  # passed over by `load`, on rank 0
        self._damaged_there: dict[str, str] = {}
        self._mirror: Mirror | None = None
        if mirror is not None and self._ranks.rank == 0:
            self._mirror = Mirror(self.folder, mirror, keep=self.keep, damaged=self._damaged)
        # Copying ahead from the device is for tensors on it; in the background it would also open
        # a context on the first device.
        self._writer = Writer(
            self.folder,
            self._ranks,
            keep=self.keep,
            damaged=self._damaged,
            mirror=self._mirror,
            copy_ahead=0 if async_save else 10_000_000,
        )

    # -- saving -------------------------------------------------------------------------------

    def is_due(self, step: int, objective: float | None = None) -> bool:
        """Return whether a step has to be saved: by `save_interval`, `keep_every` or `keep_best`.

        Args:
            step: optimizer steps done.
            objective: the loss of a validation at this very step; None, on all ranks, without one.
        """
        if self.save_interval is not None and not step % self.save_interval:
            return True
        if self.keep.best is None or objective is None or not math.isfinite(objective):
            return self.keep.is_due(step, None, {})

        def decide() -> bool:
            found = folders.whole(self.folder, self._damaged).items()
            saved = {s: checkpoint.manifest.objective for s, checkpoint in found}
            return self.keep.is_due(step, objective, {**self._started, **saved})

        # In the training's group: the own one may be in use by a save in the background.
        doing = f"comparing step {step} with what is saved"
        return bool(self._ranks.on_rank_0(doing, decide, dist.group.WORLD))

    def save(self, step: int, *, force: bool = False, objective: float | None = None) -> bool:
        """Save a step that is due; return whether a checkpoint was started.

        With `async_save` it returns once everything is copied; errors in the background are raised
        by the next `save` or by `close`.

        Args:
            step: optimizer steps done; one that is saved already is not saved again.
            force: save even if the step is not due.
            objective: the loss of a validation at this very step, by which checkpoints are
                compared; None without one.

        Raises:
            CheckpointError: nothing was saved; earlier checkpoints are as they were.
        """
        if not force and not self.is_due(step, objective):
            return False
        self._wait()
        doing = f"saving step {step}"
        if self._ranks.on_rank_0(doing, lambda: folders.is_whole(self.folder, step, self._damaged)):
            return False
        entries: dict[str, Entries] = {}
        self._ranks.do(doing, lambda: entries.update(self._entries()))
        self._started = {step: objective if math.isfinite(objective or 0.0) else None}
        if self.async_save:
            # A daemon: a process that fails must not wait at exit for ranks that are gone.
            self._thread = Thread(target=self._write_behind, args=(step, entries), daemon=True)
            self._thread.start()
        else:
            self._writer.write(step, entries, self._started[step])
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

        def size() -> int:
            every = (leaf for state in self.states.values() for leaf in leaves(state.state_dict()))
            return self._writer.size_of(value for _, value in every)

        # In the training's group: a rank that hangs as its states read rows is missed soon.
        needed = sum(self._ranks.do(doing, size, group=dist.group.WORLD)) + also
        self._ranks.on_rank_0(doing, lambda: space.require(self.folder, needed))

    def maybe_wait_for_staging(self) -> None:
        """Return at once: `save` itself copies what training is about to change."""

    def close(self) -> None:
        """Wait for a save and copies in the background; raise the error of the save."""
        try:
            self._wait()
        finally:
            if self._mirror is not None:
                self._mirror.close()
            self._ranks.close()

    def _entries(self) -> dict[str, Entries]:
        entries = {name: to_save(state.state_dict()) for name, state in self.states.items()}
        if self.async_save:
            entries = self._staging.copies(entries)
        for name, state in self.rank_states.items():
            entries[name] = {self._rank_key: pack((), state.state_dict())}
        return entries

    def _write_behind(self, step: int, entries: dict[str, Entries]) -> None:
        try:
            self._writer.write(step, entries, self._started[step])
        except BaseException as error:
            self._failure = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
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
        self._ranks.group = group

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
        self._ranks.do(doing, lambda: plan.prepare(self._wanted(self.states), own))
        if unclaimed := plan.unclaimed(self._ranks.group):
            problem = f"the checkpoint has what this run does not: {first_of(unclaimed, 5)}"
            raise CheckpointError(f"{doing}: {problem}")
        with without_stacks(doing, "; move it away to go on from the one before"):
            checkpoint.read(plan.targets, group=self._ranks.group)
        self._ranks.do(doing, plan.restore)
        if self._ranks.rank == 0:
            log.info("loaded %s in %.1f s", checkpoint.path, time.monotonic() - start)
        if self._mirror is not None:
            self._mirror.sync()  # the rest of uploads that were cut short
        return checkpoint.step

    def _newest_undamaged(self) -> Checkpoint | None:
        """Return the newest checkpoint whose files have the content that was written.

        The ranks share the files among them, so that each is read once for its digest.
        """
        doing = f"looking for checkpoints in {self.folder}"
        while (found := self._ranks.on_rank_0(doing, self._newest)) is not None:
            checkpoint: Checkpoint = found
            mine = sorted(checkpoint.manifest.digests)[self._ranks.rank :: self._ranks.world_size]
            problems = self._ranks.do(doing, partial(checkpoint.damage, mine))
            problem = next(filter(None, problems), None)
            if problem is None:
                return checkpoint
            if self._ranks.rank == 0:
                folders.pass_over_damaged(checkpoint.path, problem, self._damaged)
        return None

    def _newest(self) -> Checkpoint | None:
        folders.remove_leftovers(self.folder)
        if self._mirror is not None:
            here = folders.whole(self.folder, self._damaged)
            newest = max(here, default=None)
            if (fetched := self._mirror.fetch_newer(newest, self._damaged_there)) is not None:
                self._damaged.pop(fetched, None)
        path = folders.latest(self.folder, self._damaged)
        return None if path is None else Checkpoint(path)

    def _wanted(self, states: Mapping[str, Stateful]) -> dict[str, Stateful]:
        return {name: state for name, state in states.items() if self._load.get(name, True)}

    def _rank_states_to_load(self, world_size: int) -> dict[str, Stateful]:
        wanted = self._wanted(self.rank_states)
        if world_size == self._ranks.world_size:
            return wanted
        if wanted and self._ranks.rank == 0:
            log.warning(
                "%s: saved by %d ranks and loaded by %d, so each rank keeps its own as it is",
                ", ".join(wanted),
                world_size,
                self._ranks.world_size,
            )
        return {}
