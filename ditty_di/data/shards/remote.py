"""Shards in an object store: fetched whole into a cache when a row of them is read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from ditty_di.data.reading.file_cache import FileCache
from ditty_di.data.reading.remote import RemoteFile
from ditty_di.data.shards.files import MegatronFile
from ditty_di.data.shards.manifest import Shard
from ditty_di.data.shards.megatron import MegatronIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """A shard of a remote folder with a manifest.

    Attributes:
        url: The folder.
        shard: Its entry in the manifest.
        cache: Where it is fetched to.
    """

    url: str
    shard: Shard
    cache: FileCache

    @property
    def size(self) -> int:
        """Bytes of its tokens."""
        return self.shard.tokens * np.dtype(self.shard.dtype).itemsize

    @property
    def _files(self) -> tuple[RemoteFile, RemoteFile]:
        prefix = f"{self.url.rstrip('/')}/{self.shard.name}"
        return RemoteFile(f"{prefix}.idx", -1), RemoteFile(f"{prefix}.bin", self.size)

    def fetch(self, wait: bool = True) -> None:
        """Fetch the files where they are missing, and note that they are used.

        Args:
            wait: Wait for another process that fetches them.

        Raises:
            ValueError, OSError, ImportError: See `FileCache.held`.
        """
        (index, payload), digest = self._files, self.shard.sha256
        self.cache.fetch(index, key=digest, wait=wait)
        self.cache.fetch(payload, key=digest, sha256=digest, wait=wait)

    def __call__(self, path: Path) -> MegatronFile:
        """Open it, fetched where it is missing.

        Raises:
            ValueError, OSError, ImportError: See `FileCache.held`.
        """
        (index, payload), digest = self._files, self.shard.sha256
        with self.cache.held(index, key=digest) as copy:
            opened = MegatronIndex(copy)
        with self.cache.held(payload, key=digest, sha256=digest) as copy:
            return MegatronFile(copy.with_suffix(""), opened)


# A process must not be forked in the middle of a fetch: the child would wait for locks that the
# fetching thread holds.
_FETCHING = threading.Lock()
os.register_at_fork(
    before=_FETCHING.acquire,
    after_in_parent=_FETCHING.release,
    after_in_child=_FETCHING.release,
)


def fetch_ahead(shards: Sequence[RemoteShard]) -> None:
    """Fetch shards in the background, in their order, as many as the cache holds.

    Those that another process fetches are left to it.
    """
    sizes = accumulate(shard.size for shard in shards)
    held = [s for s, size in zip(shards, sizes, strict=True) if size <= s.cache.limit_gb * 1e9]

    def fetch() -> None:
        for shard in held:
            time.sleep(0.01)  # a fork may be waiting
            try:
                with _FETCHING:
                    shard.fetch(wait=False)
            except Exception as error:  # reading a row of it fails too, and says so
                log.debug("%s: %s", shard.shard.name, error)
                return

    if held:
        threading.Thread(target=fetch, daemon=True, name="fetch ahead").start()


def require_pool(shards: Sequence[RemoteShard], pool: int) -> None:
    """Raise `ValueError` unless the cache holds any `pool` of the shards."""
    if not shards:
        return
    needed = sum(sorted((shard.size for shard in shards), reverse=True)[:pool]) / 1e9
    limit = shards[0].cache.limit_gb
    if needed > limit:
        raise ValueError(
            f"{shards[0].url}: the rows of {min(pool, len(shards))} shards are shuffled together, "
            f"up to {needed:.3g} GB, and the cache has limit_gb={limit:g}: raise it, or lower the "
            "sampler's pool"
        )
