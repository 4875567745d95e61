"""Fill a parallelised model from a pretrained one's files: each rank reads its own slices."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.models.conversion import Converted, bare_model, equal, made_when_missing
from ditty_di.models.deferred import Deferred
from ditty_di.models.files import ModelFiles
from ditty_di.models.safetensors import Index, Safetensors
from ditty_di.models.weights import (
    generator_for,
    initializer,
    local,
    slices,
    transformers_model,
    unsharded,
)
from ditty_di.names import base_fqn
from ditty_di.seed import run_seed

if TYPE_CHECKING:
    from ditty_di.protocols import MissingWeightsFn

log = logging.getLogger(__name__)

#: Standard deviation of a new row of an embedding, in those of the old rows. Large enough that
#: new rows differ in bf16 too.
_NEW_ROW_NOISE = 0.01


class Pretrained:
    """Fills a model with the values that a folder, or a model on the hub, has for it.

    Every parameter is read by its name in the files (`ditty_di.names.base_fqn`), cast to its own
    dtype, and each rank reads only the slices that it holds. Tensors that transformers renames,
    merges or splits when it loads a model (`ditty_di.models.conversion`) are read likewise. A
    module with `fill_from` makes its tensors (all but a `bias`) from what it reads: quantised
    layers. What is not saved, such as rotary frequencies and Marian's sinusoidal positions, is
    computed by the `_init_weights` of the transformers model. The rows by which an embedding or
    head is larger than in the files become the mean of the old rows plus a little noise
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), the same on every layout.

    Args:
        path: a folder that `save_pretrained` wrote, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        missing: gives values to what the files do not have, such as adapters. None raises.
        seed: of the noise in new rows; None is the run's seed (`ditty_di.seed`).

    Raises, when called:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: a damaged file, a tensor of another shape there, one that they lack, two
            different tensors for weights that the model ties, or a quantised layer whose shards are
            not what one process would have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        missing: MissingWeightsFn | None = None,
        seed: int | None = None,
    ) -> None:
        self.path, self.revision = os.fspath(path), revision
        self.missing, self._seed = missing, seed
        self._identity: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """The seed of the noise in new rows."""
        return run_seed() if self._seed is None else self._seed

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
        paths = ModelFiles(self.path, self.revision).weights()
        size = sum(path.stat().st_size for path in paths)
        log.info("reading the weights of %s (%.3g GB) ...", self.path, size / 1e9)
        files = Safetensors(paths)
        source = _Source(files, base, prefix)
        with torch.no_grad():
            if base is not None:
                _compute(model, source, self.seed)
            computed = self._fill_modules(model, source)
            lacking = self._fill_tensors(model, source, computed)
            if source.problems:
                shown = "\n  ".join(source.problems[:10])
                raise ValueError(f"weights: {self.path} does not fit the model:\n  {shown}")
            if lacking and self.missing is None:
                raise ValueError(
                    f"weights: {self.path} has no values for {len(lacking)} tensors of the model: "
                    f"{lacking[:5]}; {source.remedy(lacking)}"
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
            if key is not None:
                self._read_into(target, key, names[0], source)
            elif not any(source.is_made(name) for name in names):
                lacking.append(names[0])
        return lacking

    def _read_into(self, target: Tensor, key: str, name: str, source: _Source) -> None:
        try:
            stored = source.tensor(key)
        except ValueError as error:
            source.problems.append(f"{name}: {error}")
            return
        there, wanted = tuple(stored.shape), tuple(target.shape)
        if source.is_made(name) and source.has_grown(there, wanted):
            # A bias of the logits, whose new entries `_init_weights` has made.
            part = (*slices(target)[:-1], slice(0, there[-1]))
            stored.copy_into(local(target)[..., : there[-1]], part)
            return
        old_rows = None if there == wanted else source.rows_to_grow_from(there, wanted)
        if there != wanted and old_rows is None:
            source.problems.append(f"{name}: {_differ(there, wanted)}")
            return
        here, index = local(target), slices(target)
        if not here.numel():
            return
        if old_rows is None or index[0].stop <= old_rows:
            stored.copy_into(here, index)
            return
        kept = max(0, old_rows - index[0].start)
        if kept:
            old = slice(index[0].start, old_rows)
            stored.copy_into(here[:kept], (old, *index[1:]))
        mean, spread = _row_statistics(stored)
        for row in range(index[0].start + kept, index[0].stop):
            noise = torch.randn(mean.shape, generator=generator_for(self.seed, f"{key}/{row}"))
            new = mean + _NEW_ROW_NOISE * spread * noise
            here[row - index[0].start].copy_(new[index[1:]])


class _Source:
    """The files, under the names that a model's tensors have."""

    def __init__(self, files: Safetensors, base: Any, prefix: str) -> None:
        self.base = base
        self.problems: list[str] = []
        self._prefix = f"{prefix}." if prefix else ""
        self._stock = None if base is None else bare_model(base)
        self._tensors, self._files = Converted(files, self._stock), Converted(files)
        self._used: set[str] = set()
        self._ties: dict[str, set[str]] = {}
        for name, other in getattr(base, "all_tied_weights_keys", {}).items():
            group = self._ties.get(other, {other}) | self._ties.get(name, {name})
            self._ties.update(dict.fromkeys(group, group))
            both = name in self._tensors and other in self._tensors
            if both and not equal(self._tensors, name, other):
                self.problems.append(
                    f"{name} and {other} are different in the files and tied in the model; build "
                    f"it with from_pretrained, or with tie_word_embeddings=false"
                )

    def key(self, name: str) -> str | None:
        """Its name in the files, or that of something it is tied to; None if they have neither."""
        plain = self._plain(name)
        tied = self._ties.get(plain, {plain})
        for candidate in (plain, *sorted(tied - {plain})):
            if candidate in self._tensors or candidate in self._files:
                self._used |= tied
                return candidate
        return None

    def tensor(self, key: str) -> Deferred:
        return self._of(key).tensor(key)

    def read(self, prefix: str, name: str, index: Index = None) -> Tensor:
        """What a module with `fill_from` reads with: names are relative to the module."""
        key = self.key(prefix + name)
        if key is None:
            raise _NotInFiles(self._plain(prefix + name))
        return self._of(key).read(key, index)

    def is_made(self, name: str) -> bool:
        """Whether the files need not have it, for the model's own `_init_weights` makes it."""
        return self._stock is not None and made_when_missing(self._plain(name), self._stock)

    def is_whole(self, name: str, tensor: Tensor) -> bool:
        """Whether the files have it in the shape that it has in the model."""
        key = self.key(name)
        return key is not None and self.tensor(key).shape == tensor.shape

    def rows_to_grow_from(self, there: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
        """How many rows the files have of a tensor with one row per token, if it has grown."""
        config = getattr(self.base, "config", None)
        if config is None or not wanted or there[1:] != wanted[1:]:
            return None
        grown = wanted[0] == config.get_text_config().vocab_size and there[0] < wanted[0]
        return there[0] if grown else None

    def has_grown(self, there: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether the model has more entries in the last dimension, one for each token."""
        config = getattr(self.base, "config", None)
        if config is None or len(wanted) < 2 or there[:-1] != wanted[:-1]:
            return False
        return there[-1] < wanted[-1] == config.get_text_config().vocab_size

    def unused(self) -> list[str]:
        if self._stock is not None:
            return [name for name in self._tensors.unused if name not in self._used]
        return [name for name in self._files.names() if name not in self._used]

    def remedy(self, lacking: list[str]) -> str:
        """Return advice for tensors that the files lack."""
        tied = getattr(self._stock, "_tied_weights_keys", None) or {}
        if any(self._plain(name) in tied for name in lacking):
            return (
                "the configuration does not tie them to others: if they are tied, write "
                "model.tie_word_embeddings=true"
            )
        return "`missing` can name what makes them (ditty_di.adapters.initialize for adapters)"

    def _plain(self, name: str) -> str:
        return base_fqn(name.removeprefix(self._prefix))

    def _of(self, key: str) -> Converted:
        return self._tensors if key in self._tensors else self._files


class _NotInFiles(Exception): ...


def _compute(model: nn.Module, source: _Source, seed: int) -> None:
    """Run the model's own initialisation of what the files do not have and need not have.

    That is done by the module that owns such a tensor, or by one around it.
    """
    made = {
        id(tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if source.is_made(name) and not source.is_whole(name, tensor)
    }
    paths = set()
    for path, module in model.named_modules():
        own = [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        not_saved = any(module._buffers[n] is not None for n in module._non_persistent_buffers_set)
        if not_saved or any(id(t) in made for t in own):
            parts = path.split(".")
            paths |= {".".join(parts[:n]) for n in range(len(parts) + 1)}
    initialize = initializer(model)
    chosen = [(path, m) for path, m in model.named_modules() if path in paths]
    inside = transformers_model(model)[0]
    with _without_memory(model, except_for=made), torch.random.fork_rng([]):
        for path, module in reversed(chosen):
            if f"{path}.".startswith(f"{inside}." if inside else ""):
                with unsharded([module], set()):
                    torch.manual_seed(generator_for(seed, base_fqn(path)).initial_seed())
                    initialize(module)


@contextmanager
def _without_memory(model: nn.Module, except_for: set[int]) -> Iterator[None]:
    """Within it, parameters are on meta: what is done to them costs no time and changes nothing.

    Args:
        except_for: ids of those that are as they were.
    """
    kept = [(module, module._parameters) for module in model.modules()]
    for module, parameters in kept:
        module._parameters = {
            name: p
            if p is None or id(p) in except_for
            else nn.Parameter(_no_memory(p), requires_grad=False)
            for name, p in parameters.items()
        }
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters = parameters


def _no_memory(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _row_statistics(stored: Deferred) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the rows of a tensor, in float32, a piece at a time."""
    rows, *rest = stored.shape
    total, squares = torch.zeros(rest, dtype=torch.float64), torch.zeros(rest, dtype=torch.float64)
    step = max(1, (1 << 20) // max(1, torch.Size(rest).numel()))
    for start in range(0, rows, step):
        piece = stored.read((slice(start, min(rows, start + step)),)).double()
        total += piece.sum(0)
        squares += piece.square().sum(0)
    mean = total / rows
    return mean.float(), (squares / rows - mean.square()).clamp_min(0).sqrt().float()


def _differ(there: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{list(there)} there, {list(wanted)} in the model"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
