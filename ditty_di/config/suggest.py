"""Suggest the key or parameter that was probably meant by an unknown one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import yaml

from ditty_di.config.errors import prefixes
from ditty_di.messages import closest, did_you_mean

_DATA = yaml.safe_load(Path(__file__).with_name("synonyms.yaml").read_text("utf-8"))
#: Names of other trainers -> keys that mean the same here, best first.
SYNONYMS = {name: [keys] if isinstance(keys, str) else keys for name, keys in _DATA.items()}


def suggest(
    key: str, known: Iterable[str], groups: Mapping[str, Collection[str]] | None = None
) -> str:
    """Return `; did you mean 'optimizer.lr'?` for a dotted key, or nothing.

    Args:
        key: the key that does not exist.
        known: the keys that do.
        groups: group -> its choices; one that adds a missing part of `key` is proposed.
    """
    known = dict.fromkeys(known)
    proposed = _translated(key, known)
    if proposed in known or "=" in proposed:
        return f"; did you mean {proposed!r}?" if proposed != key else ""
    if synonyms := _synonyms(key.rpartition(".")[2]):
        return f"; elsewhere it is {synonyms[0]!r}, which is not in this configuration"
    missing = next(k for k in prefixes(key) if k not in known or k == key)
    above, _, last = missing.rpartition(".")
    group = above.rpartition(".")[2]
    if last in (groups or {}).get(group, ()):
        return f"; '{group}={last}' adds it"
    if missing == key:
        elsewhere = [k for k in known if k.endswith(f".{last}")]
        if elsewhere:
            return f"; did you mean {min(elsewhere, key=lambda k: k.count('.'))!r}?"
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == above}
    near = closest(last, [*siblings, *SYNONYMS])
    if near not in siblings:
        if meant := next((k for k in _synonyms(near or "") if k in known or "=" in k), None):
            return f"; did you mean {meant!r}?"
        near = closest(last, siblings)
    if near:
        corrected = siblings[near] + key[len(missing) :]
        return f"; did you mean {corrected if corrected in known else siblings[near]!r}?"
    return did_you_mean(key, [k for k in known if not k.endswith("_")], cutoff=0.7)


def _synonyms(name: str) -> list[str]:
    return SYNONYMS.get(name.lower().replace("-", "_"), [])


def _translated(key: str, known: Collection[str]) -> str:
    """Return the key with the names of other trainers, in any part of it, replaced by ours."""
    path = ""
    for name in key.split("."):
        here, above = f"{path}.{name}".lstrip("."), path
        synonyms = [] if here in known else _synonyms(name)
        fitting = sorted(synonyms, key=lambda k: (k.rpartition(".")[0] != above, k not in known))
        path = fitting[0] if fitting else here
    return path


def parameter(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'lr'?` for an unknown parameter of a callable, or nothing."""
    known = list(known)
    for key in _synonyms(name):
        last = key.rpartition(".")[2]
        if last in known and "=" not in key:
            return f"; did you mean {last!r}?"
    return did_you_mean(name, known)
