"""Find the rank that the others wait for, and the part of its step that takes long."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ditty_di.callbacks.base import Observer
from ditty_di.protocols import Training

log = logging.getLogger(__name__)

#: Parts of a step that a rank does on its own; the rest is backward, communication and waiting.
PARTS = ("data", "forward", "optimizer")


class Stragglers(Observer):
    """Compare the ranks' own work in each step that is reported.

    Measured are loading data, the forward pass and the update. In a step all ranks take the same
    time, as they wait for each other in collectives; so these are timed where there are none: the
    forward pass in the modules that communicate nothing, between the gathers of FSDP. Of compiled
    blocks the whole pass is timed. The ranks exchange four numbers each when a step is reported;
    steps that are not, and the first one, are not measured.

    Metrics: `stragglers/rank` (the slowest), `stragglers/factor` (how many times as long the step
    takes as it would if that rank were as fast as the others' median), `stragglers/data_seconds`,
    `stragglers/forward_seconds`, `stragglers/optimizer_seconds` (by how much it is slower in them)
    and `stragglers/waiting_seconds` (how long the others wait for it).

    Args:
        factor: from which a line names the rank and the part, if two reports in a row agree on
            them; again once either changes.

    Raises:
        ValueError: `factor` is not above 1.
    """

    @staticmethod
    def validate(*, factor: float = 1.2) -> None:
        """Raise ValueError for a factor that is not above 1."""
        if not factor > 1:
            raise ValueError(f"factor={factor} must be above 1, such as 1.2")

    def __init__(self, factor: float = 1.2) -> None:
        self.validate(factor=factor)
        super().__init__()
        self.factor = factor
        self._trainer: Training | None = None
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._began = self._data = 0.0
        self._found: tuple[int, str] | None = None
        self._named: tuple[int, str] | None = None

    def on_train_start(self, trainer: Training) -> None:
        """Keep the trainer.

        Args:
            trainer: the trainer.
        """
        self._trainer = trainer if trainer.runtime.world_size > 1 else None

    def on_step_end(self, trainer: Training) -> None:
        """Measure the next step if it is to be reported.

        Args:
            trainer: the trainer.
        """
        self._remove_hooks()
        if self._trainer is None or not trainer.metrics_processor.should_log(trainer.step + 1):
            return
        self._spans = {"forward": [], "optimizer": []}
        timed = [module for part in trainer.model_parts for module in _local_modules(part)]
        for m in timed:
            self._watch("forward", m.register_forward_pre_hook, m.register_forward_hook)
        optimizer = trainer.optimizer
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._watch("optimizer", before, after)
        self._began, self._data = self._now(), math.fsum(self._metrics.data_loading_times)

    def get_metrics(self) -> dict[str, float]:
        """Compare the ranks in the step that was measured, if one was."""
        if not self._hooks or self._trainer is None:
            return {}
        took = self._now() - self._began
        data = math.fsum(self._metrics.data_loading_times) - self._data
        own = [data, self._seconds("forward"), self._seconds("optimizer")]
        self._remove_hooks()
        runtime = self._trainer.runtime
        table = torch.zeros(runtime.world_size, len(own) + 1, dtype=torch.float64)
        table[runtime.rank] = torch.tensor([*own, max(took - math.fsum(own), 0.0)])
        dist.all_reduce(table)
        return self._compare(self._trainer.step, table, says=runtime.rank == 0)

    def _compare(self, step: int, table: torch.Tensor, *, says: bool) -> dict[str, float]:
        """Return the metrics of a table `[ranks, parts and the rest]` in seconds."""
        own = table[:, :-1].sum(1)
        slow = int(own.argmax())
        others = [rank for rank in range(len(table)) if rank != slow]
        above = table[slow, :-1] - table[others, :-1].median(0).values
        excess = dict(zip(PARTS, above.tolist(), strict=True))
        late, took = float(own[slow] - own[others].median()), float(table[slow].sum())
        factor = took / max(took - late, 1e-9)
        part = max(excess, key=lambda name: excess[name])
        found = (slow, part) if factor >= self.factor else None
        again, self._found = found == self._found, found
        if found is None:
            self._named = None
        elif says and again and found != self._named:
            self._named = found
            seconds = ", ".join(f"{name} {by:+.3f}" for name, by in excess.items())
            log.warning(
                "step %d: rank %d is slow in %s: the step takes %.2f times as long as with the "
                "others' median (seconds against it: %s)",
                *(step, slow, part, factor, seconds),
            )
        waiting = max(float(table[others, -1].median() - table[slow, -1]), 0.0)
        by_part = {f"stragglers/{name}_seconds": by for name, by in excess.items()}
        return {
            "stragglers/rank": float(slow),
            "stragglers/factor": factor,
            **by_part,
            "stragglers/waiting_seconds": waiting,
        }

    @property
    def _metrics(self) -> Any:
        assert self._trainer is not None
        return self._trainer.metrics_processor

    def _now(self) -> float:
        """Return the time without validations and saves."""
        return time.perf_counter() - getattr(self._metrics, "paused_seconds", 0.0)

    def _watch(self, name: str, before: Any, after: Any) -> None:
        """Time what runs between two hooks."""
        began: list[Any] = []
        spans = self._spans[name]

        def begin(*ignored: Any) -> None:
            if name != "forward" or torch.is_grad_enabled():  # not in a validation
                began.append(self._mark())

        def end(*ignored: Any) -> None:
            if began:
                spans.append((began.pop(), self._mark()))

        self._hooks += [before(begin), after(end)]

    def _mark(self) -> Any:
        """Return the present time, of the device if that is not the CPU."""
        assert self._trainer is not None
        if self._trainer.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._trainer.device, enable_timing=True)
        event.record()
        return event

    def _seconds(self, name: str) -> float:
        spans = self._spans[name]
        if not spans or isinstance(spans[0][0], float):
            return math.fsum(end - start for start, end in spans)
        spans[-1][1].synchronize()
        return math.fsum(start.elapsed_time(end) for start, end in spans) / 1000


def _local_modules(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules in which FSDP gathers nothing.

    A hook would compile a module again: of compiled blocks the whole module is returned, and
    nothing of one that is compiled as a whole.
    """
    compiled = [m for m in module.modules() if getattr(m, "_compiled_call_impl", None)]
    if compiled:
        return [] if module in compiled else [module]
    return list(_without_fsdp_inside(module))


def _without_fsdp_inside(module: nn.Module) -> Iterator[nn.Module]:
    if any(isinstance(m, FSDPModule) for m in module.modules() if m is not module):
        for child in module.children():
            yield from _without_fsdp_inside(child)
    else:
        yield module
