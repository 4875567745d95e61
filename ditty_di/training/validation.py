"""The exact loss on held-out data during training."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditty_di.batch import Batch
from ditty_di.models.evaluation import evaluating
from ditty_di.protocols import DataLoader, DataLoaderFactory, Evaluate, Loss
from ditty_di.runtime import Runtime, seed_everything
from ditty_di.seed import preserved_rng
from ditty_di.training.metrics import Collected, ValidationMetric
from ditty_di.training.sources import BY_SOURCE, LossBySource

log = logging.getLogger(__name__)

NO_BATCHES = """\
validator: the validation loader yields no batch. Its data set may have fewer rows than one batch \
needs: lower the loader's micro_batch_size, or give it more rows (data.validation)."""
NO_LABELS = """\
validator: the validation data has no valid label (all are masked, usually with -100), so there \
is no loss to average; look at the labels of data.validation."""
OTHER_DATA = """\
validator: the validation loader yielded other data than the first time ({first} labels, then \
{now}). A validation loss can only be compared with earlier ones on the same batches; give the \
validator a loader that starts over with each iteration (no shuffling)."""

NOT_SEEN = """\
validator: the batches of a validation have no valid label of the sources %s, which get no loss of \
their own; raise max_batches, or give data.validation rows of them"""
ENDLESS = """\
validator: its loader repeats the data without an end (epochs=None); give the loader epochs=1, or \
the validator max_batches"""


