"""Follow the references of a configuration, each only when something that is asked for reaches it.

OmegaConf's nodes hold the configuration. `_get_node` returns what is written at a key,
`_dereference_node` evaluates resolvers and text with references in it; a node's parents give its
path, and the path is the identity of an object.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditty_di.config.errors import ConfigError, Path, Problem, dotted
from ditty_di.config.provenance import Provenance, Setting
from ditty_di.messages import did_you_mean

_NAME = r"""[^\\{}()\[\]:.$\s'"]+"""
_REFERENCE = re.compile(  # ${a.b}, ${a[0]}, ${.sibling}, ${..uncle}
    rf"\$\{{\s*(?P<dots>\.*)"
    rf"(?P<path>(?:{_NAME}|\[{_NAME}\])(?:\.{_NAME}|\[{_NAME}\])*)\s*\}}"
)
_RESOLVER = re.compile(r"\$\{[\w.]+:")


class Configuration:
    """A configuration whose references can be followed.

    Args:
        cfg: an OmegaConf `DictConfig`, or a plain mapping.
        where: function that returns `file:line` (or the override) that set a dotted key; see
            `provenance`.
    """

    def __init__(self, cfg: Any, where: Callable[[str], str] | None = None) -> None:
        self._config: Any = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        self.where: Any = where if where is not None else Provenance()
        self._resolved: dict[Path, Node] = {}
        self._following: list[Path] = []

    def history(self, key: str) -> list[Setting]:
        """Return every setting of a key in order, the last of which counts; [] if unknown."""
        history = getattr(self.where, "history", None)  # any function may be given as `where`
        return history(key) if history else []

    # ------------------------------------------------------------------------------- reading
    def __contains__(self, key: object) -> bool:
        """Return whether there is a top-level key."""
        return key in list(self._config)

    def at(self, path: Path) -> tuple[Path, Any]:
        """Return the path and plain value that `path` refers to, references on the way followed.

        Raises:
            ConfigError: there is no such path, or it cannot be resolved.
        """
        node = self.follow(self._walk(self._config, path, dotted(path), "no such key"))
        return path_of(node), plain(node)

    def value(self, key: str) -> Any:
        """Return the plain value at a dotted key, references followed; raise ConfigError."""
        return plain(self.follow(self.find(key)))

    def written(self, key: str) -> Any:
        """Return the value at a key as written, references unresolved; raise ConfigError."""
        return plain(self.find(key))

    def explain(self, key: str) -> tuple[Any, Any]:
        """Return the value at a key as written and resolved; a reference to an object stays."""
        node = self.find(key)
        return plain(node), self._settled(node)

    def reads(self, root: str) -> set[str]:
        """Return every key that `root` reads, also through references.

        A reference that cannot be resolved counts as read, and is not followed.
        """
        seen: set[Path] = set()

        def visit(node: Node) -> None:
            if path_of(node) in seen:
                return
            seen.add(path_of(node))
            text = node._value()
            try:
                if isinstance(text, str):
                    for reference in references(text):
                        visit(self._referred(node, reference))
                    for key in _keys_in_resolvers(text):
                        with suppress(ConfigError):
                            visit(self.find(key))
                node = self.follow(node)
            except ConfigError:
                return
            for _, child in children(node):
                visit(child)

        visit(self.find(root))
        return {dotted(path) for path in seen}

    def holds(self, key: str, fits: Callable[[str, str | int], bool]) -> bool:
        """Return whether `fits(target, argument)` for every argument that receives a key's value.

        False when none receives it. A reference within a longer text fits. Imports nothing.
        """
        wanted, used = self.find(key), False
        for node in descendants(self._config):
            chain = self._chain(node)
            if any(link is wanted for link in chain):
                parent = node._get_parent()
                if is_object(parent):
                    if not fits(str(parent._get_node("_target_")), node._key()):
                        return False
                    used = True
            elif isinstance(text := chain[-1]._value(), str) and not used:
                for reference in references(text):
                    with suppress(ConfigError):
                        inner = self._chain(self._referred(chain[-1], reference))
                        used = used or any(link is wanted for link in inner)
        return used

    def resolve(self) -> dict[str, Any]:
        """Return the configuration as plain mappings, lists and scalars, references replaced.

        References to objects, and to what contains objects, become `${absolute.path}`, so that a
        graph that is read back shares the same objects. What cannot be resolved stays as written.
        """
        return {key: self._settled(node) for key, node in children(self._config)}

    def _settled(self, node: Node) -> Any:
        try:
            meant = self.follow(node)
        except ConfigError:
            return plain(node)
        path = path_of(meant)
        if path != path_of(node) and self._contains_objects(meant):
            reference = _REFERENCE.fullmatch(f"${{{dotted(path)}}}")
            exact = reference and _names(reference["path"]) == tuple(map(str, path))
            return reference[0] if reference and exact else plain(node)
        if isinstance(meant, DictConfig):
            return {key: self._settled(child) for key, child in children(meant)}
        if isinstance(meant, ListConfig):
            return [self._settled(child) for _, child in children(meant)]
        value = meant._value()
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, str | PurePath):  # a literal "${" must not be read back as a reference
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        readable = value is None or isinstance(value, bool | int | float | bytes)
        return value if readable else plain(node)

    def _contains_objects(self, node: Node, trail: tuple[Path, ...] = ()) -> bool:
        try:
            meant = self.follow(node)
        except ConfigError:  # cannot be copied: references to it stay references
            return True
        path = path_of(meant)
        return (
            is_object(meant)
            or path in trail
            or any(self._contains_objects(child, (*trail, path)) for _, child in children(meant))
        )

    # ---------------------------------------------------------------------------- references
    def find(self, key: str) -> Node:
        """Return the node at a dotted key as written; raise ConfigError when there is none."""
        names = _names(key)
        if not names:
            raise ConfigError(
                f"{key!r} is not a key; write one such as 'trainer' or 'optimizer.lr'"
            )
        return self._walk(self._config, names, dotted(names), "no such key")

    def follow(self, node: Node) -> Node:
        """Return the node that is meant by what is written at `node`.

        Raises:
            ConfigError: a value is missing, a reference is circular, or it cannot be resolved.
        """
        path = path_of(node)
        if node._is_missing():
            message = f"missing mandatory value (???); set {dotted(path)}=VALUE"
            raise self.error(node, message)
        if not node._is_interpolation():
            return node
        if path not in self._resolved:
            if path in self._following:
                raise self.cycle(self._following, path)
            self._following.append(path)
            try:
                self._resolved[path] = self._evaluate(node)
            finally:
                self._following.pop()
        return self._resolved[path]

    def _evaluate(self, node: Node) -> Node:
        """Return what a reference, a text with references or a resolver gives."""
        text = node._value()
        if reference := _REFERENCE.fullmatch(text):
            return self.follow(self._referred(node, reference))
        for reference in references(text):
            found = self.follow(self._referred(node, reference))
            if isinstance(found, Container) and not _RESOLVER.search(text):
                message = f"{reference[0]} is a mapping or list, {key_of(found)!r}, inside a text"
                raise self.error(node, f"{message}; refer to one value in it")
        try:
            found = node._dereference_node()
        except OmegaConfBaseException as error:
            what = str(error).splitlines()[0]
            raise self.error(node, f"cannot resolve {text!r}: {what}") from error
        if isinstance(value := found._value(), dict | list | tuple):
            if not isinstance(found, Container):
                parent: Any = node._get_parent()
                found = OmegaConf.create(list(value) if isinstance(value, tuple) else value, parent)
            if found._key() is None:  # made by a resolver, not a part of the configuration
                found._set_key(node._key())
        return found

    def _referred(self, node: Node, reference: re.Match[str]) -> Node:
        """Return the node that a reference written at `node` names, itself not followed."""
        start: Any = node if reference["dots"] else self._config
        for _ in reference["dots"]:
            start = start and start._get_parent()
        if start is None:
            raise self.error(node, f"{reference[0]}: leads above the configuration's root")
        return self._walk(start, _names(reference["path"]), node, reference[0])

    def _chain(self, node: Node) -> list[Node]:
        """Return a node and, step by step, what it refers to, as far as that can be resolved."""
        chain = [node]
        with suppress(ConfigError):
            while isinstance(text := chain[-1]._value(), str):
                reference = _REFERENCE.fullmatch(text)
                if reference is None or any(link is chain[-1] for link in chain[:-1]):
                    break
                chain.append(self._referred(chain[-1], reference))
        return chain

    def _walk(self, start: Node, names: Path, at: Node | str, text: str) -> Node:
        """Return the node below `start` at `names`, references on the way followed.

        An error names `at`, and `text`, which is written there.
        """
        for n, name in enumerate(names):
            start = self.follow(start)
            known = dict(children(start))
            part = int(name) if isinstance(start, ListConfig) and str(name).isdecimal() else name
            if part not in known:
                above = key_of(start) or "the configuration"
                scalar = "" if isinstance(start, Container) else f", it is {start._value()!r}"
                hint = did_you_mean(name, known)
                history = self.history(dotted((*path_of(start), name)))
                if history and history[-1].value == "(deleted)":
                    user = at if isinstance(at, str) else key_of(at)
                    hint = f"; {history[-1].where} deleted it, so delete {user!r} too"
                if not hint and n == len(names) - 1:
                    elsewhere = (c for c in descendants(start) if c._key() == name)
                    hint = next((f"; did you mean {key_of(c)!r}?" for c in elsewhere), "")
                raise self.error(at, f"{text}: {above} has no {name!r}{scalar}{hint}")
            start = known[part]
        return start

    # -------------------------------------------------------------------------------- errors
    def error(self, at: Node | str, message: str, core: str = "") -> ConfigError:
        """Return an error that names a key and the line that wrote it."""
        key = at if isinstance(at, str) else key_of(at)
        return ConfigError(Problem(key, message, self.where(key), core))

    def error_of_value(self, node: Node, target: str, text: str) -> ConfigError:
        """Return an error about a value that `target` receives, at the key where it is corrected.

        That is the plain key that `node` refers to, or `node` itself when it refers to an argument
        of another object, because the value may be right there.
        """
        message, meant = f"{target}: {text}", node
        for following in self._chain(node)[1:]:
            if any(map(is_object, [following, *parents(following)])):
                message = f"{message} (it is {key_of(following)})"
                break
            meant = following
        if meant is node:
            return self.error(node, message)
        return self.error(meant, f"{message} (given to {key_of(node)})", text)

    def cycle(self, trail: list[Path], path: Path) -> ConfigError:
        """Return the error for reaching a `path` that is already in `trail`."""
        names = map(dotted, [*trail[trail.index(path) :], path])
        return self.error(dotted(path), f"circular reference: {' -> '.join(names)}")


