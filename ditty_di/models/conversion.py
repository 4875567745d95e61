"""Map tensors of files to those of transformers' models: names, merged experts, tied weights.

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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ditty_di.messages import first_of
from ditty_di.models.coverage import within_block
from ditty_di.models.deferred import Deferred, deferred
from ditty_di.models.files import ModelFiles
from ditty_di.models.mxfp4 import converters as mxfp4_converters
from ditty_di.models.safetensors import Index, Safetensors
from ditty_di.models.stacked import fused_weights
from ditty_di.models.weights import own_class

log = logging.getLogger(__name__)


def bare_model(model: Any, config: Any = None) -> Any:
    """Return a model of the same class on meta, as transformers builds it.

    Weights that are no longer tied in `model` are not tied in it.

    Args:
        model: may be sharded and changed.
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

    Attributes:
        converter: of transformers; None where only the name changes.
        sources: names in the files, by the pattern of the converter that matched them.
    """

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Names:
    """The names that the files' tensors have in the model.

    Attributes:
        groups: by the name in the model; of several names the first.
        unused: names in the files that the model has no tensor for.
        conversions: those of transformers that matched a name. It reverts these when it saves.
    """

    groups: dict[str, Group]
    unused: list[str]
    conversions: list[Any]


def convert_names(names: Iterable[str], model: Any) -> Names:
    """Find the model's tensor for each tensor of the files, as `from_pretrained` does.

    Follows transformers' `core_model_loading.convert_and_load_state_dict_in_model`.

    Args:
        names: of the tensors in the files.
        model: of transformers, on meta.
    """
    names = sorted(names, key=dot_natural_key)
    known, prefix = model.state_dict(), model.base_model_prefix
    own = get_model_conversion_mapping(model)
    transforms = [*own, *mxfp4_converters(names)]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, Group] = {}
    unused = []
    for name in names:
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, pattern = rename_source_key(name, [], [], prefix, known)
        if new in known:
            group = groups.setdefault(new, Group(None if pattern is None else by_pattern[pattern]))
            group.sources[name if pattern is None else pattern].append(name)
        else:
            unused.append(name)
    return Names(groups, _unexpected(unused, model), [t for t in own if t.was_used()])


def _unexpected(names: list[str], model: Any) -> list[str]:
    """Return those that transformers warns about: files of old models have buffers, for example."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]


def made_when_missing(name: str, model: Any) -> bool:
    """Return whether a tensor need not be in files, for `_init_weights` makes it."""
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
        """Return the names of all tensors."""
        return list(self._groups)

    def tensor(self, name: str) -> Deferred:
        """Return the tensor, unread.

        Raises:
            ValueError: its parts in the files do not fit each other.
        """
        first, group = self._groups[name]
        if group.converter is None:
            return self._files.deferred(_stored_name(group))
        _require_experts(first, group, self._model)
        return deferred(self._convert(first, group, self._files.deferred)[name])

    def read(self, name: str, index: Index = None) -> torch.Tensor:
        """Return the tensor or a part of it; a view of the file where nothing is converted."""
        _, group = self._groups[name]
        if group.converter is None:
            return self._files.read(_stored_name(group), index)
        return self.tensor(name).read(index)

    def _targets(self, first: str, group: Group) -> list[str]:
        """Return the names of all that a conversion makes, by converting shapes."""

        def shaped(name: str) -> torch.Tensor:
            return torch.empty(self._files.shape(name), device="meta")

        try:
            return list(self._convert(first, group, shaped))
        except ValueError:
            return [first]  # `tensor` will say what does not fit

    def _convert(self, first: str, group: Group, load: Callable[[str], Any]) -> dict[str, Any]:
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(first, name, pattern, load(name))
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            found = [name for names in group.sources.values() for name in names]
            raise ValueError(f"cannot be made of {first_of(found, 4)}: {error}") from None
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


