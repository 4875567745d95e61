"""Fill a parallelized model from a pretrained one's files: each rank reads its own slices."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.fqn import base_fqn
from ditty_di.models.conversion import Converted, bare_model, equal, made_when_missing, pieces
from ditty_di.models.deferred import Deferred
from ditty_di.models.files import ModelFiles
from ditty_di.models.safetensors import Index, Safetensors
from ditty_di.models.weights import (
    initializer,
    local,
    slices,
    swapped,
    transformers_model,
    unsharded,
)
from ditty_di.protocols import MissingWeightsFn
from ditty_di.seed import derived_seed, generator_for, run_seed

log = logging.getLogger(__name__)

#: Standard deviation of a new row of an embedding, relative to that of the old rows. Large enough
#: that new rows differ in bf16 too.
_NEW_ROW_NOISE = 0.01


class Pretrained:
    """Fill a model with the values that a folder, or a model on the hub, has for it.

    Every parameter is read by its name in the files (`ditty_di.fqn.base_fqn`), cast to its own
    dtype, and each rank reads only the slices that it holds. Tensors that transformers renames,
    merges or splits when it loads a model (`ditty_di.models.conversion`) are read likewise. A
    module with `fill_from` computes its tensors (all but a `bias`) from what it reads: quantized
    layers. What is not saved, such as rotary frequencies and Marian's sinusoidal positions, is
    computed by the `_init_weights` of the transformers model. The rows by which an embedding or
    head is larger than in the files become the mean of the old rows plus a little noise
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), the same on every layout.

    Args:
        path: a folder that `save_pretrained` wrote, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.
        init_missing: initializes what the files do not have, such as adapters. None raises instead.
        seed: of the noise in new rows; None is the run's seed (`ditty_di.seed`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        init_missing: MissingWeightsFn | None = None,
        seed: int | None = None,
    ) -> None:
        self.path, self.revision = os.fspath(path), revision
        self.init_missing, self._seed = init_missing, seed
        self._identity: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """The seed of the noise in new rows."""
        return run_seed() if self._seed is None else self._seed

    def identity(self) -> dict[str, Any]:
        """Return which base this is: `path`, `revision` (the hub's commit, or None) and `hash`.

        Only the hash tells whether two bases are the same: a folder may be copied.
        """
        if self._identity is None:
            self._identity = ModelFiles(self.path, self.revision).identity()
        return dict(self._identity)

    def __call__(self, model: nn.Module, /, *, device: torch.device) -> None:
        """Fill `model`, which `materialize` has allocated on `device`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
            ValueError: a damaged file, a tensor of another shape there, one that the files lack,
                two different tensors for weights that the model ties, or a quantized layer whose
                shards are not what one process would have.
        """
        prefix, base = transformers_model(model)
        paths = ModelFiles(self.path, self.revision).weights()
        size = sum(path.stat().st_size for path in paths)
        log.info("reading the weights of %s (%.3g GB) ...", self.path, size / 1e9)
        source = _Source(Safetensors(paths), base, prefix, self.seed)
        with torch.no_grad():
            if base is not None:
                _init_unsaved(model, source)
            computed = _fill_modules(model, source)
            lacking = _fill_tensors(model, source, computed)
        if source.problems:
            shown = "\n  ".join(source.problems[:10])
            raise ValueError(f"weights: {self.path} does not fit the model:\n  {shown}")
        if lacking:
            if self.init_missing is None:
                raise ValueError(
                    f"weights: {self.path} has no values for {len(lacking)} tensors of the model: "
                    f"{lacking[:5]}; {source.remedy(lacking)}"
                )
            self.init_missing(model, lacking, device=device)
        if unused := source.unused():
            log.warning(
                "%s has %d tensors that the model does not: %s", self.path, len(unused), unused[:5]
            )


class _Source:
    """The files, under the names that a model's tensors have."""

    def __init__(self, files: Safetensors, base: Any, prefix: str, seed: int) -> None:
        self.base, self.seed = base, seed
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
        """Return the name in the files, or that of a tensor tied to it; None if they lack both."""
        plain = self.plain(name)
        tied = self._ties.get(plain, {plain})
        for candidate in (plain, *sorted(tied - {plain})):
            if candidate in self._tensors or candidate in self._files:
                self._used |= tied
                return candidate
        return None

    def tensor(self, key: str) -> Deferred:
        return self._of(key).tensor(key)

    def read(self, path: str, name: str, index: Index = None) -> Any:
        """Read a tensor for a module with `fill_from`, or return it unread without an index.

        Args:
            path: of the module.
            name: relative to the module; that of the module itself is empty.
            index: slices of it.
        """
        whole = f"{path}.{name}".strip(".")
        key = self.key(whole)
        if key is None:
            raise KeyError(self.plain(whole))
        return self.tensor(key) if index is None else self._of(key).read(key, index)

    def is_made(self, name: str) -> bool:
        """Return whether the files need not have it, for `_init_weights` makes it."""
        return self._stock is not None and made_when_missing(self.plain(name), self._stock)

    def is_whole(self, name: str, tensor: Tensor) -> bool:
        """Return whether the files have it in the shape that it has in the model."""
        key = self.key(name)
        return key is not None and self.tensor(key).shape == tensor.shape

    @property
    def vocab_size(self) -> int | None:
        config = getattr(self.base, "config", None)
        return None if config is None else config.get_text_config().vocab_size

    def unused(self) -> list[str]:
        names = self._files.names() if self._stock is None else self._tensors.unused
        return [name for name in names if name not in self._used]

    def remedy(self, lacking: list[str]) -> str:
        """Return advice for tensors that the files lack."""
        tied = getattr(self._stock, "_tied_weights_keys", None) or {}
        if any(self.plain(name) in tied for name in lacking):
            return (
                "the configuration does not tie them to others: if they are tied, write "
                "model.tie_word_embeddings=true"
            )
        return "`init_missing` can name what makes them (ditty_di.adapters.initialize for adapters)"

    def plain(self, name: str) -> str:
        return base_fqn(name.removeprefix(self._prefix))

    def _of(self, key: str) -> Converted:
        return self._tensors if key in self._tensors else self._files


