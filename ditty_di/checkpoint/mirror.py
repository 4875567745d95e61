"""Copy the checkpoints of a folder to an object store while training goes on, and fetch them."""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from pathlib import Path
from threading import Condition, RLock, Thread

from ditty_di.checkpoint import folder as folders
from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.manifest import MANIFEST, CheckpointError
from ditty_di.checkpoint.remote import UPLOADING, RemoteCheckpoint, RemoteFolder, patiently
from ditty_di.checkpoint.retention import Retention

log = logging.getLogger(__name__)

#: Seconds before another attempt after the first failure; doubled with each, up to the second.
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
#: At the end of the run: seconds without a byte sent, and failures, after which it is given up.
#: A store's client may report a byte only when it has sent some hundred megabytes.
_PATIENCE, _LAST_ATTEMPTS = 300.0, 5


class Mirror:
    """Make a remote folder hold what a local one holds, in a thread of one process.

    The newest checkpoint goes first. A failure is logged once, then attempts go on until one
    succeeds; what the remote folder has stays as it is meanwhile. Old checkpoints are removed there
    by the same rules as here.

    Args:
        folder: the folder of checkpoints; this process alone writes there.
        url: the remote folder, for this run only.
        keep: which checkpoints remain.
        damaged: local checkpoints that are not sent.

    Attributes:
        lock: held while checkpoints of the folder are removed, or the next to send is chosen.
        sending: the checkpoint that is being sent, which must not be removed.
    """

    def __init__(
        self, folder: Path, url: str, *, keep: Retention, damaged: Container[Path] = ()
    ) -> None:
        self.folder, self.remote, self.keep, self.damaged = folder, RemoteFolder(url), keep, damaged
        self.lock = RLock()
        self.sending: Path | None = None
        self._written: Path | None = None
        self._changed = Condition()
        self._asked = self._done = self._failures = 0
        self._problem: str | None = None
        self._moved_at = 0.0
        self._closing = self._hurry = self._running = False
        self._thread: Thread | None = None

    # -- sending ------------------------------------------------------------------------------

    def sync(self, written: Path | None = None) -> None:
        """Send, in the background, what the remote folder lacks.

        Args:
            written: the checkpoint that was just written, which counts as the newest.
        """
        with self._changed:
            self._written = written or self._written
            self._asked += 1
            self._closing = False
            self._changed.notify_all()
            if not self._running:
                # A daemon: a process that ends must not wait for a store that does not answer.
                self._thread = Thread(target=self._run, name="checkpoint-mirror", daemon=True)
                self._running = True
                self._thread.start()

    def close(self) -> None:
        """Wait until all is sent; log what is not, if the store does not take it."""
        self._moved()
        with self._changed:
            if self._done < self._asked:
                log.info("waiting until the checkpoints are in %s ...", self.remote.url)
            self._closing = self._hurry = True
            self._failures = 0
            self._changed.notify_all()
            while self._done < self._asked and self._failures < _LAST_ATTEMPTS:
                left = self._moved_at + _PATIENCE - time.monotonic()
                if left < 0:
                    break
                self._changed.wait(min(left, 1.0) + 0.01)
            lacks = self._done < self._asked
            self._asked = self._done  # nothing is left to do for the thread
            self._changed.notify_all()
        if lacks:
            log.error(
                "%s lacks the newest checkpoints (%s); they are in %s, and the next start of the "
                "run sends them",
                self.remote.url,
                self._problem or f"no byte was taken for {_PATIENCE:g} s",
                self.folder,
            )
        elif self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._asked > self._done)
                asked = self._asked
                if asked <= self._done:
                    self._running = False
                    return
                self._hurry = False
            try:
                self._send_all()
            except Exception as error:
                self._failed(error)
                continue
            with self._changed:
                if self._problem is not None:
                    log.info("checkpoints are in %s again", self.remote.url)
                self._done, self._failures, self._problem = max(asked, self._done), 0, None
                self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        """Log the first failure in a row, and wait before the next attempt."""
        known = isinstance(error, OSError | ImportError | ValueError | CheckpointError)
        problem = str(error) if known else f"{type(error).__name__}: {error}"
        with self._changed:
            first, self._problem = self._problem is None, problem
            self._failures += 1
            self._changed.notify_all()
            if first:
                log.warning(
                    "checkpoints cannot be copied to %s: %s; training goes on, and so do attempts",
                    self.remote.url,
                    problem,
                )
            delay = min(_FIRST_DELAY * 2 ** (self._failures - 1), _LONGEST_DELAY)
            self._changed.wait_for(lambda: self._hurry, delay)

    def _send_all(self) -> None:
        try:
            whole = self.remote.whole()
            while (checkpoint := self._next(whole)) is not None:
                start = time.monotonic()
                sent = self.remote.send(checkpoint.path, checkpoint.manifest, self._moved)
                log.info(
                    "copied step %d to %s in %.1f s (%d files)",
                    checkpoint.step,
                    self.remote.url,
                    time.monotonic() - start,
                    sent,
                )
                whole = self.remote.whole()
        finally:
            self.sending = None
        for found in whole.values():
            if UPLOADING in found.files:  # of an upload that was killed at its end
                self.remote.remove({UPLOADING: found.files[UPLOADING]})
        self._prune(whole)

    def _next(self, whole: dict[int, RemoteCheckpoint]) -> Checkpoint | None:
        """Choose the newest checkpoint that the remote folder lacks, and keep it from removal."""
        with self.lock:
            here = folders.whole(self.folder, self.damaged)
            for step, checkpoint in sorted(here.items(), reverse=True):
                there = whole.get(step)
                if there is None or there.manifest != checkpoint.manifest:
                    self.sending = checkpoint.path
                    return checkpoint
            self.sending = None
            return None

    def _prune(self, whole: dict[int, RemoteCheckpoint]) -> None:
        """Remove what no rule keeps and this machine does not have, and halves that are older."""
        if not whole or self.keep.latest is None:
            return
        objectives = {step: found.manifest.objective for step, found in whole.items()}
        with self.lock:
            if self._written is not None:  # now that none is being sent
                folders.prune(
                    self.folder, keep=self.keep, relied_on=self._written, damaged=self.damaged
                )
            here = folders.whole(self.folder, self.damaged).keys()
        kept = self.keep.kept(objectives) | here
        for step, files in self.remote.found().items():
            if step not in kept and (step in whole or step < max(whole)):
                self.remote.remove(files)
                self._moved()

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    # -- fetching -----------------------------------------------------------------------------

    def fetch_newer(self, newest: int | None, damaged: dict[str, str]) -> Path | None:
        """Fetch the newest remote checkpoint into the folder, if it is newer than what is there.

        It takes the place of a damaged one of its step.

        Args:
            newest: step of the newest whole checkpoint in the folder; None without any.
            damaged: remote checkpoints to pass over, and why; those that turn out to be damaged
                are added.

        Returns:
            The path of what was fetched; None if nothing was.

        Raises:
            CheckpointError: there is nothing else to go on from, and the store cannot be read, or
                has damaged checkpoints alone; or the disk is full.
        """
        problems: dict[int, str] = {}
        try:
            found = patiently(self.remote.found)
            whole = patiently(lambda: self.remote.whole(found, problems))
            for step, checkpoint in sorted(whole.items(), reverse=True):
                if newest is not None and step <= newest:
                    return None
                if checkpoint.url in damaged:
                    continue
                try:
                    return self._fetch(step, checkpoint)
                except CheckpointError as error:
                    log.warning("passing over a checkpoint that is damaged: %s", error)
                    damaged[checkpoint.url] = str(error)
        except (OSError, ImportError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise CheckpointError(f"{self.folder}: {error.strerror}") from error
            if newest is None:
                raise CheckpointError(
                    f"checkpoint.mirror: whether this run has checkpoints to go on from is not "
                    f"known: {error}; checkpoint.mirror=null does without"
                ) from error
            log.warning(
                "going on from step %d in %s; whether %s has a newer one is not known: %s",
                newest,
                self.folder,
                self.remote.url,
                error,
            )
            return None
        # One without a manifest is an upload that was cut short, and no reason to stop.
        lost = [*damaged.values(), *(p for step, p in problems.items() if MANIFEST in found[step])]
        if newest is None and lost:
            raise CheckpointError(
                f"no checkpoint is whole: {lost[0]}; remove it to start anew, or give another "
                f"checkpoint.mirror"
            )
        return None

    def _fetch(self, step: int, checkpoint: RemoteCheckpoint) -> Path:
        log.info("fetching %s, which is newer than what %s has", checkpoint.url, self.folder)
        temporary = folders.start_saving(self.folder, step)
        checkpoint.fetch(temporary)
        return folders.rename(temporary, self.folder, step)
