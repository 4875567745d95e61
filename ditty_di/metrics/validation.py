"""The exact loss on held-out data during training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ditty_di.batch import Batch
from ditty_di.protocols import DataLoader, DataLoaderFactory, Loss
from ditty_di.runtime import Runtime, seed_everything
from ditty_di.seed import preserved_rng

NO_BATCHES = """\
validator: the validation loader yields no batch. Its data set may have fewer rows than one batch \
needs: lower the loader's batch_size, or give it more rows (data.validation)."""
NO_LABELS = """\
validator: the validation data has no valid label (all are masked, usually with -100), so there \
is no loss to average; look at the labels of data.validation."""
OTHER_DATA = """\
validator: the validation loader yielded other data than the first time ({first} labels, then \
{now}). A validation loss can only be compared with earlier ones on the same batches; give the \
validator a loader that starts over with each iteration (no shuffling)."""

ENDLESS = """\
validator: its loader repeats the data without an end (epochs=None); give the loader epochs=1, or \
the validator max_batches"""


class Validator:
    """Compute the loss on held-out data.

    It fits the trainer's `validator` slot as a partial that lacks the last five arguments.

    Args:
        dataloader: a loader, or a factory called with this rank's `dp_rank` and `dp_world_size`
            before each validation; it must yield the same batches each time.
        every: optimizer steps between validations.
        max_batches: micro-batches per rank and validation; None is all.
        baselines: numbers reported beside the loss for comparison, by name.
        perplexity: also report exp(loss), for losses in nats per token.
        first: also validate before the first step, so that `report` compares before and after.
        samples: logs generated text after each validation, such as
            `ditty_di.callbacks.SampleText`; the trainer calls it as one of its callbacks.
        model_parts: the modules as this rank trains them.
        forward: returns the model's output for a batch, after the postprocessors.
        loss_fn: the training loss.
        runtime: device, ranks and seed.
        prepare: runs the preprocessors on a batch; None for a rejected batch.

    Raises:
        ValueError: `every` or `max_batches` is below 1.
    """

    @staticmethod
    def validate_arguments(*, every: int = 1, max_batches: int | None = None) -> None:
        """Raise ValueError for numbers below 1."""
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
        samples: Any = None,
        model_parts: list[nn.Module],
        forward: Callable[[Batch], Any],
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None] = lambda batch: batch,
    ) -> None:
        self.validate_arguments(every=every, max_batches=max_batches)
        self.dataloader = dataloader
        self.every, self.max_batches = every, max_batches
        self.baselines, self.perplexity, self.first = dict(baselines or {}), perplexity, first
        self.samples = samples
        self.model_parts, self.forward, self.loss_fn = model_parts, forward, loss_fn
        self.runtime, self.prepare = runtime, prepare
        self._reported: list[tuple[int, float]] = []
        # An injected loader that remembers its position is put back to where it is now.
        state_dict = getattr(dataloader, "state_dict", None)
        self._start = copy.deepcopy(state_dict()) if state_dict is not None else None
        self._counted: tuple[Tensor, int] | None = None
        self._spare: Batch | None = None

    def should_validate(self, step: int) -> bool:
        """Return whether to validate after a step.

        Args:
            step: optimizer step; 0 is before training starts.
        """
        return step % self.every == 0 if step else self.first

    def try_first_batch(self) -> None:
        """Count the first batch, so that unusable data is found before training.

        Random numbers and the loader's position are restored.

        Raises:
            ValueError: no batch on any rank, or a loader without an end. Loader, preprocessors and
                loss raise what they raise.
        """
        loader = self.dataloader
        if not callable(loader) and self._start is None and iter(loader) is loader:
            return  # a plain iterator: a batch taken from it cannot be put back
        with torch.no_grad(), evaluating(self.model_parts), preserved_rng(self.runtime.device):
            first = next(iter(self._batches()), None)
            if first is not None:
                self.loss_fn.num_valid(first[1])
            if not self.runtime.any(first is not None):
                raise ValueError(NO_BATCHES)
        if not callable(loader) and self._start is not None:
            loader.load_state_dict(copy.deepcopy(self._start))  # type: ignore[attr-defined]

    def report(self) -> str:
        """Return the first and the last loss of this process; empty with fewer than two."""
        if len(self._reported) < 2:
            return ""
        (then, before), (now, after) = self._reported
        return f"held-out loss {before:.4f} at step {then}, {after:.4f} at step {now}"

    def validate(self, step: int) -> dict[str, float]:
        """Return the loss over all batches and ranks.

        It is their sum divided by the global number of valid elements, as one batch of all the data
        would give it. Training flags, sharding and random numbers are restored.

        Args:
            step: optimizer step, for `report`.

        Returns:
            `loss`, the loss's own metrics and the baselines; {} when a stop was requested.

        Raises:
            ValueError: no batch, no valid label, or other data than the first time.
        """
        with torch.no_grad(), evaluating(self.model_parts), preserved_rng(self.runtime.device):
            if self._counted is None:
                self._counted = self._count()
            values = self._losses(*self._counted) if self._counted else {}
        if not values:
            return {}
        self._reported = [*self._reported[:1], (step, values["loss"])]
        if self.perplexity:
            values["perplexity"] = float(np.exp(values["loss"]))
        return values | self.baselines

    def _batches(self) -> Iterator[tuple[Batch, Batch]]:
        """Yield the loader's batches and the prepared ones, without rejected ones.

        Random numbers are the same each time, so that losses can be compared.
        """
        seed_everything(self.runtime.seed)
        loader: Any = self.dataloader
        if callable(loader):
            loader = loader(dp_rank=self.runtime.dp_rank, dp_world_size=self.runtime.dp_world_size)
        elif self._start is not None:
            loader.load_state_dict(copy.deepcopy(self._start))
        if self.max_batches is None and getattr(loader, "endless", False):
            raise ValueError(ENDLESS)
        for loaded in islice(iter(loader), self.max_batches):
            batch = Batch.of(loaded)
            prepared = self.prepare(batch)
            if prepared is not None:
                yield batch, prepared

    def _count(self) -> tuple[Tensor, int] | None:
        """Return the global count, float64, and the largest number of batches of a rank."""
        runtime, batches = self.runtime, 0
        self._spare = None
        count: Tensor | None = None
        for loaded, batch in self._batches():
            if runtime.stop_requested():
                break
            self._spare = self._spare or loaded
            here = self.loss_fn.num_valid(batch).cpu().double()
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
                like = self.loss_fn.num_valid(self._prepared_spare())
                count = torch.zeros(like.shape, dtype=torch.float64)
        assert count is not None
        total = runtime.sum(count.flatten().tolist())
        if not any(total):
            raise ValueError(NO_LABELS)
        return torch.tensor(total, dtype=torch.float64).reshape(count.shape), int(max(of_ranks))

    def _losses(self, num_valid_global: Tensor, batches: int) -> dict[str, float]:
        """Return loss and metrics of `batches` micro-batches per rank; {} when asked to stop."""
        runtime, device = self.runtime, self.runtime.device
        on_device = num_valid_global.float().to(device)
        totals: dict[str, Tensor] = {}
        seen = torch.zeros_like(num_valid_global)
        iterator = iter(self._batches())
        for _ in range(batches):
            if runtime.any(runtime.stop_requested()):
                return {}
            following = next(iterator, (None, None))[1]
            if following is not None:
                following.num_valid = self.loss_fn.num_valid(following)
                seen = seen + following.num_valid.cpu()
            # A rank without further batches runs one again and ignores its loss: the forward pass
            # of a sharded model needs all ranks.
            batch = (following or self._prepared_spare()).to(device)
            loss, metrics = self.loss_fn(self.forward(batch), batch, on_device)
            for name, value in {**metrics, "loss": loss}.items():
                # Also assigned when ignored: all ranks sum the same names.
                before = totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                if following is not None:
                    totals[name] = before + value
        names = sorted(totals)
        summed = runtime.sum([float(totals[n]) for n in names] + seen.flatten().tolist())
        now = torch.tensor(summed[len(names) :], dtype=torch.float64)
        if not torch.equal(now, num_valid_global.flatten()):
            raise ValueError(OTHER_DATA.format(first=num_valid_global.tolist(), now=now.tolist()))
        return dict(zip(names, summed, strict=False))

    def _prepared_spare(self) -> Batch:
        assert self._spare is not None
        prepared = self.prepare(self._spare)
        assert prepared is not None  # it was not rejected before
        return prepared


@contextmanager
def evaluating(parts: Iterable[Any]) -> Iterator[None]:
    """Set evaluation mode, and restore every module's training flag and sharding afterwards.

    Args:
        parts: modules; other objects are ignored.
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
