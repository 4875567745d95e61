"""From the tensors of files to those of transformers' models: names, merged experts, ties.

transformers 5 keeps the names and shapes of published files apart from those of its models and
converts while it reads and saves. The same conversions are applied here without reading a tensor
whole, where they only move elements (`ditty_di.models.deferred`).
"""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from ditty_di.models.deferred import Deferred, deferred
from ditty_di.models.safetensors import Index, Safetensors

log = logging.getLogger(__name__)


def own_class(model: Any) -> Any:
    """The class that a model had before `fully_shard` put one of its own before it."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def bare_model(model: Any, config: Any = None) -> Any:
    """A model of the same class on meta, as transformers builds it: without what was done to this.

    Weights that are no longer tied in `model` are not tied in it.

    Args:
        config: of the new model; None is a copy of `model`'s.
    """
    with torch.device("meta"):
        new = own_class(model)(copy.deepcopy(model.config) if config is None else config)
    untie(new, set(new.all_tied_weights_keys) - set(model.all_tied_weights_keys))
    if hasattr(model, "_weight_conversions"):
        new._weight_conversions = model._weight_conversions
    return new


# -- names ----------------------------------------------------------------------------------------


@dataclass
class Group:
    """Tensors of the files that become one tensor of the model, or several.

    Args:
        converter: of transformers; None where only the name changes.
        sources: names in the files, by the pattern of the converter that matched them.
    """

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Names:
    """The names of the files' tensors in the model.

    Args:
        groups: by the name in the model, of several names the first.
        unused: names in the files that the model has no tensor for.
        conversions: those of transformers that matched a name. It reverts these when it saves.
    """

    groups: dict[str, Group]
    unused: list[str]
    conversions: list[Any]


def convert_names(names: Iterable[str], model: Any) -> Names:
    """Find the model's tensor for each tensor of the files, as `from_pretrained` does.

    Follows transformers' `core_model_loading.convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, Group] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, pattern = rename_source_key(name, [], [], prefix, known)
        if new in known:
            group = groups.setdefault(new, Group(None if pattern is None else by_pattern[pattern]))
            group.sources[name if pattern is None else pattern].append(name)
        else:
            unused.append(name)
    return Names(groups, _unexpected(unused, model), [t for t in transforms if t.was_used()])


def _unexpected(names: list[str], model: Any) -> list[str]:
    """Those that transformers warns about, too: old models' files have buffers, for example."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]


def made_when_missing(name: str, model: Any) -> bool:
    """Whether transformers does not save or expect a tensor, which `_init_weights` then makes."""
    expected = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    saved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return name in saved or any(re.search(pattern, name) for pattern in expected)


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], Any]:
    """Return a predicate of tensor names: whether transformers keeps it in float32 at `dtype`."""
    patterns = list(model._get_dtype_plan(dtype)) if hasattr(model, "_get_dtype_plan") else []
    return build_glob_alternation(patterns)[0].search if patterns else lambda name: None


# -- tensors --------------------------------------------------------------------------------------


class Converted:
    """The tensors of files under the names, and in the shapes, of a model.

    Args:
        files: the tensors as they are stored.
        model: of transformers, on meta (`bare_model`); None takes the files' own names.
    """

    def __init__(self, files: Safetensors, model: Any = None) -> None:
        self._files, self._model = files, model
        if model is None:
            names = Names({n: Group(None, {n: [n]}) for n in files.names()}, [], [])
        else:
            names = convert_names(files.names(), model)
        self.unused = names.unused
        self._groups: dict[str, tuple[str, Group]] = {}
        for first, group in names.groups.items():
            for name in [first] if group.converter is None else self._targets(first, group):
                self._groups[name] = (first, group)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def names(self) -> list[str]:
        return list(self._groups)

    def tensor(self, name: str) -> Deferred:
        """The tensor, unread.

        Raises:
            ValueError: its parts in the files do not fit each other.
        """
        first, group = self._groups[name]
        if group.converter is None:
            return self._files.deferred(self._only(group))
        made = self._convert(first, group, self._files.deferred)
        return deferred(made[name])

    def read(self, name: str, index: Index = None) -> torch.Tensor:
        """The tensor, or a part of it; a view of the file where nothing is converted."""
        _, group = self._groups[name]
        if group.converter is None:
            return self._files.read(self._only(group), index)
        return self.tensor(name).read(index)

    def _only(self, group: Group) -> str:
        # transformers takes the first of several that get the same name.
        return next(iter(group.sources.values()))[0]

    def _targets(self, first: str, group: Group) -> list[str]:
        """Names of all that a conversion makes, by doing it to shapes."""

        def shaped(name: str) -> torch.Tensor:
            return torch.empty(self._files.shape(name), device="meta")

        try:
            return list(self._convert(first, group, shaped))
        except ValueError:
            return [first]  # `tensor` will say what does not fit

    def _convert(self, first: str, group: Group, make: Any) -> dict[str, Any]:
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(first, name, pattern, make(name))
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            found = [name for names in group.sources.values() for name in names]
            raise ValueError(
                f"cannot be made of {', '.join(found[:4])}{', ...' if found[4:] else ''}: {error}"
            ) from None
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


# -- ties -----------------------------------------------------------------------------------------


def fit_to_files(files: Any, model: Any) -> None:
    """Prepare a model for a pretrained one's files, as `from_pretrained` would.

    Weights that the configuration ties, but of which the files have two different tensors, are
    untied with a warning. The conversions that the files need are remembered: transformers reverts
    them when it saves the model.

    Args:
        files: `ModelFiles`. If there are no weights, nothing is done.
        model: of transformers, on meta.
    """
    try:
        names = convert_names(files.tensor_names(), model)
    except (FileNotFoundError, ConnectionError):  # the weights slot will say so, if it reads them
        return
    model._weight_conversions = names.conversions
    both = [pair for pair in model.all_tied_weights_keys.items() if set(pair) <= set(names.groups)]
    if not both:
        return
    stored = Converted(Safetensors(files.weights()), model)
    apart = {name: other for name, other in both if not equal(stored, name, other)}
    for name, other in apart.items():
        log.warning(
            "the configuration of %s ties %s to %s, but its files have two different tensors: "
            "they are not tied",
            files.path,
            name,
            other,
        )
    untie(model, apart)
    if apart and not model.all_tied_weights_keys:
        # So that whatever reads an export does not tie them.
        model.config.tie_word_embeddings = False


def untie(model: Any, names: Iterable[str]) -> None:
    """Give parameters that are tied to others tensors of their own, on meta."""
    for name in names:
        module, _, own = name.rpartition(".")
        parent = model.get_submodule(module)
        old = getattr(parent, own)
        setattr(parent, own, nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad))
        model.all_tied_weights_keys.pop(name, None)


def equal(stored: Converted, name: str, other: str) -> bool:
    """Whether two tensors of the files are the same, read a piece at a time."""
    one, two = stored.tensor(name), stored.tensor(other)
    if one.shape != two.shape:
        return False
    rows = one.shape[0] if one.ndim else 1
    step = max(1, (1 << 22) // max(1, one.shape.numel() // max(1, rows)))
    return all(
        torch.equal(stored.read(name, part), stored.read(other, part))
        for part in ((slice(start, min(rows, start + step)),) for start in range(0, rows, step))
    )
