"""Find the errors of a configuration without building anything of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from ditty_di.config import early
from ditty_di.config.early import View
from ditty_di.config.errors import ConfigError, Path, Problem, dotted
from ditty_di.config.policy import refusal, unsafe_argument
from ditty_di.config.resolve import children, is_object, key_of, path_of, plain
from ditty_di.config.signatures import Signature, Slot
from ditty_di.config.targets import SPECIAL, TargetError

#: A value that is wrong already, or that only building something can tell.
UNKNOWN = object()

# A value without building anything (UNKNOWN, or a View of an object), and the objects in it:
# (path below the value, key of the object).
_Found = tuple[Any, list[tuple[Path, str]]]


@dataclass(frozen=True)
class Node:
    """An object that a root reaches. `arguments` are the objects given to it: (parameter, key)."""

    key: str
    target: str
    partial: bool
    arguments: list[tuple[str, str]] = field(default_factory=list, compare=False)


@dataclass
class Checked:
    """What a check looked at.

    Attributes:
        nodes: the objects by key, in the order met.
        slots: key -> the protocol whose arguments complete that partial.
        unread: keys of the objects whose target has no readable signature.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    slots: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Checker:
    """Visits everything that a root reaches, and collects the problems.

    Args:
        graph: the `Graph` to check.
        imports: False checks only the configuration itself: references, missing values, cycles.
    """

    def __init__(self, graph: Any, imports: bool = True) -> None:
        self.problems: dict[Problem, None] = {}  # an ordered set
        self.checked = Checked()
        self._graph = graph
        self._imports = imports
        self._trail: list[Path] = []
        self._found: dict[Path, _Found] = {}
        self._signatures: dict[Path, Signature | None] = {}

    def visit(self, written: Any, slots: Iterable[Slot] = ()) -> _Found:
        """Check what is written at a node of the configuration; return what was found there.

        Args:
            written: an OmegaConf node; references are followed.
            slots: the protocols that may complete a partial there.
        """
        try:
            node = self._graph.follow(written)
        except ConfigError as error:
            self.add(error)
            return UNKNOWN, []
        path, inside = path_of(node), children(node)
        if not inside and not is_object(node):
            return plain(node), []
        if path in self._trail:
            self.add(self._graph.cycle(self._trail, path))
            return UNKNOWN, []
        first = path not in self._found
        if is_object(node):
            if first:
                self._found[path] = UNKNOWN, [((), dotted(path))]
                self._signatures[path] = self._read(node)
            self._bind(node, list(slots))
            if first:
                self._arguments(node)
        elif first:
            self._trail.append(path)
            found = {key: self.visit(child) for key, child in inside}
            self._trail.pop()
            values = {key: value for key, (value, _) in found.items()}
            known = values if isinstance(node, DictConfig) else list(values.values())
            self._found[path] = (
                UNKNOWN if any(v is UNKNOWN for v in values.values()) else known,
                [((key, *at), name) for key, (_, below) in found.items() for at, name in below],
            )
        return self._found[path]

    def add(self, error: ConfigError) -> None:
        """Collect the problems of an error."""
        self.problems.update(dict.fromkeys(error.problems))

    def _read(self, node: Any) -> Signature | None:
        """Return the signature of a node's target; None when it cannot be read."""
        key = key_of(node)
        self.checked.nodes[key] = Node(key, str(node._get_node("_target_")), False)
        try:
            target, partial = self._graph.head(node)
            self.checked.nodes[key] = Node(key, target, partial)
            return Signature(self._graph.locate(target)) if self._imports else None
        except ConfigError as error:
            self.add(error)
        except TargetError as error:
            self.add(self._graph.error(f"{key}._target_", str(error)))
        except (ValueError, TypeError):  # from inspect: there is no signature
            self.checked.unread.append(key)
        return None

    def _bind(self, node: Any, slots: list[Slot]) -> None:
        """Bind a node's arguments, and those of the slot that it is given to, to its signature."""
        signature, known = self._signatures[path_of(node)], self.checked.nodes[key_of(node)]
        if signature is None:
            return
        given = dict(children(node))
        positional = len(children(self._graph.follow(given["_args_"]))) if "_args_" in given else 0
        names = [name for name in given if name not in SPECIAL]
        bind = functools.partial(signature.misfits, positional, names)
        found, hint = bind(partial=known.partial), ""
        # a parameter may take several kinds of callable: the one that fits best is meant
        fits = sorted(
            ((bind(partial=True, slot=slot), slot) for slot in slots), key=lambda fit: len(fit[0])
        )
        if fits and known.partial:
            found, slot = fits[0]
            self.checked.slots[known.key] = slot.protocol
        elif fits and not fits[0][0]:
            hint = "; write _partial_: true, for its slot gives the rest"
        for argument, message in found:
            text = f"{argument!r} {message}" if argument else f"it {message}{hint}"
            key = f"{known.key}.{argument or '_target_'}"
            self.add(self._graph.error(key, f"{known.target}: {text}"))

    def _arguments(self, node: Any) -> None:
        """Check each argument of a node, then all of them by the target's own checks."""
        path, known = path_of(node), self.checked.nodes[key_of(node)]
        signature = self._signatures[path]
        values: dict[Any, Any] = signature.plain_defaults() if signature else {}
        self._trail.append(path)
        for argument, name, child in self._graph.arguments(node):
            value, below = self.visit(child, signature.slots(argument) if signature else ())
            known.arguments.extend((dotted((*name, *at)), key) for at, key in below)
            if signature is None:
                continue
            readable = value is not UNKNOWN and not isinstance(value, View)
            if misread := signature.misread(argument, value) if readable else "":
                text = f"{argument!r} {misread}"
                self.add(self._graph.error_of_value(child, known.target, text))
                value = UNKNOWN
            values[signature.name_of(argument)] = value
        self._trail.pop()
        if signature is None:
            return
        values = {name: value for name, value in values.items() if value is not UNKNOWN}
        view = View(known.key, signature.target, known.partial, values)
        self._found[path] = view, self._found[path][1]
        unsafe = unsafe_argument(signature.target, (), values)
        if unsafe and not self._graph.allows(known.target, signature.target):
            self.add(self._graph.error(node, refusal(known.target, unsafe)))
        try:
            early.validate(view)
        except Exception as error:
            self.add(self._graph.complaint(node, known.target, error))
