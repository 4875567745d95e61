"""What is wrong with a configuration, found without building anything of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ditty_di._graph import early
from ditty_di._graph.errors import ConfigError, Place, Problem, dotted, is_node, keys
from ditty_di._graph.refused import refusal, unsafe_argument
from ditty_di._graph.signatures import Signature, Slot
from ditty_di._graph.targets import SPECIAL, TargetError

#: An argument whose value cannot be told without building something, or is wrong already.
UNKNOWN = object()


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
        self._views: dict[Place, Any] = {}
        self._misread: set[Place] = set()

    def _add(self, error: ConfigError) -> None:
        self.problems.update(dict.fromkeys(error.problems))

    def visit(
        self, place: Place, slots: Iterable[Slot] = ()
    ) -> tuple[Any, list[tuple[Place, str]]]:
        """Check what is at a place. Return its value, UNKNOWN when that is a node or cannot be
        told, and the nodes found there: (where below `place`, key of the node)."""
        try:
            meant, value = self._graph.at(place)
        except ConfigError as error:
            self._add(error)
            return UNKNOWN, []
        if not isinstance(value, dict | list):
            return value, []
        if meant in self._trail:
            self._add(self._graph.cycle(self._trail, meant))
            return UNKNOWN, []
        if isinstance(value, dict) and is_node(value):
            self._node(meant, value, list(slots))
            return UNKNOWN, [((), dotted(meant))]
        if meant not in self._plain:
            self._plain[meant] = []
            self._trail.append(meant)
            for key in keys(value):
                below = self.visit((*meant, key))[1]
                self._plain[meant] += [((key, *at), node) for at, node in below]
            self._trail.pop()
        return value, self._plain[meant]

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
            if signature is not None:
                self._refuse_unsafe(place, signature)
                self._validate(place, signature)

    def _head(self, place: Place, node: dict[Any, Any]) -> Signature | None:
        key = dotted(place)
        self.checked.nodes[key] = Node(key, str(node["_target_"]), False)
        try:
            target, partial = self._graph.head(place, node)
            self.checked.nodes[key] = Node(key, target, partial)
            return Signature(self._graph.locate(target)) if self._imports else None
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
                readable = signature is not None and value is not UNKNOWN
                misread = signature.misread(argument, value) if signature and readable else ""
                if misread:
                    self._misread.add(at)
                    self._add(self._graph.at_origin(at, known.target, f"{argument!r} {misread}"))

    def _refuse_unsafe(self, place: Place, signature: Signature) -> None:
        """Refuse arguments that make a target load pickles or run code, such as `weights_only`."""
        target, known = self.checked.nodes[dotted(place)].target, self._view(place)
        if not isinstance(known, early.View) or self._graph.allows(target, signature.target):
            return
        found = unsafe_argument(signature.target, (), dict(known.arguments))
        if found:
            self._add(self._graph.error(place, refusal(target, found)))

    # ------------------------------------------------------------------------ a target's own checks
    def _validate(self, place: Place, signature: Signature) -> None:
        """Call the `validate` of a node's target with the arguments that are known."""
        check = early.validator(signature.target)
        view = self._view(place) if check else None
        if check is None or not isinstance(view, early.View):
            return
        try:
            check(**early.wanted(check, view.arguments))
        except Exception as error:
            target = self.checked.nodes[dotted(place)].target
            self._add(self._graph.complaint(place, target, error))

    def _view(self, place: Place) -> Any:
        """The node at a place with its known arguments; UNKNOWN when it cannot be looked at."""
        if place not in self._views:
            self._views[place] = UNKNOWN  # for a node that needs itself
            signature = self._read.get(place)
            known = self.checked.nodes.get(dotted(place))
            if signature is not None and known is not None:
                given = self._known_arguments(place, signature)
                arguments = {**signature.plain_defaults(), **given}
                self._views[place] = early.View(
                    known.key,
                    signature.target,
                    known.partial,
                    {name: value for name, value in arguments.items() if value is not UNKNOWN},
                )
        return self._views[place]

    def _known_arguments(self, place: Place, signature: Signature) -> dict[str, Any]:
        node = self._graph.at(place)[1]
        given = {n: self._known((*place, n)) for n in node if n not in SPECIAL}
        if "_args_" in node:
            values = self._known((*place, "_args_"))
            for n, value in enumerate(values if isinstance(values, list) else ()):
                name = signature.positional_name(n)
                if name is not None:
                    given[name] = value
        return given

    def _known(self, place: Place) -> Any:
        if place in self._misread:
            return UNKNOWN
        try:
            meant, value = self._graph.at(place)
        except ConfigError:
            return UNKNOWN
        if is_node(value):
            return self._view(meant)
        if not isinstance(value, dict | list):
            return value
        if meant in self._trail:
            return UNKNOWN
        self._trail.append(meant)
        inside = {key: self._known((*meant, key)) for key in keys(value)}
        self._trail.pop()
        if any(v is UNKNOWN for v in inside.values()):
            return UNKNOWN
        return inside if isinstance(value, dict) else list(inside.values())
