"""The overrides of a command line (`key=value`), prepared before Hydra reads them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from ditty_di.cli import searchpath

_OVERRIDE = re.compile(r"(?P<sign>~|\+\+|\+)?(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_DOLLAR = re.compile(r"(\\*)\$\{")
_MAPPING = re.compile(r"\s*\{\s*[\w.]+\s*:")


def key_of(override: str) -> str:
    """Return the key without its sign: `+a.b=1`, `a.b=2` and `~a.b` are all about `a.b`."""
    match = _OVERRIDE.fullmatch(override)
    return match["key"].strip() if match else override


def value_of(overrides: Iterable[str], key: str) -> str | None:
    """Return the last value given to `key`, without quotes; None when it is not given."""
    found = None
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match and match["value"] is not None and match["key"].strip() == key:
            inside = _unquoted(match["value"].strip())
            found = match["value"].strip() if inside is None else inside
    return found


def without(overrides: Iterable[str], *keys: str) -> list[str]:
    """Return the overrides that are about none of `keys`, nor about something below them."""
    below = tuple(f"{key}." for key in keys)
    return [o for o in overrides if not f"{key_of(o)}.".startswith(below)]


def merge(earlier: Iterable[str], later: Iterable[str]) -> list[str]:
    """Return both, where a later override of a key replaces the earlier ones.

    A key that only an earlier `+key=1` brought into the configuration can be given as `key=2`.
    Another choice of a group (`launcher=local`) replaces the earlier choice with its values
    (`launcher.nodes=2`): they are arguments of another constructor.
    """
    earlier, later = list(earlier), list(later)
    added = {key_of(o): sign_of(o) for o in earlier if o.startswith("+")}
    again = {key_of(o) for o in later}
    chosen = {key: value_of(later, key) for key in again if "." not in key}
    other = {key for key, value in chosen.items() if value != value_of(earlier, key)}
    return [
        *(o for o in earlier if key_of(o) not in again and key_of(o).split(".")[0] not in other),
        *(o if o[0] in "+~" else added.get(key_of(o), "") + o for o in later),
    ]


def sign_of(override: str) -> str:
    """Return the `+` or `++` that an override begins with."""
    return override[: len(override) - len(override.lstrip("+"))]


def quoted(text: str) -> str:
    """Return `text` as a value that Hydra reads back as that very string."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def literal(text: str) -> str:
    """Return `text` escaped for a configuration, so that `${` begins no reference."""
    return _DOLLAR.sub(r"\1\1\\${", text)


def argument(key: str, text: str) -> str:
    """Return `key=text` for a shell, so that the command line reads back this very text."""
    plain = f"{key}={text}"
    return shlex.quote(plain if value_of([plain], key) == text else f"{key}={quoted(text)}")


