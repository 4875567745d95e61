"""Find the line of a file, or the override, that set each key."""

from __future__ import annotations

import importlib.resources
import os
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Setting(NamedTuple):
    """A file line or override that set a key, and what made Hydra choose that file."""

    where: str
    value: str
    chosen_by: str = ""


class Provenance:
    """Where each key was set; calling it returns `file:line` or `command line 'lr=1'` for a key.

    That of the nearest key above when the key itself was set nowhere, `""` when there is none.
    """

    def __init__(self) -> None:
        self._settings: dict[str, list[Setting]] = {}

    def __call__(self, key: str) -> str:
        """Return where a dotted key was set."""
        while key and key not in self._settings:
            key = key.rpartition(".")[0]
        return self._settings[key][-1].where if key else ""

    def history(self, key: str) -> list[Setting]:
        """Return everything that set a key, in order: each overrides the one before."""
        return list(self._settings.get(key, ()))

    def keys(self) -> list[str]:
        """Return every key that something set."""
        return list(self._settings)

    def _set(self, key: str, setting: Setting, replaces: bool) -> None:
        if replaces:  # a scalar or a list: what was below the key is gone
            below = f"{key}."
            for other in [k for k in self._settings if k.startswith(below)]:
                del self._settings[other]
        self._settings.setdefault(key, []).append(setting)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Provenance:
        """Read the lines of one YAML file."""
        with open(path, encoding="utf-8") as file:
            return cls().add_file(label(path), file.read())

    def add_saved(self, sources: Mapping[str, str]) -> None:
        """Add where keys were set originally, for a file that was written by `Graph.save`."""
        for key, where in sources.items():
            self._set(key, Setting(where, ""), False)

    def add_file(self, name: str, text: str, package: str = "", chosen_by: str = "") -> Provenance:
        """Add the keys of a YAML file; a defaults list sets none.

        Args:
            name: file name to show.
            text: the content of the file.
            package: dotted key that the file's keys lie below, "" for the root.
            chosen_by: what made Hydra choose the file.

        Returns:
            This object.
        """
        document = yaml.compose(text, Loader=_Loader)
        if isinstance(document, yaml.MappingNode):
            document.value = [(k, v) for k, v in document.value if k.value != "defaults"]
            if package:
                self._add_yaml(package, document, name, document.start_mark.line, chosen_by)
            else:
                self._add_below("", document, name, chosen_by)
        return self

    def _add_yaml(self, key: str, node: yaml.Node, name: str, line: int, chosen_by: str) -> None:
        text = textwrap.shorten(_flow(node), 80, placeholder=" ...")
        replaces = not isinstance(node, yaml.MappingNode)
        self._set(key, Setting(f"{name}:{line + 1}", text, chosen_by), replaces)
        self._add_below(key, node, name, chosen_by)

    def _add_below(self, key: str, node: yaml.Node, name: str, chosen_by: str) -> None:
        prefix = f"{key}." if key else ""
        if isinstance(node, yaml.MappingNode):
            for inner, value in node.value:
                if inner.tag == "tag:yaml.org,2002:merge":
                    merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for mapping in merged:
                        self._add_below(key, mapping, name, chosen_by)
                else:
                    line = inner.start_mark.line
                    self._add_yaml(f"{prefix}{inner.value}", value, name, line, chosen_by)
        elif isinstance(node, yaml.SequenceNode):
            for n, value in enumerate(node.value):
                self._add_yaml(f"{prefix}{n}", value, name, value.start_mark.line, chosen_by)

    def add_override(self, line: str, key: str, value: Any) -> None:
        """Add an override of the command line.

        Args:
            line: the override as typed.
            key: the dotted key that it sets or deletes.
            value: its value.
        """
        where = f"command line {line!r}"
        text = line.partition("=")[2] if "=" in line else ""

        def add(key: str, value: Any, text: str) -> None:
            self._set(key, Setting(where, text), not isinstance(value, dict))
            inner = value.items() if isinstance(value, dict) else ()
            for name, below in enumerate(value) if isinstance(value, list) else inner:
                add(f"{key}.{name}", below, str(below))

        add(key, value, "(deleted)" if line.startswith("~") else text)


def provenance(config_name: str, overrides: list[str]) -> Provenance:
    """Return where every key of a composed configuration was set.

    From the defaults list that Hydra itself computes: Hydra must be initialized, as it is for
    `compose(config_name, overrides)`.

    Args:
        config_name: the primary configuration.
        overrides: as given to `compose`.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader: Any = GlobalHydra.instance().config_loader()
    # a repository like the one that compose() makes, which knows hydra.searchpath too
    parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, overrides)
    listed = loader.compute_defaults_list(config_name, overrides, RunMode.RUN)
    typed = {o.get_key_element().lstrip("+"): f"command line {o.input_line!r}" for o in parsed}
    chosen = {
        key: _source(repository, data.containing_config_path)[0]
        for key, data in listed.overrides.override_metadata.items()
        if data.containing_config_path is not None
    } | typed
    found = Provenance()
    for default in listed.defaults:
        name, text = _source(repository, default.config_path)
        found.add_file(name, text, default.package or "", chosen.get(default.override_key, ""))
    deleted = [o for o in parsed if o.is_delete() and o not in listed.config_overrides]
    for override in [*deleted, *listed.config_overrides]:  # the first delete choices of groups
        found.add_override(override.input_line, override.key_or_group, override.value())
    return found


def _source(repository: Any, config_path: str) -> tuple[str, str]:
    """Return (name to show, text) of the file that Hydra takes for a configuration."""
    name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
    for source in repository.get_sources():
        if not source.is_config(config_path):
            continue
        if source.scheme() == "file":
            path = os.path.join(source.path, name)
            with open(path, encoding="utf-8") as file:
                return label(path), file.read()
        if source.scheme() == "pkg":
            resource = importlib.resources.files(source.path).joinpath(name)
            return label(str(resource)), resource.read_text(encoding="utf-8")
        return f"{source.full_path()}{config_path}", ""  # a structured config has no lines
    return config_path, ""


def label(path: str | os.PathLike[str]) -> str:
    """Return a path as one would type it: relative when it lies below the working folder."""
    path = os.path.realpath(path)
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def _flow(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{k.value}: {_flow(v)}' for k, v in node.value)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_flow, node.value))}]"
    return str(node.value)
