"""Read a configuration: follow its references, and say where a value was written.

The only part that resolves OmegaConf's interpolations, each when something that is asked for
reaches it.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditty_di._graph.errors import ConfigError, Place, Problem, dotted, is_node, keys
from ditty_di._graph.provenance import Provenance
from ditty_di._graph.targets import did_you_mean

_NAME = r"""[^\\{}()\[\]:.$\s'"]+"""
_REFERENCE = re.compile(  # ${a.b}, ${a[0]}, ${.sibling}, ${..uncle}
    rf"\$\{{\s*(?P<dots>\.*)"
    rf"(?P<path>(?:{_NAME}|\[{_NAME}\])(?:\.{_NAME}|\[{_NAME}\])*)\s*\}}"
)
_RESOLVER = re.compile(r"\$\{[\w.]+:")


class Configuration:
    """A configuration whose references are followed.

    Args:
        cfg: an OmegaConf `DictConfig`, or a plain mapping.
        where: `file:line` (or the override) that set a dotted key; see `provenance`.
    """

    def __init__(self, cfg: Any, where: Callable[[str], str] | None = None) -> None:
        self._config: Any = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        self._raw: Any = OmegaConf.to_container(self._config, resolve=False)
        self.where: Any = where if where is not None else Provenance()
        self._resolved: dict[Place, Any] = {}  # strings that OmegaConf resolved
        self._made: dict[Place, Any] = {}  # containers that a resolver made
        self._following: list[Place] = []

    # ------------------------------------------------------------------------------- reading
    def value(self, key: str) -> Any:
        """The scalar, mapping or list at a key, references followed; raises ConfigError."""
        return self.at(self._find(key))[1]

    def __contains__(self, key: object) -> bool:
        """Whether there is a top-level key."""
        return key in self._raw

    def written(self, key: str) -> Any:
        """Return the value at a key as written, references unresolved; raise ConfigError."""
        return self._written(self._find(key))

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

    def resolve(self) -> dict[str, Any]:
        """The configuration as plain mappings, lists and scalars with interpolations replaced.

        References to nodes, and to what has nodes in it, become `${absolute.path}`, so that a graph
        read back shares the same objects. What cannot be resolved stays as it is written.
        """
        return {key: self._settled((key,)) for key in self._raw}

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
        except ConfigError:  # cannot be copied: references to it stay references
            return True
        if is_node(value) or meant in trail:
            return True
        return any(self._holds_nodes((*meant, key), (*trail, meant)) for key in keys(value))

    # ---------------------------------------------------------------------------- references
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

    def _find(self, key: str) -> Place:
        names = _names(key)
        if not names:
            raise ConfigError(
                f"{key!r} is not a key; write one such as 'trainer' or 'optimizer.lr'"
            )
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
        """Return the place and value of a string with interpolations or of a resolver."""
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