def typed_text(override: str) -> str | None:
    """Return the text after the `=`, without Hydra's quotes if the whole is in quotes.

    None for a deletion and for null.
    """
    match = _OVERRIDE.fullmatch(override)
    if match is None or match["value"] is None or match["sign"] == "~":
        return None
    value = match["value"]
    if value.strip().lower() == "null":
        return None
    inside = _unquoted(value.strip())
    if inside is None:
        return value
    return re.sub(r"(\\*)\\\$\{", lambda m: m[1][: len(m[1]) // 2] + "${", inside)


def is_sweep(override: str) -> bool:
    """Return whether an override gives several values, for a job each."""
    parsed = _parsed(override)
    return parsed is not None and parsed.is_sweep_override()


def normalize(
    overrides: Iterable[str],
    *,
    sweep: bool,
    groups: Callable[[], Collection[str]] = lambda: searchpath.groups([searchpath.conf_dir()]),
    in_defaults: Callable[[str], bool] = lambda group: True,
) -> list[str]:
    """Return the overrides as Hydra takes them.

    `GROUP=null` becomes `GROUP=none`, for Hydra refuses null; `+` before a choice is added or left
    out as the defaults list needs; values that are plainly text are quoted.

    Args:
        overrides: as typed.
        sweep: whether values with commas are several values.
        groups: those of the configuration. Hydra reports what is wrong with a choice.
        in_defaults: whether the defaults list has a group.
    """
    return [
        _sign(_no_choice(_quote_text(override, sweep, groups), groups), groups, in_defaults)
        for override in overrides
    ]


def _no_choice(override: str, groups: Callable[[], Collection[str]]) -> str:
    """Replace null by `none` in a choice of a group, which may be one value of a sweep."""
    key, equals, value = override.partition("=")
    if "null" not in value or key.startswith("~") or key_of(override) not in groups():
        return override
    names = ("none" if name.strip() == "null" else name for name in value.split(","))
    return f"{key}{equals}{','.join(names)}"


def _sign(
    override: str, groups: Callable[[], Collection[str]], in_defaults: Callable[[str], bool]
) -> str:
    """Give a choice the sign that the defaults list needs: none, or `+` for a group not in it."""
    key = key_of(override)
    if override.startswith("+") and key in groups() and in_defaults(key):
        return override.lstrip("+")
    if override.startswith("experiment=") and not in_defaults(key):
        return f"+{override}"
    return override


def unreadable(overrides: Iterable[str]) -> dict[str, str]:
    """Return the overrides that Hydra cannot parse -> the same with their values in quotes."""
    return {
        o: f"{o.partition('=')[0]}={quoted(literal(o.partition('=')[2]))}"
        for o in overrides
        if "=" in o and not o.startswith("~") and _parsed(o) is None
    }


def _quote_text(override: str, sweep: bool, groups: Callable[[], Collection[str]]) -> str:
    """Quote what Hydra's grammar cannot read, or would take for choices where nothing is swept.

    `prompt=Hello, you!` is one string, and so are `prompt=f(x)` and `data.path=a,b`. Of a list, the
    elements are quoted: `special_tokens=[<|x|>]`. A bracket that is never closed, or a mapping, is
    left to Hydra and its messages.
    """
    key, equals, value = override.partition("=")
    if not equals or override.startswith("~"):
        return override
    parsed = _parsed(override)
    if parsed is not None:
        if sweep or not parsed.is_sweep_override() or key_of(override) in groups():
            return override
    else:
        elements, closed = _elements(value.strip())
        if not closed or (_MAPPING.match(value) and elements is None):
            return override
        if elements is not None:
            inside = ",".join(e if _parsed(f"x={e}") is not None else quoted(e) for e in elements)
            if _parsed(f"{key}=[{inside}]") is not None:
                return f"{key}=[{inside}]"
    try:
        parse(value)
    except OmegaConfBaseException:  # contains `${` without being a reference
        value = literal(value)
    return f"{key}={quoted(value)}"


def _elements(value: str) -> tuple[list[str] | None, bool]:
    """Return the elements of `[a, b]` as text, and whether an opening bracket is closed.

    The elements are None when the value is not such a list.
    """
    elements, depth = [""], 0
    for n, letter in enumerate(value):
        depth += (letter in "[{(") - (letter in "]})")
        if depth == 0 and value[0] in "[{":  # here the first bracket is closed
            whole = value[0] == "[" and n == len(value) - 1
            return ([e.strip() for e in elements] if whole else None), True
        if letter == "," and depth == 1:
            elements.append("")
        elif n:
            elements[-1] += letter
    return None, value[:1] not in ("[", "{")


def _unquoted(value: str) -> str | None:
    """Return the text of a value that is in quotes as a whole, None when it is not."""
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return None
    parsed = _parsed(f"x={value}")
    found = parsed.value() if parsed is not None and not parsed.is_sweep_override() else None
    return found if isinstance(parsed and parsed._value, QuotedString) else None


def _parsed(override: str) -> Any:
    """Return Hydra's reading of an override, None when it cannot read it."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None
