"""The object graph of a configuration: which node is which object, checked first, built once.

The only part that knows OmegaConf; Hydra has composed the configuration before it comes here. A
node is a mapping with a `_target_` (and `_partial_`, `_args_`, as in Hydra). An interpolation to a
node *is* that node's object: identity is the path in the configuration, within one `Graph`. Nothing
is built, and no interpolation resolved, before something that is asked for reaches it.
"""

from __future__ import annotations

import enum
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditty_di._graph import early
from ditty_di._graph.checking import Checked, Checker, Node
from ditty_di._graph.differences import ABSENT, Difference, difference, flatten
from ditty_di._graph.early import View
from ditty_di._graph.errors import BuildError, ConfigError, Place, Problem, dotted, is_node, keys
from ditty_di._graph.provenance import Provenance, Setting, provenance
from ditty_di._graph.refused import identities, is_refused_object, refusal, unsafe_argument
from ditty_di._graph.signatures import Signature
from ditty_di._graph.targets import SPECIAL, TargetError, did_you_mean, locate

__all__ = [
    "ABSENT",
    "BuildError",
    "Checked",
    "ConfigError",
    "Difference",
    "Graph",
    "Node",
    "Problem",
    "Provenance",
    "Setting",
    "View",
    "difference",
    "flatten",
    "provenance",
]

_NAME = r"""[^\\{}()\[\]:.$\s'"]+"""
_REFERENCE = re.compile(  # ${a.b}, ${a[0]}, ${.sibling}, ${..uncle}
    rf"\$\{{\s*(?P<dots>\.*)"
    rf"(?P<path>(?:{_NAME}|\[{_NAME}\])(?:\.{_NAME}|\[{_NAME}\])*)\s*\}}"
)
_RESOLVER = re.compile(r"\$\{[\w.]+:")


