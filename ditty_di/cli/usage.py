"""Print `--help` from the configuration folders; imports nothing heavy."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ditty_di.cli import searchpath
from ditty_di.config import ConfigError

_TEXT = """\
ditty_di trains PyTorch models from a graph of constructors, written in YAML or typed here.

    python -m ditty_di [experiment=NAME] [task=TASK] [GROUP=CHOICE ...] [KEY=VALUE ...]

    python -m ditty_di                              the experiment 'pretrain': minutes on a CPU
    python -m ditty_di experiment=NAME max_steps=100    an experiment, with one value changed
    python -m ditty_di run=FOLDER                   resume a run
    python -m ditty_di run=FOLDER task=generate prompt="Once upon a time"
    python -m ditty_di task=check experiment=NAME   every error, before anything is built
    python -m ditty_di --multirun optimizer=adamw,sgd optimizer.lr=1e-3,3e-4
    python -m ditty_di launcher.nproc=2             two ranks on this machine
    python -m ditty_di --help optimizer             the choices of a group, with their keys

A task says what to do ('train' by default). run=FOLDER names the folder of a run; where it holds a
run already, its configuration is the base, and what is typed changes it. A new folder of that name
needs an experiment or another choice beside it.

{tasks}

Groups (GROUP=CHOICE sets the node GROUP, GROUP=null takes no choice, KEY=VALUE sets one value)
{groups}

Options
  --help GROUP         the choices of a group, and what their keys mean
  --cfg job            print the composed configuration (--resolve: with references replaced)
  --multirun, -m       one job for each combination of the values given with commas
  --config-dir FOLDER  a folder of your own configuration files; so is ./conf, which comes first
  --hydra-help         Hydra's own options
  debug=true           whole tracebacks
  allow_targets=[...]  targets that are refused otherwise, such as torch.load

A configuration is code, and so is a run folder: use only those you trust as you trust a program.

Completion in the shell: eval "$(ditty_di -sc install=bash)"   (or zsh, fish)
"""

_KEY = re.compile(r"(?P<indent>[ -]*)(?P<key>[\w.]+):(?P<value>.*?)\s+# (?P<comment>.*)")


def text(arguments: Sequence[str] = ()) -> str:
    """Return the help text, or that of a group which the arguments name.

    Args:
        arguments: of the command line; `--config-dir` among them adds its files to the lists.

    Raises:
        ConfigError: a word behind `--help` that is not a group.
    """
    folders = searchpath.folders(_config_dirs(arguments))
    groups = {
        name: choices
        for name, choices in searchpath.groups(folders).items()
        if not name.startswith("hydra")
    }
    if (named := _named_group(arguments)) is not None:
        return _group(named, groups, folders)
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


def _group(name: str, groups: dict[str, dict[str, str]], folders: Sequence[Path]) -> str:
    """Return the choices of a group with their first sentences, then the keys of each."""
    if name not in groups:
        raise ConfigError(
            f"--help {name}: there is no such group; write one of {', '.join(groups)}"
        )
    parts = [_described(f"{name}=CHOICE", groups[name])]
    for choice in groups[name]:
        keys = list(_keys(f"{name}/{choice}", folders))
        width = max((len(f"{key}{value}") for key, value, _ in keys), default=0)
        lines = [
            f"  {f'{key}{value}':{min(width, 40)}}  {comment}".rstrip()
            for key, value, comment in keys
        ]
        parts += ["\n".join([f"{name}={choice}", *lines])] if lines else []
    return "\n\n".join(parts)


def _keys(path: str, folders: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield (key with its indentation, `: value`, comment) of a file and of those it builds on."""
    file = next((f for d in folders if (f := d / f"{path}.yaml").is_file()), None)
    found: dict[str, tuple[str, str, str]] = {}
    content = file.read_text(encoding="utf-8") if file is not None else ""
    if base := re.search(r"^defaults: \[([\w/]+), _self_\]", content, re.MULTILINE):
        found = {k: (k, v, c) for k, v, c in _keys(f"{Path(path).parent}/{base[1]}", folders)}
    above: list[tuple[int, str]] = []
    for line in content.splitlines():
        if nested := re.match(r"([ -]*)([\w.]+):", line):
            indent = len(nested[1])
            above = [(n, key) for n, key in above if n < indent]
            dotted = ".".join([*(key for _, key in above), nested[2]])
            above.append((indent, nested[2]))
            if match := _KEY.match(line):
                value = f"={match['value'].strip()}" if match["value"].strip() else ""
                found[dotted] = (dotted, value, match["comment"])
    yield from found.values()


def _named_group(arguments: Sequence[str]) -> str | None:
    """Return the word behind `--help`, or before it: the group to describe."""
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--config-dir", "-cd", "--config-name", "-cn"):
            next(rest, None)
        elif argument.isidentifier():
            return argument
    return None


def _config_dirs(arguments: Sequence[str]) -> list[str]:
    folders = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, inline = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(inline if equals else value)
    return [folder for folder in folders if Path(folder).is_dir()]
