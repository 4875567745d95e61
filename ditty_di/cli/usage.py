"""Print `--help` from the configuration folders; imports nothing heavy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ditty_di.cli import searchpath

_TEXT = """\
ditty_di trains PyTorch models from a graph of constructors, written in YAML or typed here.

    python -m ditty_di [+experiment=NAME] [task=TASK] [GROUP=CHOICE ...] [KEY=VALUE ...]

    python -m ditty_di                              the experiment 'pretrain': minutes on a CPU
    python -m ditty_di +experiment=NAME steps=100   an experiment, with one value changed
    python -m ditty_di run=FOLDER                   go on where that run stopped
    python -m ditty_di run=FOLDER task=generate prompt="Once upon a time"
    python -m ditty_di task=check +experiment=NAME  what is wrong, before anything is built
    python -m ditty_di --multirun optimizer=adamw,sgd optimizer.lr=1e-3,3e-4
    python -m ditty_di launcher.nproc=2             two ranks on this machine

A task says what to do ('train' when none is given). run=FOLDER names a run's directory; where
it holds a run already, that run's configuration is the base, and what is typed changes it. A new
directory of that name needs an experiment or another choice beside it.

{tasks}

Groups (GROUP=CHOICE replaces the whole node, KEY=VALUE one argument of it)
{groups}

Options
  --cfg job            print the composed configuration (--resolve: with references replaced)
  --multirun, -m       one job for each combination of the values given with commas
  --config-dir FOLDER  a folder of your own configuration files; so is ./conf, which comes first
  --hydra-help         Hydra's own options
  debug=true           whole tracebacks
  allow_targets=[...]  targets that are refused otherwise, such as torch.load

A configuration is code, and so is a run folder: use only those you trust as you trust a program.

Completion in the shell: eval "$(ditty_di -sc install=bash)"   (or zsh, fish)
"""


def text(arguments: Sequence[str] = ()) -> str:
    """Return the help text; a `--config-dir` among the arguments adds its files to the lists."""
    folders = searchpath.folders(_config_dirs(arguments))
    groups = {
        name: choices
        for name, choices in searchpath.groups(folders).items()
        if not name.startswith("hydra")
    }
    lists = {"Tasks": "task", "Experiments": "experiment"}
    described = [_described(title, groups.pop(name, {})) for title, name in lists.items()]
    width = max(map(len, groups), default=0)
    lines = [
        textwrap.fill(
            f"  {name:{width}}  {', '.join(choices)}", 100, subsequent_indent=" " * (width + 4)
        )
        for name, choices in groups.items()
    ]
    return _TEXT.format(tasks="\n\n".join(described), groups="\n".join(lines)).rstrip()


def _described(title: str, choices: dict[str, str]) -> str:
    width = max(map(len, choices), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {why}" for name, why in choices.items())])


def _config_dirs(arguments: Sequence[str]) -> list[str]:
    folders = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, inline = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(inline if equals else value)
    return [folder for folder in folders if Path(folder).is_dir()]
