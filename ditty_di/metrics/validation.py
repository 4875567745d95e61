"""Held-out data during training: the exact loss."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ditty_di.runtime import seed_everything

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, DataLoader, DataLoaderFactory, Loss
    from ditty_di.runtime import Runtime

    Forward = Callable[[dict[str, Tensor]], Any]

NO_BATCHES = """\
validator: the validation loader yields no batch. Its data set may have fewer rows than one batch \
needs: lower the loader's batch_size, or give it more rows (data.validation)."""
NO_LABELS = """\
validator: not one label of the validation data counts (all are masked, usually with -100), so \
there is no loss to average; look at the labels of data.validation."""
OTHER_DATA = """\
validator: the validation loader yielded other data than the first time ({first} labels, then \
{now}). A validation loss can only be compared with earlier ones on the same batches; give the \
validator a loader that starts over with each iteration (no shuffling)."""


def _as_it_is(batch: Batch) -> Batch | None:
    return batch


class Validator:
    """Validates every `every` steps on at most `max_batches` batches a rank (None: all).

    Fits the trainer's `validator` slot as a partial that lacks the last four arguments.

    `dataloader`: an object, or a factory called with this rank's `dp_rank` and `dp_world_size`
    before each validation; it must yield the same batches each time. `baselines` are reported
    beside the loss, for comparison (`{unigram_entropy: 7.1}`). `perplexity` reports exp(loss), for
    losses in nats a token. `first` validates before the first step as well, so that `report` can
    tell what training has changed.
    """

    @staticmethod
    def validate_arguments(*, every: int = 1, max_batches: int | None = None) -> None:
        for name, number in (("every", every), ("max_batches", max_batches)):
            if number is not None and number < 1:
                raise ValueError(f"validator: {name} must be at least 1; got {number}")

    def __init__(
        self,
        dataloader: DataLoader | DataLoaderFactory,
        *,
        every: int,
        max_batches: int | None = None,
        baselines: dict[str, float] | None = None,
        perplexity: bool = False,
        first: bool = False,
        model_parts: list[nn.Module],
        forward: Forward,
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None] = _as_it_is,
    ) -> None:
        self.validate_arguments(every=every, max_batches=max_batches)
        self.dataloader = dataloader
        self.every, self.max_batches = every, max_batches
        self.baselines, self.perplexity, self.first = dict(baselines or {}), perplexity, first
        self._done: list[tuple[int, float]] = []
        self.model_parts, self.forward, self.loss_fn = model_parts, forward, loss_fn
        self.runtime, self.prepare = runtime, prepare
        # An injected loader that remembers its position is put back to where it is now.
        state_dict = getattr(dataloader, "state_dict", None)
        self._start = copy.deepcopy(state_dict()) if state_dict is not None else None
        self._counted: tuple[Tensor, int] | None = None
        self._spare: Batch | None = None

    def should_validate(self, step: int) -> bool:
        """Step 0 is the time before the first."""
        return step % self.every == 0 if step else self.first

    def try_first_batch(self) -> None:
        """Count the first batch, so that data which cannot be validated on are found before
        training. Random numbers and the loader are left as found.

        Raises:
            ValueError: no batch on any rank. Loader, preprocessors and loss raise what they raise.
        """
        loader = self.dataloader
        if not callable(loader) and self._start is None and iter(loader) is loader:
            return  # a plain iterator: what is taken from it cannot be given back
        with torch.no_grad(), evaluating(self.model_parts), preserved_rng(self.runtime.device):
            first = next(iter(self._batches()), None)
            if first is not None:
                self.loss_fn.count(first[1])
            if not self.runtime.any(first is not None):
                raise ValueError(NO_BATCHES)
        if not callable(loader) and self._start is not None:
            loader.load_state_dict(copy.deepcopy(self._start))  # type: ignore[attr-defined]

    def report(self) -> str:
        """The first and the last validation of this process side by side; empty if they are one."""
        if len(self._done) < 2:
            return ""
        (then, before), (now, after) = self._done
        return f"held-out loss {before:.4f} at step {then}, {after:.4f} at step {now}"

    def validate(self, step: int) -> dict[str, float]:
        """`loss`, the loss's own metrics and the baselines; {} when a stop was requested.

        The loss is the sum over all batches and ranks divided by the global count, as one batch
        of everything would give it. Training flags, sharding and random numbers are left as found.

        Raises:
            ValueError: no batch, no label that counts, or other data than the first time.
        """
        with torch.no_grad(), evaluating(self.model_parts), preserved_rng(self.runtime.device):
            if self._counted is None:
                self._counted = self._count()
            if self._counted is None:
                return {}
            values = self._losses(*self._counted)
        if values:
            self._done = [*self._done[:1], (step, values["loss"])]
        if values and self.perplexity:
            values["perplexity"] = float(np.exp(values["loss"]))
        return values | self.baselines if values else {}

    def _batches(self) -> Iterator[tuple[Batch, Batch]]:
        """The loader's batches, and what preprocessors make of them; none that they reject.

        What they draw of random numbers is the same each time, so that losses can be compared.
        """
        seed_everything(self.runtime.seed)
        for batch in self._loaded():
            prepared = self.prepare(batch)
            if prepared is not None:
                yield batch, prepared

    def _loaded(self) -> Iterable[Batch]:
        loader: Any = self.dataloader
        if callable(loader):
            loader = loader(dp_rank=self.runtime.dp_rank, dp_world_size=self.runtime.dp_world_size)
        elif self._start is not None:
            loader.load_state_dict(copy.deepcopy(self._start))
        return islice(iter(loader), self.max_batches)

    def _count(self) -> tuple[Tensor, int] | None:
        """The count over all ranks, and the largest number of batches of one of them."""
        runtime, batches = self.runtime, 0
        self._spare = None
        count: Tensor | None = None
        for loaded, batch in self._batches():
            if runtime.stop_requested():
                break
            self._spare = self._spare or loaded
            here = self.loss_fn.count(batch).double()
            count, batches = here if count is None else count + here, batches + 1
        if runtime.any(runtime.stop_requested()):
            return None
        of_ranks = [0.0] * runtime.dp_world_size
        of_ranks[runtime.dp_rank] = batches
        of_ranks = runtime.sum(of_ranks)
        if not of_ranks[0]:
            raise ValueError(NO_BATCHES)
        if not min(of_ranks):
            first = runtime.broadcast(self._spare)
            self._spare = self._spare or first
            if count is None:
                like = self.loss_fn.count(self._prepared(first))
                count = torch.zeros_like(like, dtype=torch.float64)
        assert count is not None
        total = runtime.sum(count.flatten().tolist())
        if not any(total):
            raise ValueError(NO_LABELS)
        return torch.tensor(total, dtype=torch.float64).reshape(count.shape), int(max(of_ranks))

    def _losses(self, global_count: Tensor, batches: int) -> dict[str, float]:
        runtime, device = self.runtime, self.runtime.device
        on_device = global_count.float().to(device)
        totals: dict[str, Tensor] = {}
        seen = torch.zeros_like(global_count, dtype=torch.float64)
        iterator = iter(self._batches())
        for _ in range(batches):
            if runtime.any(runtime.stop_requested()):
                return {}
            following = next(iterator, (None, None))[1]
            # A rank without further batches runs one again, weightless: the forward pass of a
            # sharded model needs all ranks.
            batch = following or self._prepared(self._spare)
            inputs, labels = batch
            output = self.forward({k: _to(v, device) for k, v in inputs.items()})
            loss, metrics = self.loss_fn(output, labels.to(device), on_device)
            for name, value in {**metrics, "loss": loss}.items():
                # Assigned also when weightless: all ranks sum the same names.
                before = totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                if following is not None:
                    totals[name] = before + value
            if following is not None:
                seen = seen + self.loss_fn.count(batch)
        names = sorted(totals)
        summed = runtime.sum([float(totals[n]) for n in names] + seen.flatten().tolist())
        now = torch.tensor(summed[len(names) :], dtype=torch.float64)
        if not torch.equal(now, global_count.double().flatten()):
            raise ValueError(OTHER_DATA.format(first=global_count.tolist(), now=now.tolist()))
        return dict(zip(names, summed, strict=False))

    def _prepared(self, spare: Batch | None) -> Batch:
        prepared = self.prepare(spare) if spare is not None else None
        assert prepared is not None  # it was not rejected before
        return prepared


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value


@contextmanager
def evaluating(parts: Iterable[Any]) -> Iterator[None]:
    """Evaluation mode; afterwards every module's own training flag and sharding are back.

    What is no module is passed over.
    """
    modules = [part for part in parts if isinstance(part, nn.Module)]
    flags = [(m, m.training) for part in modules for m in part.modules()]
    try:
        for part in modules:
            part.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
            # Without a backward pass the outermost FSDP modules would stay gathered, and
            # `parameters()` would be whole tensors instead of shards.
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's and torch's random streams go on afterwards as if nothing had happened."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
