"""What a run directory says about a run; any of its files may be missing or half written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class RunRecord:
    """The configuration, the environment and the metrics of a run, as far as they are there.

    config: what was built (`resolved.yaml`, else `config.yaml`).
    environment: versions and hardware (`environment.json`).
    lines: the values of `metrics.jsonl`, one dict a line, `step` in each.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else None
        self.config = self._yaml("resolved.yaml") or self._yaml("config.yaml")
        self.environment = self._json("environment.json")
        self.lines = self._lines("metrics.jsonl")

    def at(self, key: str) -> Any:
        """The value at a dotted key, references to other keys followed; None if there is none."""
        return self._at(key, frozenset())

    def value(self, value: Any) -> Any:
        """`value`, or what it refers to when it is one whole reference such as `${data.train}`."""
        return self._value(value, frozenset())

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

    def first_and_last(self, name: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
        """(step, value) of the first and the last line that has the metric."""
        found = [
            (line["step"], line[name])
            for line in self.lines
            if isinstance(line.get(name), int | float) and isinstance(line.get("step"), int)
        ]
        return (found[0], found[-1]) if found else None

    def _text(self, name: str) -> str:
        if self.folder is None:
            return ""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def _yaml(self, name: str) -> dict[str, Any]:
        try:
            found = yaml.safe_load(self._text(name))
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._text(name))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        lines = []
        for line in self._text(name).splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                lines.append(found)
        return lines
