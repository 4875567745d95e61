"""Keys that a user set and nothing reads: most of them are misspelt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditty_di.cli import searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, without
from ditty_di.config import ConfigError, Graph, Problem, Provenance, Setting, flatten
from ditty_di.config.provenance import label
from ditty_di.config.suggest import suggest

#: What a job reads of a configuration, beside what its task and its launcher reach.
_JOB = (
    *("run", "name", "debug", "load", "resume.allow", "resume.ignore", "allow_unread"),
    "allow_targets",
)
_ROOTS = ("task", "launcher", "trainer", *_JOB)
_TYPED = "command line "


def problems(graph: Graph, config: DictConfig, command: Command) -> list[Problem]:
    """Every key that the user set, on the command line or in files of their own, and that nothing
    reads: no task of this configuration, no launcher, and no reference in what they reach.

    A key of a file may be one that the shipped files know and that only other choices read; a typed
    one must have an effect. The primary configuration declares its keys. Keys listed in
    `allow_unread`, with all below them, are left alone. When a run goes on, only what was typed now
    is looked at.
    """
    told = _Told(graph, command)
    read = _read(graph)
    values = flatten(config)
    suspicious = {
        key: setting
        for key, value in values.items()
        if key not in read and (setting := told.by_user(key, value, read)) is not None
    }
    allowed = graph.build("allow_unread") if "allow_unread" in config else ()
    suspicious = {k: s for k, s in suspicious.items() if not _below(k, allowed or ())}
    others = _other_tasks(config, command)
    while suspicious.keys() - read and (other := next(others, None)) is not None:
        read |= _read(other)
    if not suspicious.keys() - read:
        return []
    declared, primary = _declared(command)
    reached = _with_parents(read)
    slots = reached | _with_parents(declared | primary)
    found: dict[str, Problem] = {}
    for key, setting in suspicious.items():
        typed = setting.where.startswith(_TYPED)
        if key in read or key in primary or (key in declared and not typed):
            continue
        if setting.chosen_by:  # a choice of a whole group
            top = key.partition(".")[0]
            if top not in reached:
                message = "nothing reads this choice: the other choices do not refer to it"
                found.setdefault(top, Problem(top, message, setting.where))
            continue
        top = next((p for p in _prefixes(key) if p not in slots), key)
        found.setdefault(top, _problem(graph, top, setting, read))
    return list(found.values())


class _Told:
    """Which settings are the user's."""

    def __init__(self, graph: Graph, command: Command) -> None:
        self._graph = graph
        shipped = label(searchpath.conf_dir())
        self._shipped, self._experiments = f"{shipped}/", f"{shipped}/experiment/"
        self._typed = {f"{_TYPED}{o!r}" for o in command.typed}
        self._earlier = command.earlier

    def by_user(self, key: str, value: Any, read: set[str]) -> Setting | None:
        """The user's setting that gave a key its value, or chose the file that did."""
        setting = next(iter(self._graph.history(key)[-1:]), None)
        setting = setting or Setting(self._graph.where(key), "")
        if self._is_users(setting.where):
            return setting._replace(chosen_by="")
        chose = setting.chosen_by
        group = chose.removeprefix(_TYPED).strip("'").partition("=")[0].lstrip("+")
        whole = key == group or key.startswith(f"{group}.")
        if value is not None and whole and chose.startswith(_TYPED) and self._is_users(chose):
            return setting._replace(where=chose)
        return None

    def _is_users(self, where: str) -> bool:
        if where.startswith(_TYPED):
            return where in self._typed
        own = not where.startswith(self._shipped) or where.startswith(self._experiments)
        return bool(where) and not self._earlier and own


def _problem(graph: Graph, top: str, setting: Setting, read: set[str]) -> Problem:
    where = graph.where(top) or setting.where
    file = where.rpartition(":")[0]
    if not where.startswith(_TYPED) and top in Path(file).parts[:-1]:
        message = (
            f"nothing reads the keys of this file, which are all below {top!r}; to set those of "
            "the whole configuration, make its first line: # @package _global_"
        )
        return Problem(top, message, file)
    hint = suggest(top, read) or f"; if it is meant to be there, add: allow_unread: [{top}]"
    return Problem(top, f"nothing reads this key{hint}", where)


def _read(graph: Graph) -> set[str]:
    found: set[str] = set()
    for root in _ROOTS:
        try:
            found |= graph.reads(root)
        except ConfigError:  # the key does not exist
            continue
    return found


def _other_tasks(config: DictConfig, command: Command) -> Iterator[Graph]:
    """The configuration as the other tasks would have it; what does not compose is left out."""
    folders = [*searchpath.user_dirs(command.config_dirs), searchpath.conf_dir()]
    groups = searchpath.groups(folders)
    written = OmegaConf.to_container(config, resolve=False)
    assert isinstance(written, dict)
    for task in sorted(groups.get("task", {}), key=lambda task: task != "train"):  # reads most
        file = next(f for d in folders if (f := d / "task" / f"{task}.yaml").is_file())
        try:
            yield _with_task(written, file) or _composed(command, groups, task)
        except Exception:
            continue


def _with_task(written: dict[Any, Any], file: Path) -> Graph | None:
    """A configuration with another file of the group `task`, which takes a tenth of composing it;
    None for a file that must be composed."""
    task = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    package = _package(file.read_text(encoding="utf-8"), "task")
    if not isinstance(task, dict) or "defaults" in task or package not in ("", "task"):
        return None
    task = task if package == "" else {"task": task}
    return Graph({**task, **written, "task": task.get("task")})


def _composed(command: Command, groups: Collection[str], task: str) -> Graph:
    from hydra import compose

    kept = [
        o if o[0] in "+~" or key_of(o).partition("@")[0] in groups or "=" not in o else f"++{o}"
        for o in without(command.overrides, "task")
    ]
    return Graph(compose(command.config_name, [*kept, f"task={task}"]))


def _declared(command: Command) -> tuple[set[str], set[str]]:
    """Keys that shipped files write, each at its package, and those of the primary file.

    An experiment declares nothing: in a checkout, those of the user lie beside the shipped ones.
    """
    shipped = searchpath.conf_dir()
    folders = [*searchpath.user_dirs(command.config_dirs), shipped]
    primary = next((f for d in folders if (f := d / f"{command.config_name}.yaml").is_file()), None)
    files = (f for f in shipped.rglob("*.yaml") if f.parent.name != "experiment")
    declared: set[str] = set().union(*(_keys(file, shipped) for file in files))
    return declared, _keys(primary, primary.parent) if primary else set()


def _keys(file: Path, folder: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    package = _package(text, ".".join(file.relative_to(folder).parent.parts))
    return set(Provenance().add_file("", text, package).keys())


def _package(text: str, group: str) -> str:
    """Where the keys of a file of a group go, by its header: a dotted key, "" for the top."""
    header = text.partition("\n")[0].split()
    if header[:2] != ["#", "@package"] or len(header) < 3:
        return group
    return header[2].replace("_global_", "").replace("_group_", group).strip(".")


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _with_parents(keys: Iterable[str]) -> set[str]:
    return {prefix for key in keys for prefix in _prefixes(key)}


def _below(key: str, above: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{a}.") for a in above)
