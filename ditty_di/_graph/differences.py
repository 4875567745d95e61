"""What differs between two configurations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ditty_di._graph.errors import Place, dotted, keys


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
