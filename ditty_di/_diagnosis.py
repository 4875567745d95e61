"""What a person is told about a configuration: what is wrong, which line said so, what differs."""

from __future__ import annotations

import functools
import importlib.resources
import os
import textwrap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from ditty_di._targets import SPECIAL, Signature, Slot, TargetError, locate

Place = tuple[Any, ...]  # the keys and indices from the root of the configuration


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration: `file:line: key: message`."""

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(Exception):
    """A configuration that cannot be used; one line for each of `problems`."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem("", problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class BuildError(ConfigError):
    """A node's constructor raised; `__cause__` is what it raised."""


def dotted(place: Place) -> str:
    """`("a", 0, "b")` as `a.0.b`, the spelling of the command line."""
    return ".".join(map(str, place))


def is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def keys(value: Any) -> Iterable[Any]:
    """The keys of a mapping or the indices of a list; nothing for a scalar."""
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()


# ------------------------------------------------------------------------------- what is wrong
@dataclass(frozen=True)
class Node:
    """A node that a root reaches. `arguments` are the nodes given to it: (parameter, key)."""

    key: str
    target: str
    partial: bool
    arguments: list[tuple[str, str]] = field(default_factory=list, compare=False)


@dataclass
class Checked:
    """What a check looked at: nodes by key in the order met, the protocol that each partial was
    bound against, and the nodes whose signature cannot be read."""

    nodes: dict[str, Node] = field(default_factory=dict)
    slots: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Checker:
    """Walks what a root reaches without building it. `imports` off, only the configuration itself
    is looked at: references, missing values, cycles."""

    def __init__(self, graph: Any, imports: bool = True) -> None:
        self.problems: dict[Problem, None] = {}  # a set that keeps its order
        self.checked = Checked()
        self._graph = graph
        self._imports = imports
        self._read: dict[Place, Signature | None] = {}
        self._trail: list[Place] = []
        self._plain: dict[Place, list[tuple[Place, str]]] = {}

    def _add(self, error: ConfigError) -> None:
        self.problems.update(dict.fromkeys(error.problems))

    def visit(
        self, place: Place, slots: Iterable[Slot] = ()
    ) -> tuple[Any, list[tuple[Place, str]]]:
        """Checks what is at a place: its value when that is a scalar, and the nodes found there:
        (where below `place`, key of the node)."""
        try:
            meant, value = self._graph.at(place)
        except ConfigError as error:
            self._add(error)
            return None, []
        if not isinstance(value, dict | list):
            return value, []
        if meant in self._trail:
            self._add(self._graph.cycle(self._trail, meant))
            return None, []
        if isinstance(value, dict) and is_node(value):
            self._node(meant, value, list(slots))
            return None, [((), dotted(meant))]
        if meant not in self._plain:
            self._plain[meant] = []
            self._trail.append(meant)
            for key in keys(value):
                below = self.visit((*meant, key))[1]
                self._plain[meant] += [((key, *at), node) for at, node in below]
            self._trail.pop()
        return None, self._plain[meant]

    def _node(self, place: Place, node: dict[Any, Any], slots: list[Slot]) -> None:
        first = place not in self._read
        if first:
            self._read[place] = self._head(place, node)
        signature = self._read[place]
        if signature is not None:
            self._bind(place, node, signature, slots)
        if first:
            self._trail.append(place)
            self._arguments(place, node, signature)
            self._trail.pop()

    def _head(self, place: Place, node: dict[Any, Any]) -> Signature | None:
        key = dotted(place)
        self.checked.nodes[key] = Node(key, str(node["_target_"]), False)
        try:
            target, partial = self._graph.head(place, node)
            self.checked.nodes[key] = Node(key, target, partial)
            return Signature(locate(target)) if self._imports else None
        except ConfigError as error:
            self._add(error)
        except TargetError as error:
            self._add(self._graph.error((*place, "_target_"), str(error)))
        except (ValueError, TypeError):  # inspect's way to say that there is no signature
            self.checked.unread.append(key)
        return None

    def _bind(
        self, place: Place, node: dict[Any, Any], signature: Signature, slots: list[Slot]
    ) -> None:
        known = self.checked.nodes[dotted(place)]
        names = [name for name in node if name not in SPECIAL]
        positional = len(self._graph.at((*place, "_args_"))[1]) if "_args_" in node else 0
        bind = functools.partial(signature.misfits, positional, names)
        found = bind(partial=known.partial)
        # a parameter may take several kinds of callable: the one that fits best is meant
        fits = sorted(
            ((bind(partial=True, slot=slot), slot) for slot in slots), key=lambda fit: len(fit[0])
        )
        hint = ""
        if fits and known.partial:
            found, slot = fits[0]
            self.checked.slots[known.key] = slot.protocol
        elif fits and not fits[0][0]:
            hint = "; write _partial_: true, for its slot gives the rest"
        for argument, message in found:
            text = f"{argument!r} {message}" if argument else f"it {message}{hint}"
            error = self._graph.error((*place, argument or "_target_"), f"{known.target}: {text}")
            self._add(error)

    def _arguments(self, place: Place, node: dict[Any, Any], signature: Signature | None) -> None:
        known = self.checked.nodes[dotted(place)]
        for name in node:
            given: list[tuple[Place, str | int, Place]] = []
            if name == "_args_":
                try:
                    meant, values = self._graph.at((*place, name))
                except ConfigError:
                    continue  # `head` has said so
                given = [((*meant, n), n, (name, n)) for n in keys(values)]
            elif name not in SPECIAL:
                given = [((*place, name), name, (name,))]
            for at, argument, called in given:
                value, below = self.visit(at, signature.slots(argument) if signature else ())
                known.arguments.extend((dotted((*called, *inner)), key) for inner, key in below)
                misread = signature.misread(argument, value) if signature else ""
                if misread:
                    message = f"{known.target}: {argument!r} {misread}"
                    self._add(self._graph.error(at, message))


