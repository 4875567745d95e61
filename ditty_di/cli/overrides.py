"""The command line's overrides (`key=value`), put in order before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OVERRIDE = re.compile(r"(?P<sign>~|\+\+|\+)?(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_STRUCTURED = re.compile(r"""[\[{'"]|\w+\(""")


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
            found = match["value"].strip()
    if found and len(found) > 1 and found[0] == found[-1] and found[0] in "'\"":
        found = found[1:-1]
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


def normalise(overrides: Iterable[str], *, sweep: bool) -> list[str]:
    """`experiment=x` becomes `+experiment=x`; values that are plainly text are quoted."""
    return [
        f"+{o}" if o.startswith("experiment=") else o
        for o in (_quote_text(override, sweep) for override in overrides)
    ]


def _quote_text(override: str, sweep: bool) -> str:
    """Quotes what the shell's own quotes have lost: `prompt=Hello, you!` is one string.

    Only where Hydra could not read the value, or would take a sentence for a list of choices;
    lists, mappings, function calls and quoted strings are left to Hydra and its messages.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    if not equals or _STRUCTURED.match(value):
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
        if sweep or not parsed.is_sweep_override() or not re.search(r"\s", value):
            return override
    except HydraException:
        pass
    return f"{key}={quoted(value)}"
