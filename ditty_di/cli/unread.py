"""Find keys that a user set and nothing reads: most of them are misspelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from ditty_di.cli import searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, without
from ditty_di.config import ConfigError, Graph, Problem, Provenance, Setting, flatten
from ditty_di.config.errors import prefixes
from ditty_di.config.provenance import label
from ditty_di.config.suggest import suggest

# What a job reads of a configuration: what its task and its launcher reach, and its own keys.
_ROOTS = (
    *("task", "launcher", "trainer", "run", "name", "debug", "load", "resume.allow"),
    *("resume.ignore", "allow_unread", "allow_targets"),
)
_TYPED = "command line "


def problems(graph: Graph, config: DictConfig, command: Command) -> list[Problem]:
    """Return a problem for every key that the user set and nothing reads.

    The user's keys are those on the command line or in files of their own; when a run goes on, only
    those typed now. A key is read when a task of this configuration or the launcher reaches it. A
    key of a file may be one that the shipped files know and that only other choices read; a typed
    one must have an effect. The primary configuration declares its keys. Keys listed in
    `allow_unread`, with all below them, are left alone.
    """
    read = _read(graph)
    allowed = graph.build("allow_unread") or () if "allow_unread" in config else ()
    suspicious: dict[str, Setting] = {}
    for key, value in flatten(config).items():
        if key not in read and not any(f"{key}.".startswith(f"{a}.") for a in allowed):
            setting = _users_setting(graph, command, key)
            # a group's choice that sets a key to null cannot be meant to have an effect
            if setting is not None and not (setting.chosen_by and value is None):
                suspicious[key] = setting
    others = _other_tasks(config, command)
    while suspicious.keys() - read and (other := next(others, None)) is not None:
        read |= _read(other)
    if not suspicious.keys() - read:
        return []
    declared, primary = _declared(command)
    reached = {above for key in read for above in prefixes(key)}
    known = reached | {above for key in declared | primary for above in prefixes(key)}
    found: dict[str, Problem] = {}
    for key, setting in suspicious.items():
        typed = setting.where.startswith(_TYPED)
        if key in read or key in primary or (key in declared and not typed):
            continue
        top = key.partition(".")[0]
        if not setting.chosen_by:
            top = next((above for above in prefixes(key) if above not in known), key)
            found.setdefault(top, _problem(graph, top, setting, read))
        elif top not in reached:
            message = "nothing reads this choice: " + _why_unread(graph, top, command)
            found.setdefault(top, Problem(top, message, setting.where))
    return list(found.values())


def _users_setting(graph: Graph, command: Command, key: str) -> Setting | None:
    """Return the user's setting of a key; with `chosen_by`, their choice of the file that did it.

    None when the key has its value from elsewhere.
    """
    shipped = label(searchpath.conf_dir())

    def users(where: str) -> bool:
        if where.startswith(_TYPED):
            return where in {f"{_TYPED}{o!r}" for o in command.typed}
        own = not where.startswith(f"{shipped}/") or where.startswith(f"{shipped}/experiment/")
        return bool(where) and own and not command.earlier

    history = graph.history(key) or [Setting(graph.where(key), "")]
    where, value, choice = history[-1]
    if users(where):
        return Setting(where, value)
    group = choice.removeprefix(_TYPED).strip("'").partition("=")[0].lstrip("+")
    if choice.startswith(_TYPED) and users(choice) and f"{key}.".startswith(f"{group}."):
        return Setting(choice, value, choice)
    return None


def _why_unread(graph: Graph, top: str, command: Command) -> str:
    for override in command.typed:
        for above in prefixes(key_of(override)):
            if any(setting.value == f"${{{top}}}" for setting in graph.history(above)):
                instead = top + key_of(override).removeprefix(above)
                return f"{override!r} replaced {above}=${{{top}}}; write +{instead}=..."
    return "the other choices do not refer to it"


def _problem(graph: Graph, top: str, setting: Setting, read: set[str]) -> Problem:
    where = graph.where(top) or setting.where
    file = where.rpartition(":")[0]
    if not where.startswith(_TYPED) and top in Path(file).parts[:-1]:
        message = (
            f"nothing reads the keys of this file, which are all below {top!r}; to set those of "
            "the whole configuration, make its first line: # @package _global_"
        )
        return Problem(top, message, file)
    meant = f"; if it is meant to be there, add: allow_unread: [{top}]"
    return Problem(top, f"nothing reads this key{suggest(top, read)}{meant}", where)


def _read(graph: Graph) -> set[str]:
    found: set[str] = set()
    for root in _ROOTS:
        try:
            found |= graph.reads(root)
        except ConfigError:  # the key does not exist
            continue
    return found


def _other_tasks(config: DictConfig, command: Command) -> Iterator[Graph]:
    """Yield the configuration as the other tasks would have it, if it composes."""
    folders = searchpath.folders(command.config_dirs)
    groups = searchpath.groups(folders)
    written: Any = OmegaConf.to_container(config)
    kept = [
        o if o[0] in "+~" or key_of(o).partition("@")[0] in groups or "=" not in o else f"++{o}"
        for o in without(command.overrides, "task")
    ]
    for name in sorted(groups.get("task", {}), key=lambda name: name != "train"):  # reads most
        file = next(f for d in folders if (f := d / "task" / f"{name}.yaml").is_file())
        try:
            task: Any = OmegaConf.to_container(OmegaConf.load(file))
            package = _package(file.read_text(encoding="utf-8"), "task")
            if "defaults" in task or package not in ("", "task"):
                yield Graph(compose(command.config_name, [*kept, f"task={name}"]))
            else:  # the same, in a tenth of the time
                task = task if package == "" else {"task": task}
                yield Graph({**task, **written, "task": task.get("task")})
        except Exception:
            continue


def _declared(command: Command) -> tuple[set[str], set[str]]:
    """Return the keys that shipped files set, each at its package, and those of the primary file.

    An experiment declares nothing: in a checkout, those of the user lie beside the shipped ones.
    """
    shipped = searchpath.conf_dir()
    files = [f for f in shipped.rglob("*.yaml") if f.parent.name != "experiment"]
    primary = (d / f"{command.config_name}.yaml" for d in searchpath.folders(command.config_dirs))
    first = next((file for file in primary if file.is_file()), None)
    declared = {key for file in files for key in _keys(file, shipped)}
    return declared, _keys(first, first.parent) if first else set()


def _keys(file: Path, folder: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    package = _package(text, ".".join(file.relative_to(folder).parent.parts))
    return set(Provenance().add_file("", text, package).keys())


def _package(text: str, group: str) -> str:
    """Return where the keys of a file go by its header: a dotted key, "" for the top."""
    header = text.partition("\n")[0].split()
    if header[:2] != ["#", "@package"] or len(header) < 3:
        return group
    return header[2].replace("_global_", "").replace("_group_", group).strip(".")
