"""What to say about an error that is not ours, above all about a key that does not exist."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from typing import Any

from yaml import YAMLError

from ditty_di.cli import searchpath
from ditty_di.cli.command import Command
from ditty_di.cli.overrides import key_of, without
from ditty_di.config import ConfigError
from ditty_di.config.suggest import suggest
from ditty_di.config.targets import did_you_mean, locate


def explain(error: Exception, command: Command) -> str:
    """One message, with what was probably meant."""
    from hydra.errors import HydraException

    text = str(error).strip()
    if isinstance(error, HydraException):
        told = text.partition("\nConfig search path:")[0]
        return re.sub(r"\nSee https://hydra.cc/\S+ for details", "", _hinted(told, command))
    if isinstance(error, ConfigError | OSError):
        return text
    if isinstance(error, YAMLError):
        tab = "\nindent with spaces: YAML takes no tabs" if "'\\t'" in text else ""
        return f"this is not YAML: {text}{tab}"
    return f"{type(error).__name__}: {text}\n(debug=true shows where)"


def _hinted(text: str, command: Command) -> str:
    if key := re.search(r"Could not override '([^']+)'", text):
        folders = [*searchpath.user_dirs(command.config_dirs), searchpath.conf_dir()]
        if key[1] in searchpath.groups(folders):
            return (
                f"{text}\nnothing is chosen in the group {key[1]!r} here: choose with "
                f"{key[1]}=NAME, or add a node of your own with +{key[1]}={{...}}"
            )
        known = [k for k in _keys(command, key[1]) if k != key[1]]
        typed = next((o for o in command.overrides if key_of(o) == key[1]), key[1])
        if _is_parameter(command, key[1]):
            return (
                f"{text.splitlines()[0]}\nnothing sets it here; add it: {shlex.quote('+' + typed)}"
            )
        hint = suggest(key[1], known).replace("; ", "\n")
        # without a hint, what Hydra says about adding a key with + stays
        return text.partition("\nTo append")[0] + hint if hint else text
    if merged := re.fullmatch(r"Error merging override (\S.*)", text):
        there, typed = key_of(merged[1]), merged[1].lstrip("+")
        instead = shlex.join([f"~{there}", f"+{typed}"])
        return f"{text}\n{there!r} holds something of another kind; to replace it: {instead}"
    if spaced := re.fullmatch(r"Error parsing override '([^']*)'\nmissing EQUAL.*", text, re.S):
        return f"{spaced[1]!r} has no value: write KEY=VALUE, without blanks around the ="
    return text + _hint(text)


def _hint(text: str) -> str:
    if choice := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        if choice[1].startswith("hydra/"):
            return "\nis that plugin of Hydra installed? for Optuna: pip install 'ditty_di[optuna]'"
        return did_you_mean(choice[2], re.findall(r"^\t(\S+)$", text, re.M)).replace("; ", "\n")
    return ""


def _is_parameter(command: Command, key: str) -> bool:
    """Whether a key is an argument that the target of the node above it takes."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    above, _, name = key.rpartition(".")
    try:
        with initialize_config_dir(str(searchpath.conf_dir()), version_base="1.3"):
            config = compose(command.config_name, without(command.overrides, key))
        target = OmegaConf.select(config, f"{above}._target_") if above else None
        return target is not None and name in inspect.signature(locate(str(target))).parameters
    except Exception:  # something else is wrong too, and told by itself
        return False


def _keys(command: Command, wrong: str) -> list[str]:
    """Every key that may be overridden, and every group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    folders = [*searchpath.user_dirs(command.config_dirs), searchpath.conf_dir()]
    keys = list(searchpath.groups(folders))
    try:
        with initialize_config_dir(str(searchpath.conf_dir()), version_base="1.3"):
            config = compose(command.config_name, without(command.overrides, wrong))
        keys += _dotted(OmegaConf.to_container(config))
    except Exception:  # something else is wrong too, and told by itself
        pass
    return keys


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _dotted(inner, f"{prefix}{key}.")