# ------------------------------------------------------------------------------------- nodes
def parents(node: Node) -> Iterator[Any]:
    """Yield the containers around a node, the root of the configuration last."""
    parent: Any = node
    while (parent := parent._get_parent()) is not None:
        yield parent


def path_of(node: Node) -> Path:
    """Return the keys and list indices from the root of the configuration to a node."""
    return tuple(above._key() for above in [node, *parents(node)][-2::-1])


def key_of(node: Node) -> str:
    """Return the dotted key of a node."""
    return dotted(path_of(node))


def children(node: Node) -> list[tuple[Any, Any]]:
    """Return the entries of a mapping or list, as written; nothing for a scalar or a reference."""
    if isinstance(node, DictConfig):
        names = node.keys()  # unlike iteration, empty for a missing value
        return [(key, node._get_node(key, validate_access=False)) for key in names]
    return (
        [(n, node._get_node(n)) for n in range(len(node))] if isinstance(node, ListConfig) else []
    )


def descendants(node: Node) -> Iterator[Any]:
    """Yield a node and everything below it, as written."""
    yield node
    for _, child in children(node):
        yield from descendants(child)


def is_object(node: Any) -> bool:
    """Return whether a node has a `_target_`."""
    return isinstance(node, DictConfig) and "_target_" in dict(children(node))


def plain(node: Node) -> Any:
    """Return the value of a node with plain mappings and lists, references unresolved."""
    return OmegaConf.to_container(node) if isinstance(node, Container) else node._value()


def references(text: str) -> Iterator[re.Match[str]]:
    """Yield the references to keys in a text."""
    for match in _REFERENCE.finditer(text):
        before = text[: match.start()]
        if (len(before) - len(before.rstrip("\\"))) % 2 == 0:  # else the dollar is escaped
            yield match


def _keys_in_resolvers(text: str) -> list[str]:
    """Return words in a text that may be keys.

    Those are arguments of resolvers, such as `${oc.select:a.b,1}`, and the beginning of a reference
    that contains another, such as `${a.${b}}`.
    """
    words = re.findall(r"[\w.]+", text) if _RESOLVER.search(text) else []
    return [*words, *re.findall(r"\$\{([\w.]+?)\.?\$\{", text)]


def _names(key: str) -> Path:
    return tuple(name for name in re.split(r"[.\[\]]+", key) if name)