def _require_experts(name: str, group: Group, model: Any) -> None:
    """Raise ValueError where the files lack an expert of a merged tensor, or have too many."""
    if not any(isinstance(op, MergeModulelist) for op in group.converter.operations):
        return
    wanted = model.state_dict()[name].shape
    if len(wanted) != 3:
        return
    lacking, most = [], 0
    for pattern, names in group.sources.items():
        one = re.compile(pattern.replace("*.", r"(\d+)\.", 1))
        found = {int(match[1]): match for n in names if (match := one.search(n))}
        if not found or pattern.count("*.") != 1:
            return
        most = max(most, *found)
        match = next(iter(found.values()))
        start, stop = match.span(1)
        for expert in sorted({*range(wanted[0])} - {*found}):
            lacking.append(f"{match.string[:start]}{expert}{match.string[stop:]}")
    if most >= wanted[0]:
        raise ValueError(f"the files have {most + 1} experts, the model {wanted[0]}")
    if lacking:
        raise ValueError(f"the files lack {first_of(lacking, 4)}")


def _stored_name(group: Group) -> str:
    """Return the name in the files; transformers takes the first of several for one name."""
    return next(iter(group.sources.values()))[0]


# -- tied weights ---------------------------------------------------------------------------------


def fit_to_files(files: ModelFiles, model: Any) -> None:
    """Prepare a model for a pretrained one's files, as `from_pretrained` would.

    Weights that the configuration ties, but of which the files have two different tensors, are
    untied with a warning. The conversions that the files need are remembered: transformers reverts
    them when it saves the model.

    Args:
        files: if there are no weights, nothing is done.
        model: of transformers, on meta.

    Raises:
        ValueError: the files lack one of the experts, or have more than the model.
    """
    names = require_experts(files, model)
    if names is None:
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
            *(files.path, name, other),
        )
    untie(model, apart)
    if apart and not model.all_tied_weights_keys:
        # So that whatever reads an export does not tie them.
        model.config.tie_word_embeddings = False


def require_experts(files: ModelFiles, model: Any) -> Names | None:
    """Return the names that the files' tensors have in the model; None if there are no weights.

    Args:
        files: of the model.
        model: of transformers, on meta.

    Raises:
        ValueError: the files lack one of the experts, or have more than the model.
    """
    try:
        names = convert_names(files.tensor_names(), model)
    except (FileNotFoundError, ConnectionError):  # raised again when the weights are read
        return None
    for name, group in names.groups.items():
        if group.converter is not None:
            try:
                _require_experts(name, group, model)
            except ValueError as error:
                raise ValueError(f"model: {files.path}: {name}: {error}") from None
    _require_fused(files, names, model)
    return names


def _require_fused(files: ModelFiles, names: Names, model: Any) -> None:
    """Raise ValueError where the files have fused experts, but not those of a layer, or others."""
    weights = {path: getattr(owner, name).shape for path, owner, name in fused_weights(model)}
    kinds = {within_block(name) for name in names.groups}
    lacking = [path for path in weights if path not in names.groups and within_block(path) in kinds]
    if lacking:
        raise ValueError(f"model: {files.path}: the files lack {first_of(lacking, 4)}")
    plain = {path: g for path, g in names.groups.items() if path in weights and not g.converter}
    if not plain or files.folder is None:  # shapes on the hub would cost a download
        return
    stored = Safetensors(files.weights())
    for path, group in plain.items():
        there, wanted = list(stored.shape(_stored_name(group))), list(weights[path])
        if there != wanted:
            raise ValueError(f"model: {files.path}: {path}: {there} there, {wanted} in the model")


def untie(model: Any, names: Iterable[str]) -> None:
    """Give parameters that are tied to others tensors of their own, on meta."""
    for name in names:
        module, _, own = name.rpartition(".")
        parent = model.get_submodule(module)
        old = getattr(parent, own)
        setattr(parent, own, nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad))
        model.all_tied_weights_keys.pop(name, None)


def equal(stored: Converted, name: str, other: str) -> bool:
    """Return whether two tensors of the files are the same, read piece by piece."""
    one, two = stored.tensor(name), stored.tensor(other)
    return one.shape == two.shape and all(
        torch.equal(stored.read(name, part), stored.read(other, part))
        for part in pieces(one.shape, 1 << 22)
    )


def pieces(shape: torch.Size, elements: int) -> Iterable[tuple[slice, ...]]:
    """Return slices of rows that split a shape into pieces of about `elements` elements."""
    rows = shape[0] if shape else 1
    step = max(1, elements // max(1, shape.numel() // max(1, rows)))
    return ((slice(start, min(rows, start + step)),) for start in range(0, rows, step))
