"""A rank of a tokenization, as a process of its own."""

from __future__ import annotations

import resource
import signal
import sys
import time
from functools import partial

from transformers import PreTrainedTokenizerFast

from ditty_di.data.tokenization import Pool, TextFiles
from ditty_di.data.tokenization.part import run_part
from ditty_di.tasks import tokenize as task


def slow_part(job, part, seconds):
    """Take a moment, to be killed in."""
    time.sleep(seconds)
    return run_part(job, part)


def main(corpus, folder, tokenizer, workers, slow, largest_file):
    if int(largest_file) >= 0:  # writes fail as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest_file), int(largest_file)))
    if float(slow):
        task.run_part = partial(slow_part, seconds=float(slow))
    task.tokenize(
        PreTrainedTokenizerFast.from_pretrained(tokenizer),
        folder,
        TextFiles(corpus),
        engine=Pool(workers=int(workers)),
        part_mb=0.01,
        report_mb=0,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
