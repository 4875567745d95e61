"""The object graph of a configuration: checked first, each object built once.

Hydra has composed the configuration before. A node is a mapping with a `_target_` (and `_partial_`,
`_args_`, as in Hydra), and a reference to a node *is* that node's object: the identity of an object
is the path of its node, within one `Graph`. Nothing is built, and no reference resolved, before
something that is asked for reaches it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

from ditty_di.config import early
from ditty_di.config.check import Checked, Checker, Node
from ditty_di.config.diff import flatten
from ditty_di.config.errors import BuildError, ConfigError, Path, Problem, dotted
from ditty_di.config.policy import identities, is_refused_object, refusal, unsafe_argument
from ditty_di.config.provenance import Provenance
from ditty_di.config.resolve import Configuration, children, is_object, key_of, path_of, plain
from ditty_di.config.signatures import Signature
from ditty_di.config.targets import SPECIAL, TargetError, locate


class Graph(Configuration):
    """Objects over a configuration.

    Args:
        cfg: an OmegaConf `DictConfig`, or a plain mapping.
        where: function that returns `file:line` (or the override) that set a dotted key; see
            `provenance`.
        allow_targets: targets that are refused otherwise (`ditty_di.config.policy`), by name.
        also: problems that are known already; `check` reports them too.
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
        self._building: list[Path] = []
        self._objects: dict[Path, Any] = {}

    # ------------------------------------------------------------------------------- files
    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Graph:
        """Load the graph of a YAML file such as a run's resolved.yaml; raise ConfigError."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `resolve()` as YAML that `load` reads back to the same graph.

        Beside it, `sources.json` says where each key was set, so that an error still says so.
        """
        resolved = self.resolve()
        OmegaConf.save(OmegaConf.create(resolved), os.fspath(path))
        sources = {key: self.where(key) for key in flatten(resolved)}
        _sources(path).write_text(json.dumps(sources, indent=0), encoding="utf-8")

    # ------------------------------------------------------------------------------ building
    def build(self, key: str) -> Any:
        """Build what a dotted key refers to.

        Returns:
            A node's object (the same one at every call), a plain mapping or list with the objects
            in it, or a scalar.

        Raises:
            ConfigError: the configuration cannot be used.
            BuildError: a constructor raised; `__cause__` is the original exception.
        """
        return self._build(self.find(key))

    def built(self) -> dict[str, Any]:
        """Return the objects built so far, by the key of their node."""
        return {dotted(path): made for path, made in self._objects.items()}

    def _build(self, written: Any) -> Any:
        node = self.follow(written)
        if is_object(node):
            return self._object(node)
        if not isinstance(node, Container) or path_of(node) == path_of(written):
            return self._plain(node)
        with self._inside(node):
            return self._plain(node)

    def _plain(self, node: Any) -> Any:
        inside = {key: self._build(child) for key, child in children(node)}
        if not inside:
            return plain(node)
        return inside if isinstance(node, DictConfig) else list(inside.values())

    @contextmanager
    def _inside(self, node: Any) -> Iterator[None]:
        if (path := path_of(node)) in self._building:
            raise self.cycle(self._building, path)
        self._building.append(path)
        try:
            yield
        finally:
            self._building.pop()

    def _object(self, node: Any) -> Any:
        key, path = key_of(node), path_of(node)
        if path in self._objects:
            return self._objects[path]
        with self._inside(node):
            target, partial = self.head(node)
            try:
                fn = self.locate(target)
            except TargetError as error:
                raise self.error(f"{key}._target_", str(error)) from error
            given = {n: self._build(c) for n, c in children(node) if n not in _NOT_BUILT}
            args = given.pop("_args_", [])
            unsafe = unsafe_argument(fn, args, given)
            if unsafe and not self.allows(target, fn):
                raise self.error(node, refusal(target, unsafe))
            try:
                made = functools.partial(fn, *args, **given) if partial else fn(*args, **given)
            except Exception as error:
                message = f"{target} raised {type(error).__name__}: {error}"
                if len(self._building) > 1:
                    message += f"\n  (built for {' -> '.join(map(dotted, self._building))})"
                raise BuildError(Problem(key, message, self.where(f"{key}._target_"))) from error
            if not partial and is_refused_object(made, self.allow_targets):
                message = f"{target} returned {type(made).__name__} {made!r:.80}, which is refused"
                raise self.error(node, f"{message}: it reaches into the interpreter")
        self._objects[path] = made
        return made

    def argument(self, key: str, name: str) -> Any:
        """Build one argument of the node at a dotted key, or return the signature's default.

        Args:
            key: of the node.
            name: of the argument.

        Raises:
            ConfigError, BuildError: as `build`.
        """
        return self._argument(self.follow(self.find(key)), name)

    # ------------------------------------------------------------------------------ checking
    def check(self, root: str, *others: str) -> Checked:
        """Check everything that `root` and `others` reach, and build nothing.

        Imports every target, binds every signature, and calls each target's `validate` with the
        arguments that are known.

        Returns:
            What was checked below `root`.

        Raises:
            ConfigError: all problems at once.
        """
        return self._checked(root, *others, imports=True)

    def rehearse(self, root: str, known: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
        """Call the `rehearse(build)` of every node that `root` reaches.

        It builds what it needs of its own arguments.

        Args:
            root: key of the first node.
            known: values by key that a run will have instead of those that are written.

        Returns:
            The warnings, each with the key of its node.

        Raises:
            ConfigError: all problems at once.
        """
        problems: list[Problem] = []
        raised: dict[Problem, str] = {}
        warnings: list[str] = []
        for key, described in self.nodes(root).items():
            node = self.find(key)
            try:
                if rehearsal := early.rehearsal(self.locate(described.target)):
                    build = functools.partial(self._known_argument, known, key, node)
                    warnings += [f"{key}: {line}" for line in rehearsal(build) or ()]
            except BuildError as error:
                problems += error.problems
                raised |= dict.fromkeys(error.problems, str(error.__cause__))
            except ConfigError as error:
                problems += error.problems
            except Exception as error:
                problems += self.complaint(node, described.target, error).problems
        # What a node cannot be built for is often what its own rehearsal has said.
        said = [problem.message for problem in problems if problem not in raised]
        problems = [
            problem
            for problem in problems
            if not (cause := raised.get(problem)) or not any(cause in text for text in said)
        ]
        if problems:
            raise ConfigError(dict.fromkeys(problems))
        return list(dict.fromkeys(warnings))

    def nodes(self, root: str) -> dict[str, Node]:
        """Return every node that `root` reaches, by key, in the order met; import nothing.

        Raises:
            ConfigError: a reference cannot be resolved, a value is missing, or nodes form a cycle.
        """
        return self._checked(root, imports=False).nodes

    def shared(self, root: str) -> dict[str, list[str]]:
        """Return the nodes that several parameters receive: key -> those parameters' keys."""
        uses: dict[str, list[str]] = {}
        for node in self.nodes(root).values():
            for name, key in node.arguments:
                uses.setdefault(key, []).append(f"{node.key}.{name}")
        return {key: given for key, given in uses.items() if len(given) > 1}

    def locate(self, target: str) -> Callable[..., Any]:
        """Return the callable that a `_target_` of this graph names; raise TargetError."""
        return locate(target, self.allow_targets)

    def allows(self, target: str, fn: Callable[..., Any]) -> bool:
        """Return whether `allow_targets` names a target, or the name it was defined under."""
        return not {target, *identities(fn)}.isdisjoint(self.allow_targets)

    def head(self, node: Any) -> tuple[str, bool]:
        """Return `_target_` and `_partial_` of a node; raise ConfigError for its special keys."""
        problems: list[Problem] = []
        found: dict[Any, Any] = {}
        for name, child in children(node):
            try:
                if not isinstance(name, str):
                    message = f"is {name!r}, which is not the name of a parameter: names are text"
                    raise self.error(child, message)
                fits, instead = SPECIAL.get(name, (None, ""))
                if fits:
                    found[name] = plain(self.follow(child))
                    if not fits(found[name]):
                        raise self.error(child, f"is {found[name]!r}: {instead}")
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return found["_target_"], found.get("_partial_", False)

    def arguments(self, node: Any) -> Iterator[tuple[str | int, Path, Any]]:
        """Yield (parameter name or position, path below the node, value as written)."""
        for name, child in children(node):
            if name == "_args_":
                try:
                    values = children(self.follow(child))
                except ConfigError:
                    continue  # reported by `head`
                yield from ((n, (name, n), value) for n, value in values)
            elif name not in SPECIAL:
                yield name, (name,), child

    def complaint(self, node: Any, target: str, error: Exception) -> ConfigError:
        """Return the error that a `validate` or `rehearse` of a node raised.

        Each problem is at the key that it is about: the argument that the message names, or the key
        that its value refers to.
        """
        problems: list[Problem] = []
        for names, text in early.complaints(error):
            found = (self._given(node, name) for name in names)
            written = next((value for value in found if value is not None), node)
            problems += self.error_of_value(written, target, text).problems
        return ConfigError(problems)

    def _given(self, node: Any, name: str) -> Any:
        """Return what is written for an argument, or with dots for a value in it; else None."""
        try:
            return self._walk(node, tuple(name.split(".")), node, "")
        except ConfigError:
            return None

    def _argument(self, node: Any, name: str) -> Any:
        """Build the argument `name` of a node, or return the default of its signature.

        `name` may be a value in an argument (`dataloader.collate_fn`); None if it is not written.
        """
        if (written := self._given(node, name)) is not None:
            return self._build(written)
        if "." in name:
            return None
        signature = Signature(self.locate(self.head(node)[0]))
        for argument, _, written in self.arguments(node):
            if signature.name_of(argument) == name:
                return self._build(written)
        return signature.default(name)

    def _known_argument(self, known: Mapping[str, Any], key: str, node: Any, name: str) -> Any:
        path = f"{key}.{name}"
        return known[path] if path in known else self._argument(node, name)

    def _checked(self, *roots: str, imports: bool) -> Checked:
        checkers = [Checker(self, imports) for _ in roots]
        for checker, root in zip(checkers, roots, strict=True):
            try:
                checker.visit(self.find(root))
            except ConfigError as error:  # there is no such root
                checker.add(error)
        problems = dict.fromkeys(self._also if imports else ())
        for checker in checkers:
            problems |= checker.problems
        if problems:  # of problems with one cause, the first
            first = {(p.key, p.core or p.message): p for p in reversed(problems)}
            raise ConfigError(p for p in problems if p in first.values())
        return checkers[0].checked


_NOT_BUILT = SPECIAL.keys() - {"_args_"}


def _sources(path: str | os.PathLike[str]) -> FilePath:
    return FilePath(path).with_name("sources.json")
