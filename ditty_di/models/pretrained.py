"""Filling a parallelised model from a pretrained one's files: each rank reads its own slices."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.models.files import ModelFiles
from ditty_di.models.safetensors import Index, Safetensors
from ditty_di.models.weights import generator_for, local, slices, transformers_model
from ditty_di.names import base_fqn

if TYPE_CHECKING:
    from ditty_di.protocols import MissingWeightsFn

log = logging.getLogger(__name__)

#: Standard deviation of a new row of an embedding, in those of the old rows. Large enough that
#: new rows differ in bf16 too.
_NEW_ROW_NOISE = 0.01


class Pretrained:
    """Fills a model with the values that a folder, or a model on the hub, has for it.

    Every parameter is read by its name in the files (`ditty_di.names.base_fqn`), cast to its own
    dtype, and each rank reads only the slices that it holds. A module with `fill_from` makes its
    tensors (all but a `bias`) from what it reads: quantised layers. Buffers that are not saved,
    such as rotary frequencies, are recomputed by the `_init_weights` of the transformers model. The
    rows by which an embedding or head is larger than in the files become the mean of the old rows
    plus a little noise (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), the same on every
    layout.

    Args:
        path: a folder that `save_pretrained` wrote, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        missing: gives values to what the files do not have, such as adapters. None raises.
        seed: of the noise in new rows.

    Raises, when called:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: a damaged file, a tensor of another shape there, one that they lack, or a
            quantised layer whose shards are not what one process would have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        missing: MissingWeightsFn | None = None,
        seed: int = 0,
    ) -> None:
        self.path, self.revision = os.fspath(path), revision
        self.missing, self.seed = missing, seed
        self._identity: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Which base this is: `path`, `revision` (the hub's commit, or None) and `hash`.

        Only the hash says whether two bases are the same: a folder may be copied.
        """
        if self._identity is None:
            self._identity = ModelFiles(self.path, self.revision).identity()
        return dict(self._identity)

    def __call__(self, model: nn.Module, /, *, device: torch.device) -> None:
        """Fills `model`; see the class."""
        prefix, base = transformers_model(model)
        source = _Source(
            Safetensors(ModelFiles(self.path, self.revision).safetensors()), base, prefix
        )
        with torch.no_grad():
            if base is not None:
                _compute_buffers(model, base)
            computed = self._fill_modules(model, source)
            lacking = self._fill_tensors(model, source, computed)
            if source.problems:
                shown = "\n  ".join(source.problems[:10])
                raise ValueError(f"weights: {self.path} does not fit the model:\n  {shown}")
            if lacking and self.missing is None:
                raise ValueError(
                    f"weights: {self.path} has no values for {len(lacking)} tensors of the model: "
                    f"{lacking[:5]}; `missing` can name what makes them "
                    f"(ditty_di.adapters.initialize for adapters)"
                )
        if lacking and self.missing is not None:
            self.missing(model, lacking, device=device)
        if unused := source.unused():
            log.warning(
                "%s has %d tensors that the model does not: %s", self.path, len(unused), unused[:5]
            )

    def _fill_modules(self, model: nn.Module, source: _Source) -> set[str]:
        """Lets modules that compute their tensors do so; the names of these tensors."""
        computed: set[str] = set()
        sharded: list[tuple[nn.Module, Any]] = []
        for path, module in model.named_modules():
            if not hasattr(module, "fill_from"):
                continue
            prefix = f"{path}." if path else ""
            read = partial(source.read, prefix)
            try:
                module.fill_from(read)  # type: ignore[operator]
            except _NotInFiles as error:
                source.problems.append(f"{error}: not in the files")
            except ValueError as error:
                source.problems.append(f"{path}: {error}")
            own = {**module._parameters, **module._buffers}
            computed |= {prefix + name for name in own if name != "bias"}
            if hasattr(module, "verify_shards"):
                sharded.append((module, read))
        if sharded and not source.problems:
            # The smallest: it is gathered whole.
            module, read = min(sharded, key=lambda pair: _size(pair[0]))
            module.verify_shards(read)  # type: ignore[operator]
        return computed

    def _fill_tensors(self, model: nn.Module, source: _Source, computed: set[str]) -> list[str]:
        """Reads every other parameter and saved buffer; the names of those not in the files."""
        saved = model.state_dict().keys()
        same: dict[int, list[str]] = {}
        named: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **{n: b for n, b in model.named_buffers(remove_duplicate=False) if n in saved},
        }
        for name, tensor in named.items():
            if name not in computed:
                same.setdefault(id(tensor), []).append(name)
        lacking = []
        for names in same.values():
            target = named[names[0]]
            key = next((k for name in names if (k := source.key(name)) is not None), None)
            if key is None:
                lacking.append(names[0])
            else:
                self._read_into(target, key, names[0], source)
        return lacking

    def _read_into(self, target: Tensor, key: str, name: str, source: _Source) -> None:
        there, wanted = source.files.shape(key), tuple(target.shape)
        old_rows = None if there == wanted else source.rows_to_grow_from(there, wanted)
        if there != wanted and old_rows is None:
            source.problems.append(f"{name}: {_differ(there, wanted)}")
            return
        here, index = local(target), slices(target)
        if not here.numel():
            return
        if old_rows is None or index[0].stop <= old_rows:
            here.copy_(source.files.read(key, index))
            return
        kept = max(0, old_rows - index[0].start)
        if kept:
            old = slice(index[0].start, old_rows)
            here[:kept].copy_(source.files.read(key, (old, *index[1:])))
        mean, spread = _row_statistics(source.files, key)
        for row in range(index[0].start + kept, index[0].stop):
            noise = torch.randn(mean.shape, generator=generator_for(self.seed, f"{key}/{row}"))
            new = mean + _NEW_ROW_NOISE * spread * noise
            here[row - index[0].start].copy_(new[index[1:]])


class _Source:
    """The files, under the names that a model's tensors have."""

    def __init__(self, files: Safetensors, base: Any, prefix: str) -> None:
        self.files, self.base = files, base
        self.problems: list[str] = []
        self._prefix = f"{prefix}." if prefix else ""
        # Files of a bare transformer lack the name that a task's model gives it, or have it beyond.
        body = getattr(base, "base_model_prefix", "")
        self._body = f"{body}." if body else ""
        self._used: set[str] = set()
        self._ties: dict[str, set[str]] = {}
        for name, other in getattr(base, "all_tied_weights_keys", {}).items():
            group = self._ties.get(other, {other}) | self._ties.get(name, {name})
            self._ties.update(dict.fromkeys(group, group))

    def key(self, name: str) -> str | None:
        """Its name in the files, or that of something it is tied to; None if they have neither."""
        plain = base_fqn(name.removeprefix(self._prefix))
        tied = self._ties.get(plain, {plain})
        for candidate in (plain, *sorted(tied - {plain})):
            for spelling in self._spellings(candidate):
                if spelling in self.files:
                    self._used |= {s for t in tied for s in self._spellings(t)}
                    return spelling
        return None

    def read(self, prefix: str, name: str, index: Index = None) -> Tensor:
        """What a module with `fill_from` reads with: names are relative to the module."""
        key = self.key(prefix + name)
        if key is None:
            raise _NotInFiles(base_fqn((prefix + name).removeprefix(self._prefix)))
        return self.files.read(key, index)

    def rows_to_grow_from(self, there: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
        """How many rows the files have of a tensor with one row per token, if it has grown."""
        config = getattr(self.base, "config", None)
        if config is None or not wanted or there[1:] != wanted[1:]:
            return None
        grown = wanted[0] == config.get_text_config().vocab_size and there[0] < wanted[0]
        return there[0] if grown else None

    def unused(self) -> list[str]:
        return [name for name in self.files.names() if name not in self._used]

    def _spellings(self, name: str) -> Iterable[str]:
        yield name
        if self._body:
            yield name.removeprefix(self._body)
            yield self._body + name


class _NotInFiles(Exception): ...


def _compute_buffers(model: nn.Module, base: Any) -> None:
    """Runs the model's own initialisation of each module that has buffers which are not saved."""
    for module in model.modules():
        if not module._non_persistent_buffers_set or not any(
            module._buffers[name] is not None for name in module._non_persistent_buffers_set
        ):
            continue
        parameters = module._parameters
        # What it would do to the parameters costs time and random numbers, and is overwritten.
        module._parameters = {
            name: None if p is None else nn.Parameter(_no_memory(p), requires_grad=False)
            for name, p in parameters.items()
        }
        try:
            with torch.random.fork_rng([]):
                base._init_weights(module)
        finally:
            module._parameters = parameters


def _no_memory(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _row_statistics(files: Safetensors, key: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows of a tensor, in float32, a piece at a time."""
    rows, *rest = files.shape(key)
    total, squares = torch.zeros(rest, dtype=torch.float64), torch.zeros(rest, dtype=torch.float64)
    step = max(1, (1 << 20) // max(1, torch.Size(rest).numel()))
    for start in range(0, rows, step):
        piece = files.read(key, (slice(start, min(rows, start + step)),)).double()
        total += piece.sum(0)
        squares += piece.square().sum(0)
    mean = total / rows
    return mean.float(), (squares / rows - mean.square()).clamp_min(0).sqrt().float()


def _differ(there: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{list(there)} there, {list(wanted)} in the model"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