# --------------------------------------------------------------------------- which line said so
class Setting(NamedTuple):
    """One place that gave a key its value, and, for a file, what made Hydra take that file."""

    where: str
    value: str
    chosen_by: str = ""


class Provenance:
    """Dotted key -> `file:line` or `command line 'lr=1'`; of the nearest key above when the key
    itself was set nowhere, `""` when there is none."""

    def __init__(self) -> None:
        self._settings: dict[str, list[Setting]] = {}

    def __call__(self, key: str) -> str:
        while key and key not in self._settings:
            key = key.rpartition(".")[0]
        return self._settings[key][-1].where if key else ""

    def history(self, key: str) -> list[Setting]:
        """Everything that set a key, in order: each overrides the one before."""
        return list(self._settings.get(key, ()))

    def _set(self, key: str, setting: Setting, replaces: bool) -> None:
        if replaces:  # a scalar or a list: what was below the key is gone
            below = f"{key}."
            for other in [k for k in self._settings if k.startswith(below)]:
                del self._settings[other]
        self._settings.setdefault(key, []).append(setting)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Provenance:
        """The lines of one YAML file."""
        with open(path, encoding="utf-8") as file:
            return cls().add_file(_label(path), file.read())

    def add_file(self, name: str, text: str, package: str = "", chosen_by: str = "") -> Provenance:
        """Adds what a YAML file says, at `package`; a defaults list says nothing."""
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(document, yaml.MappingNode):
            document.value = [(k, v) for k, v in document.value if k.value != "defaults"]
            if package:
                self._add_yaml(package, document, name, document.start_mark.line, chosen_by)
            else:
                self._add_below("", document, name, chosen_by)
        return self

    def _add_yaml(self, key: str, node: yaml.Node, name: str, line: int, chosen_by: str) -> None:
        text = textwrap.shorten(_flow(node), 80, placeholder=" ...")
        replaces = not isinstance(node, yaml.MappingNode)
        self._set(key, Setting(f"{name}:{line + 1}", text, chosen_by), replaces)
        self._add_below(key, node, name, chosen_by)

    def _add_below(self, key: str, node: yaml.Node, name: str, chosen_by: str) -> None:
        prefix = f"{key}." if key else ""
        if isinstance(node, yaml.MappingNode):
            for inner, value in node.value:
                if inner.tag == "tag:yaml.org,2002:merge":
                    merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for mapping in merged:
                        self._add_below(key, mapping, name, chosen_by)
                else:
                    line = inner.start_mark.line
                    self._add_yaml(f"{prefix}{inner.value}", value, name, line, chosen_by)
        elif isinstance(node, yaml.SequenceNode):
            for n, value in enumerate(node.value):
                self._add_yaml(f"{prefix}{n}", value, name, value.start_mark.line, chosen_by)

    def add_override(self, line: str, key: str, value: Any) -> None:
        """Adds an override of the command line; `value` None deletes the key."""
        where = f"command line {line!r}"
        text = line.partition("=")[2] if "=" in line else ""

        def add(key: str, value: Any, text: str) -> None:
            self._set(key, Setting(where, text), not isinstance(value, dict))
            inner = value.items() if isinstance(value, dict) else ()
            for name, below in enumerate(value) if isinstance(value, list) else inner:
                add(f"{key}.{name}", below, str(below))

        add(key, value, "(deleted)" if line.startswith("~") else text)


