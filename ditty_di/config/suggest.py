"""Suggest the key or parameter that was probably meant by an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from ditty_di.config.targets import did_you_mean

_DATA = yaml.safe_load(Path(__file__).with_name("synonyms.yaml").read_text("utf-8"))
#: Names of other trainers -> keys that mean the same here, best first.
SYNONYMS = {name: [keys] if isinstance(keys, str) else keys for name, keys in _DATA.items()}


def suggest(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'optimizer.lr'?` for a dotted key among `known` ones, or nothing."""
    known = list(known)
    above, _, last = key.rpartition(".")
    proposed = _synonym(last, set(known))
    if proposed:
        return f"; did you mean {proposed!r}?"
    if last.lower() in SYNONYMS:
        usual = SYNONYMS[last.lower()][0]
        return f"; elsewhere it is {usual!r}, which is not in this configuration"
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == above}
    if hint := did_you_mean(last, siblings):
        name = hint.split("'")[1]
        return f"; did you mean {siblings[name]!r}?"
    elsewhere = sorted((k for k in known if k.endswith(f".{last}")), key=lambda k: k.count("."))
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return did_you_mean(key, known, cutoff=0.7)


def _synonym(name: str, known: set[str]) -> str:
    for key in SYNONYMS.get(name.lower().replace("-", "_"), ()):
        if key in known or "=" in key:
            return key
    return ""


def parameter(name: str, known: Iterable[str]) -> str:
    """As `suggest`, among the parameters of one callable."""
    known = list(known)
    for key in SYNONYMS.get(name.lower(), ()):
        last = key.rpartition(".")[2]
        if last in known and "=" not in key:
            return f"; did you mean {last!r}?"
    return did_you_mean(name, known)
