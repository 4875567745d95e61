"""The parts of a multimodal model: its language model, and the towers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ditty_di.models.weights import transformers_model


def language_path(model: nn.Module) -> str | None:
    """Return the path of the language model inside a multimodal one; None for any other model.

    Args:
        model: on meta or with values, with or without adapters.
    """
    outer, text = _configs(model)
    if text is outer:
        return None
    return next((path for path, part in _models(model) if type(part.config) is type(text)), None)


def towers(model: nn.Module) -> list[nn.Module]:
    """Return the models inside a multimodal one that are not language models, outermost only.

    Args:
        model: on meta or with values, with or without adapters.
    """
    outer, text = _configs(model)
    if text is outer:
        return []
    found: dict[str, nn.Module] = {}
    for path, part in _models(model):
        inside = any(path.startswith(f"{other}.") for other in found)
        if type(part.config) not in (type(outer), type(text)) and not inside:
            found[path] = part
    return list(found.values())


def language_model_paths(model: nn.Module) -> Callable[[str], bool]:
    """Return a predicate of paths: whether one leads into the language model.

    It is true of every path of a model that is not multimodal.

    Args:
        model: that has the paths, of modules or parameters.
    """
    language = language_path(model)
    return lambda path: language is None or f"{path}.".startswith(f"{language}.")


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """Return the configuration of the outermost model of transformers, and that of its text."""
    outer: Any = getattr(transformers_model(model)[1], "config", None)
    return outer, outer.get_text_config() if hasattr(outer, "get_text_config") else outer


def _models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the models of transformers inside a model with their paths, outer ones first."""
    for path, part in model.named_modules():
        if hasattr(type(part), "_init_weights") and hasattr(part, "config"):
            yield path, part