class Graph:
    """Objects over a configuration.

    Args:
        cfg: an OmegaConf `DictConfig`, or a plain mapping.
        where: `file:line` (or the override) that set a dotted key; see `provenance`.
        allow_targets: targets that are refused otherwise (`ditty_di._graph.refused`), by name.
        also: what is known to be wrong with the configuration already; `check` reports it too.
    """

    def __init__(
        self,
        cfg: Any,
        where: Callable[[str], str] | None = None,
        *,
        allow_targets: Collection[str] = (),
        also: Iterable[Problem] = (),
    ) -> None:
        self._config: Any = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        self._raw: Any = OmegaConf.to_container(self._config, resolve=False)
        self.where: Any = where if where is not None else Provenance()
        self.allow_targets = frozenset(allow_targets)
        self._also = list(also)
        self._resolved: dict[Place, Any] = {}  # strings that OmegaConf resolved
        self._made: dict[Place, Any] = {}  # containers that a resolver made
        self._following: list[Place] = []
        self._building: list[Place] = []
        self._objects: dict[Place, Any] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Graph:
        """The graph of a YAML file such as a run's resolved.yaml; raises ConfigError."""
        try:
            cfg = OmegaConf.load(os.fspath(path))
            if not OmegaConf.is_dict(cfg):
                raise ValueError("a configuration is a mapping of keys to values")
            where = Provenance.of_file(path)
            if (sources := _sources(path)).exists():
                where.add_saved(json.loads(sources.read_text(encoding="utf-8")))
            # Whoever wrote the resolved configuration has checked what it allows.
            allowed = OmegaConf.select(cfg, "allow_targets") or ()
            return cls(cfg, where, allow_targets=allowed)
        except Exception as error:
            what = " ".join(str(error).split())
            raise ConfigError(f"cannot read {os.fspath(path)}: {what}") from error

    # ------------------------------------------------------------------------------ building
    def build(self, key: str) -> Any:
        """The object at a dotted key: a node's object (the same one at every call), a plain mapping
        or list with the objects in it, or a scalar.

        Raises:
            ConfigError: the configuration cannot be used.
            BuildError: a constructor raised; `__cause__` is what it raised.
        """
        return self._build(self._find(key))

    def _build(self, place: Place) -> Any:
        meant, value = self.at(place)
        if is_node(value):
            return self._object(meant, value)
        if not isinstance(value, dict | list):
            return value
        if meant == place:
            return self._plain(place, value)
        with self._inside(meant):
            return self._plain(meant, value)

    def _plain(self, place: Place, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._build((*place, key)) for key in value}
        return [self._build((*place, index)) for index in keys(value)]

    @contextmanager
    def _inside(self, place: Place) -> Iterator[None]:
        if place in self._building:
            raise self.cycle(self._building, place)
        self._building.append(place)
        try:
            yield
        finally:
            self._building.pop()

    def _object(self, place: Place, node: dict[Any, Any]) -> Any:
        if place in self._objects:
            return self._objects[place]
        with self._inside(place):
            target, partial = self.head(place, node)
            try:
                fn = self.locate(target)
            except TargetError as error:
                raise self.error((*place, "_target_"), str(error)) from error
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            for name in node:
                if name == "_args_":
                    args = self._build((*place, name))
                elif name not in SPECIAL:
                    kwargs[name] = self._build((*place, name))
            unsafe = unsafe_argument(fn, args, kwargs)
            if unsafe and not self.allows(target, fn):
                raise self.error(place, refusal(target, unsafe))
            try:
                made = functools.partial(fn, *args, **kwargs) if partial else fn(*args, **kwargs)
            except Exception as error:
                trail = " -> ".join(map(dotted, self._building))
                message = f"{target} raised {type(error).__name__}: {error}"
                if len(self._building) > 1:
                    message = f"{message}\n  (built for {trail})"
                at = self.where(dotted((*place, "_target_")))
                raise BuildError(Problem(dotted(place), message, at)) from error
            if not partial and is_refused_object(made, self.allow_targets):
                message = f"{target} gave {type(made).__name__} {made!r:.80}, which is refused"
                raise self.error(place, f"{message}: it reaches into the interpreter")
        self._objects[place] = made
        return made

    def built(self) -> dict[str, Any]:
        """The objects built until now, by the key of their node."""
        return {dotted(place): made for place, made in self._objects.items()}

    # ------------------------------------------------------------------------------ checking
    def check(self, root: str, *others: str) -> Checked:
        """Import every target that `root` reaches, bind every signature, and call each target's
        `validate` with the arguments that are known; builds nothing. What is returned is about
        `root`; `others` are checked as well.

        Raises:
            ConfigError: everything that is wrong, at once.
        """
        return self._walked(root, *others, imports=True)

    def rehearse(self, root: str) -> list[str]:
        """Call the `rehearse(build)` of every node that `root` reaches, which builds what it needs
        of its own arguments; return their warnings, each with the key of its node.

        Raises:
            ConfigError: everything that would fail, at once.
        """
        problems: dict[Problem, None] = {}
        warnings: list[str] = []
        for key, node in self.nodes(root).items():
            place = self._find(key)
            try:
                rehearsal = early.rehearsal(self.locate(node.target))
                if rehearsal is not None:
                    build = functools.partial(self._argument, place)
                    warnings += [f"{key}: {line}" for line in rehearsal(build) or ()]
            except ConfigError as error:
                problems.update(dict.fromkeys(error.problems))
            except Exception as error:
                told = self.complaint(place, node.target, error)
                problems.update(dict.fromkeys(told.problems))
        if problems:
            raise ConfigError(problems)
        return list(dict.fromkeys(warnings))

    def locate(self, target: str) -> Callable[..., Any]:
        """Return the callable that a `_target_` of this graph names; raise TargetError."""
        return locate(target, self.allow_targets)

    def allows(self, target: str, fn: Callable[..., Any]) -> bool:
        """Return whether `allow_targets` names a target or the place where it is defined."""
        return not {target, *identities(fn)}.isdisjoint(self.allow_targets)

    def _argument(self, place: Place, name: str) -> Any:
        """What a node is given as `name`, or the default of its signature.

        `name` may lead into an argument (`dataloader.collate_fn`); None where nothing is written.
        """
        if "." in name:
            try:
                inside = self._walk(place, name.split("."), place, name)
            except ConfigError:
                return None
            return self._build(inside)
        node = self.at(place)[1]
        if name in node:
            return self._build((*place, name))
        signature = Signature(self.locate(self.head(place, node)[0]))
        if "_args_" in node:
            given = keys(self.at((*place, "_args_"))[1])
            found = [n for n in given if signature.positional_name(n) == name]
            if found:
                return self._build((*place, "_args_", found[0]))
        return signature.default(name)

    def complaint(self, place: Place, target: str, error: Exception) -> ConfigError:
        """What a `validate` or `rehearse` of the node at `place` said, each at the key it is about:
        the argument that the message names, or what that refers to."""
        problems: list[Problem] = []
        for names, text in early.complaints(error):
            found = (self._argument_place(place, name) for name in names)
            written = next((at for at in found if at is not None), place)
            problems += self.at_origin(written, target, text).problems
        return ConfigError(problems)

    def nodes(self, root: str) -> dict[str, Node]:
        """Every node that `root` reaches, by key, in the order met. Imports nothing.

        Raises:
            ConfigError: a reference leads nowhere, a value is missing, or nodes form a cycle.
        """
        return self._walked(root, imports=False).nodes

    def shared(self, root: str) -> dict[str, list[str]]:
        """The nodes that are given to more than one parameter: key -> where they are given."""
        uses: dict[str, list[str]] = {}
        for node in self.nodes(root).values():
            for name, key in node.arguments:
                uses.setdefault(key, []).append(f"{node.key}.{name}")
        return {key: given for key, given in uses.items() if len(given) > 1}

    def _walked(self, *roots: str, imports: bool) -> Checked:
        checkers = [Checker(self, imports) for _ in roots]
        for checker, root in zip(checkers, roots, strict=True):
            checker.visit(self._find(root))
        problems = list(self._also if imports else ())
        problems += [problem for checker in checkers for problem in checker.problems]
        if problems:
            said = {(p.key, p.core or p.message): p for p in reversed(problems)}
            raise ConfigError(p for p in dict.fromkeys(problems) if p in said.values())
        return checkers[0].checked

    # ------------------------------------------------------------------------------- reading
    def reads(self, root: str) -> set[str]:
        """Every key that `root` reads, also through interpolations. What cannot be resolved is
        passed over."""
        seen: set[Place] = set()

        def visit(place: Place) -> None:
            if place in seen:
                return
            seen.add(place)
            value = self._written(place)
            try:
                if isinstance(value, str):
                    for inner in _inner(value):
                        visit(self._meant(place, inner))
                    for key in _keys_in_resolvers(value):
                        with suppress(ConfigError):
                            visit(self._find(key))
                meant, value = self.at(place)
            except ConfigError:
                return
            for key in keys(value):
                visit((*meant, key))

        visit(self._find(root))
        return {dotted(place) for place in seen}

    def value(self, key: str) -> Any:
        """The scalar, mapping or list at a key, references followed; raises ConfigError."""
        return self.at(self._find(key))[1]

    def __contains__(self, key: object) -> bool:
        """Whether there is a top-level key."""
        return key in self._raw

    def written(self, key: str) -> Any:
        """What is written at a key, references as they are; raises ConfigError."""
        return self._written(self._find(key))

    def holds(self, key: str, fits: Callable[[str, str | int], bool]) -> bool:
        """Whether all that a key's value is given to `fits(target, argument)`, and it is given to
        something. A reference within a longer text fits. Imports nothing by itself."""
        pending, seen, used = [self._find(key)], set(), False
        while pending:
            place = pending.pop()
            if place in seen:
                continue
            seen.add(place)
            above = self._written(place[:-1])
            if is_node(above):
                if not fits(str(above["_target_"]), place[-1]):
                    return False
                used = True
            for other, text in _items(self._raw):
                if not isinstance(text, str) or "${" not in text:
                    continue
                for inner in _inner(text):
                    with suppress(ConfigError):
                        if self._meant(other, inner) == place:
                            used = used or inner[0] != text
                            pending += [other] if inner[0] == text else []
        return used

    def explain(self, key: str) -> tuple[Any, Any]:
        """(what is written at a key, what it comes to): a reference to a node stays `${key}`."""
        place = self._find(key)
        return self._written(place), self._settled(place)

    def history(self, key: str) -> list[Setting]:
        """Everything that set a key, in order, the last of which counts; [] when nobody knows."""
        told = getattr(self.where, "history", None)  # any function may be given as `where`
        return told(key) if told else []

    def resolve(self) -> dict[str, Any]:
        """The configuration as plain mappings, lists and scalars with interpolations replaced.

        References to nodes, and to what has nodes in it, become `${absolute.path}`, so that a graph
        read back shares the same objects. What cannot be resolved stays as it is written.
        """
        return {key: self._settled((key,)) for key in self._raw}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `resolve()` as YAML that `load` reads back to the same graph.

        Beside it, `sources.json` says where each key was set, so that an error still says so.
        """
        resolved = self.resolve()
        OmegaConf.save(OmegaConf.create(resolved), os.fspath(path))
        told = {key: self.where(key) for key in flatten(resolved)}
        _sources(path).write_text(json.dumps(told, indent=0), encoding="utf-8")

    def _settled(self, place: Place) -> Any:
        written = self._written(place)
        try:
            meant, value = self.at(place)
        except ConfigError:
            return written
        if meant != place and self._holds_nodes(meant, ()):
            reference = _REFERENCE.fullmatch(f"${{{dotted(meant)}}}")
            names = reference and _names(reference["path"])
            return reference[0] if reference and names == list(map(str, meant)) else written
        if isinstance(value, dict):
            return {key: self._settled((*meant, key)) for key in value}
        if isinstance(value, list):
            return [self._settled((*meant, index)) for index in keys(value)]
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, str | PurePath):  # a literal "${" must not be read back as a reference
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        plain = value is None or isinstance(value, bool | int | float | bytes)
        return value if plain else written

    def _holds_nodes(self, place: Place, trail: tuple[Place, ...]) -> bool:
        try:
            meant, value = self.at(place)
        except ConfigError:  # cannot be copied, so whoever refers to it keeps the reference
            return True
        if is_node(value) or meant in trail:
            return True
        return any(self._holds_nodes((*meant, key), (*trail, meant)) for key in keys(value))

    # ---------------------------------------------------------------------------- references
    def _argument_place(self, place: Place, name: str) -> Place | None:
        """Where a node is given an argument, or with dots a value in it; None when it is not."""
        for part in name.split("."):
            try:
                place = self._walk(place, [part], place, "")
            except ConfigError:
                return None
        return place

    def at_origin(self, place: Place, target: str, text: str) -> ConfigError:
        """An error of a target about the value at `place`, told where it is to be corrected: at
        the plain key that it refers to, or at `place` itself when it refers to an argument of
        another node, for the value may be right there."""
        message, meant = f"{target}: {text}", place
        with suppress(ConfigError):
            while isinstance(written := self._written(meant), str):
                if (reference := _REFERENCE.fullmatch(written)) is None:
                    break
                following = self._meant(meant, reference)
                inside = (following[:n] for n in range(1, len(following) + 1))
                if any(is_node(self._written(above)) for above in inside):
                    message = f"{message} (it is {dotted(following)})"
                    break
                meant = following
        if meant == place:
            return self.error(place, message)
        return self.error(meant, f"{message} (given to {dotted(place)})", text)

    def at(self, place: Place) -> tuple[Place, Any]:
        """The place that is meant by what is written at `place`, references followed, and the
        mapping, list or scalar there. Raises ConfigError."""
        value = self._written(place)
        if not (isinstance(value, str) and "${" in value):
            if value == "???":
                message = f"has no value yet (???): type {dotted(place)}=VALUE"
                raise self.error(place, message)
            return place, value
        if place in self._following:
            raise self.cycle(self._following, place)
        self._following.append(place)
        try:
            reference = _REFERENCE.fullmatch(value)
            return self.at(self._meant(place, reference)) if reference else self._text(place, value)
        finally:
            self._following.pop()

    def error(self, place: Place, message: str, core: str = "") -> ConfigError:
        """An error that names a place and the line that wrote it."""
        key = dotted(place)
        return ConfigError(Problem(key, message, self.where(key), core))

    def cycle(self, trail: list[Place], place: Place) -> ConfigError:
        """The error for coming back to a `place` that is in `trail`."""
        names = map(dotted, [*trail[trail.index(place) :], place])
        return self.error(place, f"needs itself: {' -> '.join(names)}")

    def head(self, place: Place, node: dict[Any, Any]) -> tuple[str, bool]:
        """`_target_` and `_partial_` of a node. Raises ConfigError: all that is wrong with its
        special keys."""
        problems: list[Problem] = []

        def value(name: str, fits: Callable[[Any], bool], instead: str) -> Any:
            try:
                found = self.at((*place, name))[1]
                if not fits(found):
                    raise self.error((*place, name), f"is {found!r}: {instead}")
                return found
            except ConfigError as error:
                problems.extend(error.problems)

        for name in node:
            if not isinstance(name, str):
                message = f"is {name!r}, which is no parameter's name: names are text"
                problems.extend(self.error((*place, name), message).problems)
        target = value("_target_", lambda v: isinstance(v, str), "write a dotted path")
        partial = "_partial_" in node and value(
            "_partial_", lambda v: isinstance(v, bool), "write true or false"
        )
        if "_args_" in node:
            value("_args_", lambda v: isinstance(v, list), "write a list of positional arguments")
        if "_convert_" in node:
            instead = "constructors are given plain mappings and lists; leave it out"
            value("_convert_", lambda v: v in ("all", "object", "partial"), instead)
        if "_recursive_" in node:
            instead = "the nodes in a node are always built; leave it out"
            value("_recursive_", lambda v: v is True, instead)
        if problems:
            raise ConfigError(problems)
        return target, partial

    def _find(self, key: str) -> Place:
        names = _names(key)
        if not names:
            raise ConfigError(f"{key!r} is no key; write one such as 'trainer' or 'optimizer.lr'")
        return self._walk((), names, tuple(names), "no such key")

    def _written(self, place: Place) -> Any:
        return functools.reduce(lambda value, part: value[part], place, self._raw)

    def _container(self, place: Place) -> Any:
        """OmegaConf's own container at a place."""
        depth = next((n for n in range(len(place), 0, -1) if place[:n] in self._made), 0)
        start = self._made[place[:depth]] if depth else self._config
        return functools.reduce(lambda value, part: value[part], place[depth:], start)

    def _meant(self, place: Place, reference: re.Match[str]) -> Place:
        """The place that a reference written at `place` names, itself not followed."""
        up = len(reference["dots"])
        if up > len(place):
            raise self.error(place, f"{reference[0]}: leads above the configuration's root")
        return self._walk(place[:-up] if up else (), _names(reference["path"]), place, reference[0])

    def _walk(self, start: Place, names: list[str], place: Place, text: str) -> Place:
        """From `start` down `names`, following references on the way. An error is that of `text`,
        which is written at `place`."""
        for n, name in enumerate(names):
            start, inside = self.at(start)
            part = int(name) if isinstance(inside, list) and name.isdecimal() else name
            known = list(keys(inside))
            if part not in known:
                above = dotted(start) or "the configuration"
                scalar = "" if isinstance(inside, dict | list) else f", it is {inside!r}"
                hint = did_you_mean(name, known)
                if not hint and n == len(names) - 1:
                    elsewhere = (p for p, _ in _items(inside, start) if p[-1:] == (name,))
                    hint = next((f"; did you mean {dotted(p)!r}?" for p in elsewhere), "")
                raise self.error(place, f"{text}: {above} has no {name!r}{scalar}{hint}")
            start = (*start, part)
        return start

    def _text(self, place: Place, text: str) -> tuple[Place, Any]:
        """What a string with interpolations in it comes to, or what a resolver gives."""
        if place not in self._resolved:
            for inner in _inner(text):
                meant, value = self.at(self._meant(place, inner))
                if isinstance(value, dict | list) and not _RESOLVER.search(text):
                    message = f"{inner[0]} is all of {dotted(meant)!r}, which is not text"
                    raise self.error(place, f"{message}: refer to one value in it")
            parent = self._container(place[:-1])
            try:
                value = parent[place[-1]]
            except OmegaConfBaseException as error:
                what = str(error).splitlines()[0]
                raise self.error(place, f"cannot resolve {text!r}: {what}") from error
            if isinstance(value, dict | list | tuple):
                value = OmegaConf.create(value, parent=parent)
            self._resolved[place] = value
        value = self._resolved[place]
        if not OmegaConf.is_config(value):
            return place, value
        for other, part in _items(self._raw):
            if isinstance(part, dict | list) and self._container(other) is value:
                return other, part  # the resolver gave a part of the configuration itself
        self._made[place] = value
        self._written(place[:-1])[place[-1]] = OmegaConf.to_container(value, resolve=False)
        return place, self._written(place)


def _sources(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_name("sources.json")


def _inner(text: str) -> Iterator[re.Match[str]]:
    """The plain references in a string."""
    for match in _REFERENCE.finditer(text):
        before = text[: match.start()]
        if (len(before) - len(before.rstrip("\\"))) % 2 == 0:  # else the dollar is escaped
            yield match


def _keys_in_resolvers(text: str) -> list[str]:
    """Words in a string that may be keys: arguments of resolvers, such as `${oc.select:a.b,1}`, and
    what stands before a reference in a reference, such as `${a.${b}}`."""
    words = re.findall(r"[\w.]+", text) if _RESOLVER.search(text) else []
    return [*words, *re.findall(r"\$\{([\w.]+?)\.?\$\{", text)]


def _names(path: str) -> list[str]:
    return [name for name in re.split(r"[.\[\]]+", path) if name]


def _items(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    yield place, value
    for key in keys(value):
        yield from _items(value[key], (*place, key))
