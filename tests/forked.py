"""Command lines in forked processes, which need not import torch and the package again."""

import multiprocessing
import os
import sys

from ditty_di.__main__ import main


def _run(folder, arguments):
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main(list(arguments)))


def ditty_di(folder, *arguments):
    """Run a command line in a folder, and return the text that it printed."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(folder, arguments))
    child.start()
    child.join(300)
    child.kill()
    child.join()
    printed, errors = ((folder / name).read_text() for name in ("stdout", "stderr"))
    assert child.exitcode == 0, printed + errors
    return printed