class Validator:
    """Compute the loss on held-out data.

    It fits the trainer's `validator` slot as a partial that lacks the last five arguments.

    Args:
        dataloader: a loader, or a factory called with this rank's `dp_rank` and `dp_world_size`
            before each validation; it must yield the same batches each time.
        eval_interval: optimizer steps between validations.
        max_batches: micro-batches per rank and validation; None is all.
        baselines: numbers reported beside the loss for comparison, by name.
        perplexity: also report exp(loss), for losses in nats per token.
        validate_before_training: also validate before the first step, so that `report` compares
            before and after.
        metrics: of all rows together, such as F1 or recall (`ditty_di.training.metrics`).
        samples: logs generated text after each validation, such as
            `ditty_di.callbacks.SampleText`; the trainer calls it as one of its callbacks.
        model_parts: the modules as this rank trains them.
        evaluate: yields the loss and the metrics of batches (`ditty_di.protocols.Evaluate`).
        loss_fn: the training loss.
        runtime: device, ranks and seed.
        prepare: runs the preprocessors on a batch; None for a rejected batch.

    Raises:
        ValueError: `eval_interval` or `max_batches` is below 1.
    """

    @staticmethod
    def validate_arguments(*, eval_interval: int = 1, max_batches: int | None = None) -> None:
        """Raise ValueError for numbers below 1."""
        for name, number in (("eval_interval", eval_interval), ("max_batches", max_batches)):
            if number is not None and number < 1:
                raise ValueError(f"validator: {name} must be at least 1; got {number}")

    def __init__(
        self,
        dataloader: DataLoader | DataLoaderFactory,
        *,
        eval_interval: int,
        max_batches: int | None = None,
        baselines: dict[str, float] | None = None,
        perplexity: bool = False,
        validate_before_training: bool = False,
        metrics: Sequence[ValidationMetric] | None = None,
        samples: Any = None,
        model_parts: list[nn.Module],
        evaluate: Evaluate,
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None] = lambda batch: batch,
    ) -> None:
        self.validate_arguments(eval_interval=eval_interval, max_batches=max_batches)
        self.dataloader = dataloader
        self.eval_interval, self.max_batches = eval_interval, max_batches
        self.baselines, self.perplexity = dict(baselines or {}), perplexity
        self.validate_before_training = validate_before_training
        self.metrics, self.samples = list(metrics or ()), samples
        self.model_parts, self.evaluate, self.loss_fn = model_parts, evaluate, loss_fn
        self.runtime, self.prepare = runtime, prepare
        self._reported: list[tuple[int, float]] = []
        # An injected loader that remembers its position is put back to where it is now.
        state_dict = getattr(dataloader, "state_dict", None)
        self._start = copy.deepcopy(state_dict()) if state_dict is not None else None
        self._counted: tuple[Tensor, list[float], int] | None = None
        self._by_source = LossBySource(loss_fn, ())  # with the names of the loader that is read
        self._spare: Batch | None = None

    def should_validate(self, step: int) -> bool:
        """Return whether to validate after a step.

        Args:
            step: optimizer step; 0 is before training starts.
        """
        return step % self.eval_interval == 0 if step else self.validate_before_training

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
        modules = (*self.model_parts, self.loss_fn)
        with torch.no_grad(), evaluating(modules), preserved_rng(self.runtime.device):
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
            `loss`, `loss/NAME` of each source where the loader tells sources apart, the loss's own
            metrics, `metrics` and the baselines; {} when a stop was requested.

        Raises:
            ValueError: no batch, no valid label, or other data than the first time.
        """
        modules = (*self.model_parts, self.loss_fn)
        with torch.no_grad(), evaluating(modules), preserved_rng(self.runtime.device):
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
        self._by_source = LossBySource(self.loss_fn, getattr(loader, "source_names", ()))
        for loaded in islice(iter(loader), self.max_batches):
            batch = Batch.of(loaded)
            prepared = self.prepare(batch)
            if prepared is not None:
                yield batch, prepared

    def _count(self) -> tuple[Tensor, list[float], int] | None:
        """Return the global count, float64, that of each source, and the most batches of a rank."""
        runtime, batches = self.runtime, 0
        of_sources: Any = 0
        self._spare = None
        count: Tensor | None = None
        for loaded, batch in self._batches():
            if runtime.stop_requested():
                break
            self._spare = self._spare or loaded
            here = self.loss_fn.num_valid(batch).cpu().double()
            count, batches = here if count is None else count + here, batches + 1
            of_sources = of_sources + self._by_source.count([batch]).cpu()
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
        mine = self._by_source.count([]) + of_sources
        total = runtime.sum([*count.flatten().tolist(), *mine.tolist()])
        whole, named = total[: count.numel()], total[count.numel() :]
        if not any(whole):
            raise ValueError(NO_LABELS)
        names = zip(self._by_source.sources, named, strict=True)
        unseen = ", ".join(name for name, number in names if not number)
        if unseen and self._by_source.knows_losses and runtime.rank == 0:
            log.warning(NOT_SEEN, unseen)
        of_loss = torch.tensor(whole, dtype=torch.float64).reshape(count.shape)
        return of_loss, named, int(max(of_ranks))

    def _losses(
        self, num_valid_global: Tensor, of_sources: list[float], batches: int
    ) -> dict[str, float]:
        """Return loss and metrics of `batches` micro-batches per rank; {} when asked to stop."""
        runtime, device = self.runtime, self.runtime.device
        on_device = num_valid_global.float().to(device)
        totals: dict[str, Tensor] = {}
        seen = torch.zeros_like(num_valid_global)
        iterator, own, stopped = iter(self._batches()), deque[bool](), False

        def rounds() -> Iterator[Batch]:
            nonlocal seen, stopped
            for _ in range(batches):
                if stopped := runtime.any(runtime.stop_requested()):
                    return
                following = next(iterator, (None, None))[1]
                if following is not None:
                    following.num_valid = self.loss_fn.num_valid(following)
                    seen = seen + following.num_valid.cpu()
                own.append(following is not None)
                # A rank without further batches runs one again and ignores its loss: the forward
                # pass of a sharded model needs all ranks.
                yield (following or self._prepared_spare()).to(device)

        collected = Collected(self._by_source, self.metrics)
        for values in self.evaluate(collected, rounds(), on_device):
            counts = own.popleft()
            for name, value in values.items():
                # Also assigned when ignored: all ranks sum the same names.
                before = totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                if counts:
                    totals[name] = before + value
        if stopped:
            return {}
        # A rank whose batches are all padding has none of any source.
        mine = totals.pop(BY_SOURCE, torch.zeros(len(of_sources))).tolist()
        names = sorted(totals)
        summed = runtime.sum([float(totals[n]) for n in names] + seen.flatten().tolist() + mine)
        end = len(names) + seen.numel()
        now = torch.tensor(summed[len(names) : end], dtype=torch.float64)
        if not torch.equal(now, num_valid_global.flatten()):
            raise ValueError(OTHER_DATA.format(first=num_valid_global.tolist(), now=now.tolist()))
        by_source = self._by_source.means(summed[end:], of_sources)
        found = dict(zip(names, summed, strict=False)) | by_source
        return found | collected.compute(runtime)

    def _prepared_spare(self) -> Batch:
        assert self._spare is not None
        prepared = self.prepare(self._spare)
        assert prepared is not None  # it was not rejected before
        return prepared
