"""The object graph of a configuration: which node is which object, checked first, built once.

Hydra has composed the configuration before it comes here. A node is a mapping with a `_target_`
(and `_partial_`, `_args_`, as in Hydra). An interpolation to a node *is* that node's object:
identity is the path in the configuration, within one `Graph`. Nothing is built, and no
interpolation resolved, before something that is asked for reaches it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ditty_di._graph import early
from ditty_di._graph.checking import Checked, Checker, Node
from ditty_di._graph.configuration import Configuration
from ditty_di._graph.differences import ABSENT, Difference, difference, flatten
from ditty_di._graph.early import View
from ditty_di._graph.errors import BuildError, ConfigError, Place, Problem, dotted, is_node, keys
from ditty_di._graph.provenance import Provenance, Setting, provenance
from ditty_di._graph.refused import identities, is_refused_object, refusal, unsafe_argument
from ditty_di._graph.signatures import Signature
from ditty_di._graph.targets import SPECIAL, TargetError, locate

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


class Graph(Configuration):
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
        super().__init__(cfg, where)
        self.allow_targets = frozenset(allow_targets)
        self._also = list(also)
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
            # `allow_targets` was checked when the resolved configuration was written.
            allowed = OmegaConf.select(cfg, "allow_targets") or ()
            return cls(cfg, where, allow_targets=allowed)
        except Exception as error:
            what = " ".join(str(error).split())
            raise ConfigError(f"cannot read {os.fspath(path)}: {what}") from error

    def history(self, key: str) -> list[Setting]:
        """Return all that set a key, in order; the last counts. [] when that is unknown."""
        told = getattr(self.where, "history", None)  # any function may be given as `where`
        return told(key) if told else []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `resolve()` as YAML that `load` reads back to the same graph.

        Beside it, `sources.json` says where each key was set, so that an error still says so.
        """
        resolved = self.resolve()
        OmegaConf.save(OmegaConf.create(resolved), os.fspath(path))
        told = {key: self.where(key) for key in flatten(resolved)}
        _sources(path).write_text(json.dumps(told, indent=0), encoding="utf-8")

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
        """Return the argument `name` of a node, or the default of its signature.

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
        """Return the error that a `validate` or `rehearse` of the node at `place` raised, each
        problem at the key it is about: the argument that the message names, or the key that its
        value refers to."""
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

    def _argument_place(self, place: Place, name: str) -> Place | None:
        """Where a node is given an argument, or with dots a value in it; None when it is not."""
        for part in name.split("."):
            try:
                place = self._walk(place, [part], place, "")
            except ConfigError:
                return None
        return place

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


def _sources(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_name("sources.json")
