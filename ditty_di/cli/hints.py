"""Explain an error of Hydra or YAML, above all a key that does not exist."""

from __future__ import annotations

import inspect
import re
import shlex
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from yaml import YAMLError

from ditty_di.cli import composing, searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, without
from ditty_di.config import ConfigError, flatten
from ditty_di.config.errors import prefixes
from ditty_di.config.suggest import suggest
from ditty_di.config.targets import locate
from ditty_di.messages import did_you_mean


def explain(error: Exception, command: Command) -> str:
    """Return one message about an error, with what was probably meant."""
    text = str(error).strip()
    if isinstance(error, HydraException):
        text = text.partition("\nConfig search path:")[0]
        return re.sub(r"\nSee https://hydra.cc/\S+ for details", "", _hinted(text, command))
    if isinstance(error, ConfigError | OSError):
        return text
    if isinstance(error, YAMLError):
        tab = "\nindent with spaces: YAML takes no tabs" if "'\\t'" in text else ""
        return f"this is not YAML: {text}{tab}"
    return f"{type(error).__name__}: {text}\n(debug=true shows where)"


def _hinted(text: str, command: Command) -> str:
    missing = r"Could not override '([^']+)'|Could not delete from config. '([^']+)' does not exist"
    if key := re.search(missing, text):
        return _unknown_key(text, key[1] or key[2], command)
    if doubled := re.search(r"An item is already at '([^']+)'", text):
        config = composing.composed(command.config_name, without(command.overrides, doubled[1]))
        real, reference = _by_reference(config, doubled[1])
        return f"{text.splitlines()[0]}\n{reference}: write {real}=..." if reference else text
    if merged := re.fullmatch(r"Error merging override (\S.*)", text):
        there, typed = key_of(merged[1]), merged[1].lstrip("+")
        instead = shlex.join([f"~{there}", f"+{typed}"])
        return f"{text}\n{there!r} holds something of another kind; to replace it: {instead}"
    if spaced := re.fullmatch(r"Error parsing override '([^']*)'\nmissing EQUAL.*", text, re.S):
        return f"{spaced[1]!r} has no value: write KEY=VALUE, without blanks around the ="
    if choice := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        if choice[1].startswith("hydra/"):
            return f"{text}\nis that plugin of Hydra installed?"
        choices = re.findall(r"^\t(\S+)$", text, re.M)
        return text + did_you_mean(choice[2], choices).replace("; ", "\n")
    return text


def _unknown_key(text: str, key: str, command: Command) -> str:
    """Return Hydra's message about an override of a key that does not exist, with a hint."""
    groups = searchpath.groups(searchpath.folders(command.config_dirs))
    if key in groups:
        return (
            f"{text}\nnothing is chosen in the group {key!r} here: choose with "
            f"{key}=NAME, or add a node of your own with +{key}={{...}}"
        )
    config: Any = composing.composed(command.config_name, without(command.overrides, key))
    if config is None:  # another key does not exist either
        chosen = [o for o in command.overrides if key_of(o).partition("@")[0] in groups]
        config = composing.composed(command.config_name, chosen)
    real, reference = _by_reference(config, key)
    missing: Any = object()
    if reference and OmegaConf.select(config, real, default=missing) is not missing:
        return f"{text.splitlines()[0]}\n{reference}: write {real}=..."
    above, _, name = real.rpartition(".")
    try:
        target = OmegaConf.select(config, f"{above}._target_")
        takes_it = name in inspect.signature(locate(str(target))).parameters
    except Exception:  # no node, or something else is wrong too, and reported by itself
        takes_it = False
    if takes_it:
        typed = next((o for o in command.overrides if key_of(o) == key), key).replace(key, real, 1)
        return f"{text.splitlines()[0]}\nnothing sets it here; add it: {shlex.quote('+' + typed)}"
    keys = [k for leaf in flatten(config) for k in prefixes(leaf)]
    hint = suggest(real, [*groups, *dict.fromkeys(keys)], groups).replace("; ", "\n", 1)
    # without a hint, what Hydra says about adding a key with + stays
    return text.partition("\nTo append")[0] + hint if hint else text


def _by_reference(config: Any, key: str) -> tuple[str, str]:
    """Return the key that a key is by the references above it, and the last of them, in words."""
    value = {} if config is None else OmegaConf.to_container(config)
    parts = key.split(".")
    for n, part in enumerate(parts[:-1], 1):
        value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and (referred := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            there, further = _by_reference(config, ".".join([referred[1], *parts[n:]]))
            return there, further or f"{'.'.join(parts[:n])} is {value}"
    return key, ""
