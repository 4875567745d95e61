"""Read what a run directory records about a run; any of its files may be missing or incomplete."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class RunInfo:
    """The configuration, the environment and the metrics of a run, as far as they exist.

    Attributes:
        config: what was built (`resolved.yaml`, else `config.yaml`).
        environment: versions and hardware (`environment.json`).
        lines: the entries of `metrics.jsonl`, each with its `step`.

    Args:
        folder: the run directory; None for none.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = Path(folder).expanduser() if folder is not None else None
        yaml_files = (self._text("resolved.yaml"), self._text("config.yaml"))
        self.config = next(
            filter(None, (_mapping(yaml.safe_load, text) for text in yaml_files)), {}
        )
        self.environment = _mapping(json.loads, self._text("environment.json"))
        lines = (_mapping(json.loads, line) for line in self._text("metrics.jsonl").splitlines())
        self.lines = [line for line in lines if line]

    def at(self, key: str) -> Any:
        """Return the value at a dotted key, references to other keys followed; None without one."""
        return self._at(key, frozenset())

    def value(self, value: Any) -> Any:
        """Return `value`, or what it refers to if it is a reference such as `${data.train}`."""
        return self._value(value, frozenset())

    def first_and_last(self, name: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
        """Return (step, value) of the first and the last entry of a metric; None without any."""
        found = [
            (line["step"], line[name])
            for line in self.lines
            if isinstance(line.get(name), int | float) and isinstance(line.get("step"), int)
        ]
        return (found[0], found[-1]) if found else None

    def _at(self, key: str, seen: frozenset[str]) -> Any:
        if key in seen:
            return None
        value: Any = self.config
        for name in key.split("."):
            value = self._value(value.get(name), seen | {key}) if isinstance(value, dict) else None
        return value

    def _value(self, value: Any, seen: frozenset[str]) -> Any:
        reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        return self._at(reference[1], seen) if reference else value

    def _text(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8") if self._folder else ""
        except (OSError, UnicodeDecodeError):
            return ""


def _mapping(load: Callable[[str], Any], text: str) -> dict[str, Any]:
    """Return the mapping in a text; empty when there is none."""
    try:
        found = load(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
