"""Progress of a tokenization over all who work on it, read from the sizes of its files."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ditty_di.data.tokenization.finish import missing
from ditty_di.data.tokenization.plan import Part
from ditty_di.data.tokenization.ranks import file_sizes
from ditty_di.messages import readable

#: Seconds between the first two messages, and the most between any two.
SECONDS = (10.0, 60.0)
#: A shard that is being written, see `ditty_di.io.replacing`.
_BEING_WRITTEN = re.compile(r"\.\w+-(\d+)\.bin\.\w+")


@contextmanager
def progress(
    title: str,
    folder: Path,
    parts: Sequence[Part],
    dtype: np.dtype,
    bytes_per_token: float,
    seconds: tuple[float, float] = SECONDS,
) -> Iterator[None]:
    """Print within the context, now and then, how much text is done, how fast, and what is left.

    Args:
        title: Name of the text.
        folder: Folder of the shards.
        parts: All parts.
        dtype: Type of the token ids.
        bytes_per_token: Of the text, an estimate, by which parts that are not finished count.
        seconds: Between the first two messages, and the most between any two; each interval is
            twice the one before.
    """
    stopped = threading.Event()

    def watch() -> None:
        interval, longest = seconds
        total = sum(part.size for part in parts)
        begun = _done(folder, parts, dtype, bytes_per_token)
        started = time.monotonic()
        while not stopped.wait(interval):
            interval = min(2 * interval, longest)
            done = _done(folder, parts, dtype, bytes_per_token)
            speed = (done - begun) / (time.monotonic() - started)
            left = f", about {_duration((total - done) / speed)} left" if speed > 0 else ""
            print(
                f"{title}: {done / max(total, 1):.0%}, {readable(done)} of {readable(total)}, "
                f"{speed / 1e6:.2f} MB/s{left}",
                flush=True,
            )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _done(folder: Path, parts: Sequence[Part], dtype: np.dtype, bytes_per_token: float) -> int:
    """Return the bytes of text that are tokenized, about."""
    left = {*missing(folder, parts)}
    written = dict.fromkeys(left, 0)
    for name, size in file_sizes(folder).items():
        if (found := _BEING_WRITTEN.fullmatch(name)) and int(found[1]) in written:
            written[int(found[1])] += size
    each = bytes_per_token / dtype.itemsize
    return sum(
        min(part.size, int(written[part.number] * each)) if part.number in left else part.size
        for part in parts
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