def _init_unsaved(model: nn.Module, source: _Source) -> None:
    """Run the model's own initialization of what the files do not have and need not have.

    That is done by the module that owns such a tensor, or by one around it.
    """
    made = {
        id(tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if source.is_made(name) and not source.is_whole(name, tensor)
    }
    paths = set()
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        not_saved = any(module._buffers[n] is not None for n in module._non_persistent_buffers_set)
        if not_saved or any(id(tensor) in made for tensor in own.values()):
            parts = path.split(".")
            paths |= {".".join(parts[:n]) for n in range(len(parts) + 1)}
    initialize = initializer(model)
    inside = transformers_model(model)[0]
    chosen = [
        (path, module)
        for path, module in model.named_modules()
        if path in paths and f"{path}.".startswith(f"{inside}." if inside else "")
    ]

    def without_memory(tensor: Tensor) -> Tensor | None:
        # What is done to parameters on meta costs no time and changes nothing.
        if id(tensor) in made or not isinstance(tensor, nn.Parameter):
            return None
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    with swapped(model.modules(), without_memory), torch.random.fork_rng([]):
        for path, module in reversed(chosen):
            with unsharded([module], set()):
                torch.manual_seed(derived_seed(source.seed, base_fqn(path)))
                initialize(module)


def _fill_modules(model: nn.Module, source: _Source) -> set[str]:
    """Fill modules that compute their tensors from files; return the names of these tensors."""
    computed: set[str] = set()
    sharded: list[tuple[Any, Any]] = []
    for path, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "fill_from"):
            continue
        prefix = f"{path}." if path else ""
        read = partial(source.read, path)
        try:
            layer.fill_from(read)
        except KeyError as error:
            source.problems.append(f"{error.args[0]}: not in the files")
        except ValueError as error:
            source.problems.append(f"{path}: {error}")
        own = {**module._parameters, **module._buffers}
        computed |= {prefix + name for name in own if name != "bias"}
        if hasattr(layer, "verify_shards"):
            sharded.append((layer, read))
    if sharded and not source.problems:
        # The smallest: it is gathered whole.
        layer, read = min(sharded, key=lambda pair: sum(p.numel() for p in pair[0].parameters()))
        layer.verify_shards(read)
    return computed


def _fill_tensors(model: nn.Module, source: _Source, computed: set[str]) -> list[str]:
    """Read every other parameter and persistent buffer; return the names of those not in files."""
    saved = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in buffers if name in saved},
    }
    tied: dict[int, list[str]] = {}
    for name, tensor in named.items():
        if name not in computed:
            tied.setdefault(id(tensor), []).append(name)
    lacking = []
    for names in tied.values():
        key = next((k for name in names if (k := source.key(name)) is not None), None)
        if key is not None:
            try:
                _fill(named[names[0]], source.tensor(key), key, names[0], source)
            except ValueError as error:
                source.problems.append(f"{names[0]}: {error}")
        elif not any(source.is_made(name) for name in names):
            lacking.append(names[0])
    return lacking


def _fill(target: Tensor, stored: Deferred, key: str, name: str, source: _Source) -> None:
    """Read this rank's slices of a tensor; make the rows or entries of new tokens.

    Raises:
        ValueError: the shapes do not fit.
    """
    there, wanted = tuple(stored.shape), tuple(target.shape)
    here, index = local(target), slices(target)
    vocab = source.vocab_size
    same_rank = len(there) == len(wanted) > 0
    grown = same_rank and there[1:] == wanted[1:] and there[0] < wanted[0] == vocab
    widened = len(wanted) > 1 and there[:-1] == wanted[:-1] and there[-1] < wanted[-1] == vocab
    if source.is_made(name) and widened:
        # A bias of the logits, whose new entries `_init_weights` has made.
        stored.copy_into(here[..., : there[-1]], (*index[:-1], slice(0, there[-1])))
        return
    if there != wanted and not grown:
        raise ValueError(f"{list(there)} there, {list(wanted)} in the model")
    if not here.numel():
        return
    old = slice(index[0].start, min(index[0].stop, there[0])) if grown else None
    if old is None or old.stop == index[0].stop:
        stored.copy_into(here, index)
        return
    kept = max(0, old.stop - old.start)
    if kept:
        stored.copy_into(here[:kept], (old, *index[1:]))
    mean, spread = _row_statistics(stored)
    for row in range(index[0].start + kept, index[0].stop):
        noise = torch.randn(mean.shape, generator=generator_for(source.seed, f"{key}/{row}"))
        new = mean + _NEW_ROW_NOISE * spread * noise
        here[row - index[0].start].copy_(new[index[1:]])


def _row_statistics(stored: Deferred) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the rows, in float32, read piece by piece."""
    rows, *rest = stored.shape
    total, squares = torch.zeros(rest, dtype=torch.float64), torch.zeros(rest, dtype=torch.float64)
    for part in pieces(stored.shape, 1 << 20):
        piece = stored.read(part).double()
        total += piece.sum(0)
        squares += piece.square().sum(0)
    mean = total / rows
    return mean.float(), (squares / rows - mean.square()).clamp_min(0).sqrt().float()
