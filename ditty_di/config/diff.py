"""Compare two configurations key by key."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ditty_di.config.errors import keys


class _Absent:
    def __repr__(self) -> str:
        return "(not set)"


ABSENT = _Absent()


class Difference(NamedTuple):
    """A key with its values in two configurations; ABSENT where one has no such key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> scalar, or empty mapping or list, of a configuration as written."""
    plain: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    found: dict[str, Any] = {}
    for key in keys(plain):
        below = flatten(plain[key], f"{prefix}{key}.")
        found |= below or {f"{prefix}{key}": plain[key]}
    return found


def difference(
    a: Any, b: Any, ignore: Collection[str] = (), only: Collection[str] | None = None
) -> list[Difference]:
    """Return what differs from configuration `a` to configuration `b`.

    Args:
        a: the old configuration (see `flatten`).
        b: the new configuration.
        ignore: keys that do not count, each with everything below it.
        only: the keys that count (`Graph.reads(root)`); None for all.
    """
    old, new = flatten(a), flatten(b)
    found = []
    for key in old | new:
        was, now = old.get(key, ABSENT), new.get(key, ABSENT)
        same = was == now or (was != was and now != now)  # nan equals nan here
        counts = only is None or key in only
        if not same and counts and not any(f"{key}.".startswith(f"{p}.") for p in ignore):
            found.append(Difference(key, was, now))
    return found
