"""The command line's overrides (`key=value`), put in order before Hydra reads them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ditty_di.cli import searchpath

_OVERRIDE = re.compile(r"(?P<sign>~|\+\+|\+)?(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_DOLLAR = re.compile(r"(\\*)\$\{")
_UNFINISHED = re.compile(r"\s*[\[{]")
_MAPPING = re.compile(r"\s*\{\s*[\w.]+\s*:")


def key_of(override: str) -> str:
    """The key without its sign: `+a.b=1`, `a.b=2` and `~a.b` are all about `a.b`."""
    match = _OVERRIDE.fullmatch(override)
    return match["key"].strip() if match else override


def value_of(overrides: Iterable[str], key: str) -> str | None:
    """The last value given to `key`, without quotes; None when it is not given."""
    found = None
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match and match["value"] is not None and match["key"].strip() == key:
            inside = _unquoted(match["value"].strip())
            found = match["value"].strip() if inside is None else inside
    return found


def without(overrides: Iterable[str], *keys: str) -> list[str]:
    """Leaves out what is about one of `keys`, or about something inside it."""
    inside = tuple(f"{key}." for key in keys)
    return [o for o in overrides if key_of(o) not in keys and not key_of(o).startswith(inside)]


def merge(earlier: Iterable[str], later: Iterable[str]) -> list[str]:
    """Both, where what is said later about a key replaces what was said about it earlier.

    A key that only an earlier `+key=1` brought into the configuration can be given as `key=2`.
    """
    earlier, later = list(earlier), list(later)
    added = {key_of(o): o[: len(o) - len(o.lstrip("+"))] for o in earlier if o.startswith("+")}
    said = {key_of(o) for o in later}
    return [
        *(o for o in earlier if key_of(o) not in said),
        *(
            o if o[0] in "+~" else added.get(o_key, "") + o
            for o, o_key in zip(later, map(key_of, later), strict=True)
        ),
    ]


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads back as that very string."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def literal(text: str) -> str:
    """`text` for a configuration that is to hold it as it is: `${` begins no reference."""
    return _DOLLAR.sub(r"\1\1\\${", text)


def argument(key: str, text: str) -> str:
    """`key=text` for a shell, so that the command line reads back this very text."""
    return shlex.quote(
        f"{key}={text}" if value_of([f"{key}={text}"], key) == text else f"{key}={quoted(text)}"
    )


def typed_text(override: str) -> str | None:
    """Return the text after the `=`, without Hydra's quotes if the whole is in quotes; None for a
    deletion and for null."""
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


def _unquoted(value: str) -> str | None:
    """The text of a value that is in quotes as a whole, None when it is not."""
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return None
    from hydra.core.override_parser.types import QuotedString

    parsed = _parsed(f"x={value}")
    found = parsed.value() if parsed is not None and not parsed.is_sweep_override() else None
    return found if isinstance(parsed and parsed._value, QuotedString) else None


def _shipped_groups() -> Collection[str]:
    return searchpath.groups([searchpath.conf_dir()])


def normalise(
    overrides: Iterable[str],
    *,
    sweep: bool,
    groups: Callable[[], Collection[str]] = _shipped_groups,
    in_defaults: Callable[[str], bool] = lambda group: True,
) -> list[str]:
    """Return the overrides as Hydra takes them.

    `GROUP=null` becomes `GROUP=none`, for Hydra refuses null; `experiment=x` and `+experiment=x`
    become what the defaults list needs; values that are plainly text are quoted.

    Args:
        overrides: as typed.
        sweep: whether values with commas are several values.
        groups: those of the configuration. Hydra reports what is wrong with a choice.
        in_defaults: whether the defaults list has a group.
    """
    return [
        _experiment(_no_choice(_quote_text(override, sweep, groups), groups), in_defaults)
        for override in overrides
    ]


def _no_choice(override: str, groups: Callable[[], Collection[str]]) -> str:
    """Replace null by `none` in a choice of a group, which may be one value of a sweep."""
    key, equals, value = override.partition("=")
    if "null" not in value or key.startswith("~") or key_of(override) not in groups():
        return override
    names = ("none" if name.strip() == "null" else name for name in value.split(","))
    return f"{key}{equals}{','.join(names)}"


def _experiment(override: str, in_defaults: Callable[[str], bool]) -> str:
    """Give the choice of an experiment the sign that the defaults list needs."""
    if key_of(override) != "experiment" or override.startswith("~"):
        return override
    return override.lstrip("+") if in_defaults("experiment") else f"+{override.lstrip('+')}"


def _quote_text(override: str, sweep: bool, groups: Callable[[], Collection[str]]) -> str:
    """Quote what Hydra's grammar cannot read, or would take for a list of choices where no sweep is
    asked for: `prompt=Hello, you!` is one string, and so are `prompt=f(x)` and `data.path=a,b`.

    Of a list, the elements: `special_tokens=[<|x|>]`. A bracket that is never closed, or a mapping,
    is left to Hydra and its messages.
    """
    key, equals, value = override.partition("=")
    if not equals or override.startswith("~"):
        return override
    parsed = _parsed(override)
    if parsed is not None:
        if sweep or not parsed.is_sweep_override() or key_of(override) in groups():
            return override
    elif _UNFINISHED.match(value) and _closing(value.strip()) is None:
        return override
    elif (elements := _elements(value.strip())) is not None:
        inside = ",".join(e if _parsed(f"x={e}") is not None else quoted(e) for e in elements)
        if _parsed(f"{key}=[{inside}]") is not None:
            return f"{key}=[{inside}]"
    elif _MAPPING.match(value):
        return override
    return f"{key}={quoted(literal(value) if _broken(value) else value)}"


def unreadable(overrides: Iterable[str]) -> dict[str, str]:
    """Return the overrides that Hydra cannot parse -> the same with their values in quotes."""
    return {
        o: f"{o.partition('=')[0]}={quoted(literal(o.partition('=')[2]))}"
        for o in overrides
        if "=" in o and not o.startswith("~") and _parsed(o) is None
    }


def _parsed(override: str) -> Any:
    """Hydra's reading of an override, None when it cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def is_sweep(override: str) -> bool:
    """Return whether an override gives several values, for a job each."""
    parsed = _parsed(override)
    return parsed is not None and parsed.is_sweep_override()


def _broken(value: str) -> bool:
    """Return whether `${` in a value is not a reference that OmegaConf can parse."""
    from omegaconf.errors import OmegaConfBaseException
    from omegaconf.grammar_parser import parse

    try:
        parse(value)
        return False
    except OmegaConfBaseException:
        return True


def _closing(value: str) -> int | None:
    """Where the bracket that a value begins with is closed; None when it never is."""
    depth = 0
    for n, letter in enumerate(value):
        depth += (letter in "[{(") - (letter in "]})")
        if depth == 0:
            return n
    return None


def _elements(value: str) -> list[str] | None:
    """Return the elements of `[a, b]` as text; None when the value is not such a list."""
    if not value.startswith("[") or _closing(value) != len(value) - 1:
        return None
    elements, depth = [""], 0
    for letter in value[1:-1]:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return [element.strip() for element in elements]
