"""The command line: `python -m ditty_di [TASK AND OVERRIDES]`.

    arguments -> Hydra composes -> job.execute: check, run directory, launch -> exit code

Exit codes: 0 finished or stopped in good order; 1 the job failed; 2 it could not be started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ditty_di.console import quiet_imports
from ditty_di.launch import torchrun
from ditty_di.launch.local import limit_spinning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: what was typed after `python -m ditty_di`; None reads `sys.argv`.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    quiet_imports()
    limit_spinning()
    if not {"", os.getcwd()} & set(sys.path):  # as `python -m` does: the user's modules here
        sys.path.insert(0, os.getcwd())
    try:
        if {"--help", "-h"} & set(arguments):
            from ditty_di.cli import usage
            from ditty_di.config import ConfigError

            try:
                print(usage.text(arguments))
            except ConfigError as error:
                print(error, file=sys.stderr)
                return 2
            return 0
        return torchrun.run(arguments, start) if torchrun.is_parent() else start(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def start(arguments: Sequence[str], launcher: Callable[[str], int] | None = None) -> int:
    """Compose a command and run its job; print an error that prevents it as one message.

    Args:
        arguments: the command line.
        launcher: used instead of the configuration's launcher.

    Returns:
        The exit code.
    """
    from ditty_di.cli.command import Command, parse

    command = Command()
    try:
        command = parse(arguments)

        from ditty_di.cli import composing
        from ditty_di.cli.job import execute
        from ditty_di.config import ConfigError
        from ditty_di.sweeps import parallel

        if composing.asks_for_sweep(command):
            if launcher is not None:
                raise ConfigError(torchrun.refused_sweep(arguments))
            return parallel.run(command if command.sweep else parse([*arguments, "--multirun"]))
        return composing.run(command, lambda config: execute(config, command, launcher)) or 0
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or "debug=true" in command.overrides:
            raise
        from ditty_di.cli import hints

        print(hints.explain(error, command), file=sys.stderr)
        return 2


if __name__ == "__main__":
    from ditty_di.launch.worker import leave, own_process

    own_process()
    leave(main())
