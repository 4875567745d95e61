"""Write one checkpoint, by all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint import space
from ditty_di.checkpoint.manifest import CheckpointError, Manifest, digest_of
from ditty_di.checkpoint.mirror import Mirror
from ditty_di.checkpoint.restricted import Reader
from ditty_di.checkpoint.retention import Retention
from ditty_di.checkpoint.serialization import Entries
from ditty_di.checkpoint.together import Together, without_stacks

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Writer:
    """Write checkpoints into a folder, and remove those that no rule keeps.

    Args:
        folder: the folder of checkpoints.
        ranks: which write together.
        keep: which checkpoints remain.
        damaged: checkpoints that are neither counted nor removed; one that is written again is
            taken out.
        mirror: gets each checkpoint; None on other ranks than 0.
        copy_ahead: bytes that are copied from the device before they are written.
    """

    folder: Path
    ranks: Together
    keep: Retention
    damaged: dict[Path, str]
    mirror: Mirror | None = None
    copy_ahead: int = 0

    def size_of(self, values: Iterable[Any]) -> int:
        """Return the bytes that this rank writes.

        Args:
            values: tensors and pickled entries.
        """
        return sum(space.size_of(value, first=self.ranks.rank == 0) for value in values)

    def write(self, step: int, entries: dict[str, Entries], objective: float | None) -> None:
        """Write the checkpoint of a step.

        Args:
            step: optimizer steps done.
            entries: by state and key.
            objective: see `Manifest`.

        Raises:
            CheckpointError: nothing was written; earlier checkpoints are as they were.
        """
        doing, start = f"saving step {step}", time.monotonic()
        try:
            self._write(step, doing, entries, objective)
        except CheckpointError as error:
            values = [value for state in entries.values() for value in state.values()]
            needed = sum(self.ranks.do(doing, lambda: self.size_of(values)))
            why = str(error)

            def explain() -> str | None:
                explanation = space.explained(why, self.folder, needed)
                folders.remove_leftovers(self.folder)
                return explanation

            explanation = self.ranks.on_rank_0(doing, explain)
            if explanation is None:
                raise
            raise CheckpointError(f"{doing} into {self.folder}: {explanation}") from error
        if self.ranks.rank == 0:
            log.info("saved step %d in %.1f s", step, time.monotonic() - start)

    def _write(
        self, step: int, doing: str, entries: dict[str, Entries], objective: float | None
    ) -> None:
        temporary = self.ranks.on_rank_0(doing, lambda: folders.start_saving(self.folder, step))
        writer = FileSystemWriter(temporary, sync_files=True, per_thread_copy_ahead=self.copy_ahead)
        with without_stacks(doing):
            save(entries, storage_writer=writer, process_group=self.ranks.group)
        # Each rank reads what it wrote itself: that is still in this machine's memory.
        own = f"__{self.ranks.rank}_*"
        of_ranks = self.ranks.do(
            doing, lambda: {file.name: digest_of(file) for file in temporary.glob(own)}
        )
        digests = {name: digest for one in of_ranks for name, digest in one.items()}
        self.ranks.on_rank_0(doing, lambda: self._commit(step, temporary, digests, objective))

    def _commit(
        self, step: int, temporary: Path, digests: dict[str, str], objective: float | None
    ) -> None:
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
            world_size=self.ranks.world_size,
            torch=torch.__version__,
            files=files,
            keys=sorted(metadata.state_dict_metadata),
            digests=digests,
            objective=objective,
        )
        checkpoint = folders.commit(temporary, self.folder, manifest)
        self.damaged.pop(checkpoint, None)
        mirror = self.mirror
        with mirror.lock if mirror else nullcontext():
            if self.keep.latest is not None:
                folders.prune(
                    self.folder,
                    keep=self.keep,
                    relied_on=checkpoint,
                    damaged=self.damaged,
                    in_use=mirror.sending if mirror else None,
                )
        if mirror:
            mirror.sync(checkpoint)