def provenance(config_name: str, overrides: list[str]) -> Provenance:
    """Where every key of a composed configuration was set, from the defaults list that Hydra itself
    computes. Hydra must be initialised, as it is for `compose(config_name, overrides)`."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader: Any = GlobalHydra.instance().config_loader()
    # a repository like the one that compose() makes, which knows hydra.searchpath too
    parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, overrides)
    listed = loader.compute_defaults_list(config_name, overrides, RunMode.RUN)
    typed = {o.get_key_element().lstrip("+"): f"command line {o.input_line!r}" for o in parsed}
    chosen = {
        key: _source(repository, data.containing_config_path)[0]
        for key, data in listed.overrides.override_metadata.items()
        if data.containing_config_path is not None
    } | typed
    found = Provenance()
    for default in listed.defaults:
        name, text = _source(repository, default.config_path)
        found.add_file(name, text, default.package or "", chosen.get(default.override_key, ""))
    for override in listed.config_overrides:
        found.add_override(override.input_line, override.key_or_group, override.value())
    return found


def _source(repository: Any, config_path: str) -> tuple[str, str]:
    """(name to show, text) of the file that Hydra takes for a configuration."""
    name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
    for source in repository.get_sources():
        if not source.is_config(config_path):
            continue
        if source.scheme() == "file":
            path = os.path.join(source.path, name)
            with open(path, encoding="utf-8") as file:
                return _label(path), file.read()
        if source.scheme() == "pkg":
            resource = importlib.resources.files(source.path).joinpath(name)
            return _label(str(resource)), resource.read_text(encoding="utf-8")
        return f"{source.full_path()}{config_path}", ""  # a structured config has no lines
    return config_path, ""


def _label(path: str | os.PathLike[str]) -> str:
    """A path as one would type it: relative when it lies below the working folder."""
    path = os.path.realpath(path)
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def _flow(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{k.value}: {_flow(v)}' for k, v in node.value)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_flow, node.value))}]"
    return str(node.value)


# --------------------------------------------------------------------------------- what differs
class _Absent:
    def __repr__(self) -> str:
        return "(not set)"


ABSENT = _Absent()


class Difference(NamedTuple):
    """A key with the values that two configurations give it; ABSENT where one has no such key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def flatten(cfg: Any) -> dict[str, Any]:
    """Dotted key -> scalar (or empty mapping or list). Of an OmegaConf configuration, what is
    written in it, interpolations as they are."""
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg

    def below(value: Any, place: Place) -> Iterator[tuple[str, Any]]:
        inside = keys(value)
        if not inside:
            yield dotted(place), value
        for key in inside:
            yield from below(value[key], (*place, key))

    return dict(below(plain, ())) if plain else {}


def difference(
    a: Any,
    b: Any,
    ignore: Collection[str] = (),
    only: Collection[str] | None = None,
) -> list[Difference]:
    """What differs from `a` to `b`, two configurations (see `flatten`).

    Args:
        ignore: keys, each with everything below it, that do not count.
        only: the keys that count (`Graph.reads(root)`); None for all.
    """
    old, new = flatten(a), flatten(b)
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key, ABSENT), new.get(key, ABSENT)
        same = was == now or (was != was and now != now)  # nan is nan
        counts = only is None or key in only
        if not same and counts and not any(f"{key}.".startswith(f"{p}.") for p in ignore):
            found.append(Difference(key, was, now))
    return found
