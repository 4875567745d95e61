"""Metrics of a run, passed to any number of writers."""

from __future__ import annotations

import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import nn

from ditty_di.metrics import flops
from ditty_di.runtime import Runtime

logger = logging.getLogger(__name__)

GIB = 1024**3


class Writer(Protocol):
    """Where metrics are written. Only rank 0's is started, and so only it may open a file."""

    def start(self, *, step: int, total_steps: int) -> None:
        """Start before the first value; `step` is the restored step, 0 in a new run."""
        ...

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Metrics:
    """Add speed, memory and remaining time to the trainer's metrics; rank 0 writes them.

    Args:
        writers: a list, or a mapping by name (in YAML, one can be added or removed by its name;
            None is left out).
        every: optimizer steps between two reports; the first and the last step are always reported.
        flops_per_token: FLOPs of a training step per token; None is `flops.per_token` of the model.
        attention_flops_per_token: added to them (`flops.attention_per_token`).
        peak_flops: of one device, in FLOP/s; None looks the GPU up. Without it, as on a CPU, there
            is no `mfu`.

    Added to each report of a training step: `tokens_per_second` (all ranks, padding included),
    `seconds_per_step`, `data_loading_share` (of this rank's time, 0 to 1), `eta_seconds`,
    `tflops` (per device) and `mfu` (0 to 1, CUDA), `memory_gib` and `memory_reserved_gib` (this
    rank's peak since the start; on a CPU `memory_gib` is the peak resident memory of the process).

    Raises:
        ValueError: `every` is below 1.
    """

    @staticmethod
    def validate(*, every: int = 1) -> None:
        """Raise ValueError for an interval below 1."""
        if every < 1:
            raise ValueError(f"metrics: every must be a number of steps, at least 1; got {every}")

    def __init__(
        self,
        writers: Sequence[Writer] | Mapping[str, Writer | None] = (),
        every: int = 10,
        flops_per_token: float | None = None,
        attention_flops_per_token: float = 0.0,
        peak_flops: float | None = None,
    ) -> None:
        self.validate(every=every)
        listed = writers.values() if isinstance(writers, Mapping) else writers
        self.writers = [writer for writer in listed if writer is not None]
        self.every, self.peak_flops = every, peak_flops
        self.flops_per_token = flops_per_token
        self.attention_flops_per_token = attention_flops_per_token
        # The trainer's batch generator adds to both.
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.total_steps = 0
        self._device: torch.device | None = None
        self._dp_world_size = self._world_size = 1
        self._active: list[Writer] = []
        self._failed: list[str] = []
        self._step = self._last_report = 0
        self._speeds: list[float] = []
        self._paused = self._paused_in_interval = 0.0
        self._started = self._interval_started = time.perf_counter()

    def start(
        self, *, model_parts: list[nn.Module], total_steps: int, runtime: Runtime, step: int = 0
    ) -> None:
        """Start the writers on rank 0.

        Args:
            model_parts: modules whose parameters are counted for `flops_per_token`.
            total_steps: number of optimizer steps.
            runtime: device and ranks.
            step: restored step. What an earlier attempt wrote after it is dropped, so that no step
                is reported twice.
        """
        self.total_steps = total_steps
        self._last_report = self._step = step
        self._device = runtime.device
        self._dp_world_size, self._world_size = runtime.dp_world_size, runtime.world_size
        if self.flops_per_token is None:
            self.flops_per_token = flops.per_token(model_parts)
        if runtime.device.type == "cuda":
            from torchtitan.tools.utils import get_peak_flops

            torch.cuda.reset_peak_memory_stats(runtime.device)
            if self.peak_flops is None:
                self.peak_flops = get_peak_flops(torch.cuda.get_device_name(runtime.device))
        if runtime.rank == 0:
            self._active = list(self.writers)
            self._write(lambda writer: writer.start(step=step, total_steps=total_steps))
        self._started = self._interval_started = time.perf_counter()

    def should_log(self, step: int) -> bool:
        """Return whether the metrics of a step are reported."""
        return step == 1 or step % self.every == 0 or step == self.total_steps

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time within the context (validation, a blocking save) from training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._paused += seconds
            self._paused_in_interval += seconds

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write metrics, with speed and memory if the step trained on tokens and is reported.

        Args:
            step: optimizer step.
            values: metrics by name.
        """
        values = {name: float(value) for name, value in values.items()}
        if self.ntokens_since_last_log and self.should_log(step):
            values |= self._interval(step)
        self._step = step
        self._write(lambda writer: writer.write(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text.

        Args:
            step: optimizer step.
            name: name of the text.
            text: the text.
        """
        self._step = step
        self._write(lambda writer: writer.text(step, name, text))

    def _write(self, call: Callable[[Writer], None]) -> None:
        """Call every writer.

        A writer that fails is left out from then on, with a warning: an outage of a dashboard must
        not end the training.
        """
        for writer in list(self._active):
            try:
                call(writer)
            except ImportError:
                raise  # a missing package is known before the first step
            except Exception as error:
                self._active.remove(writer)
                failed = (
                    f"{_name(writer)} since step {self._step} ({type(error).__name__}: {error})"
                )
                self._failed.append(failed)
                logger.warning("the training goes on without the metrics writer %s", failed)
                with suppress(Exception):
                    writer.close()

    def summary(self) -> dict[str, float]:
        """Return metrics of the whole run.

        Returns:
            `tokens_per_second` (median over the reports without the first, which has the warm-up),
            `peak_memory_gib` (this rank's) and `train_seconds` (without pauses).
        """
        speeds = self._speeds[1:] or self._speeds
        return {
            "tokens_per_second": statistics.median(speeds) if speeds else 0.0,
            "peak_memory_gib": self._memory()["memory_gib"],
            "train_seconds": time.perf_counter() - self._started - self._paused,
        }

    def close(self) -> None:
        """Close every writer. One that fails is named in a warning: the training is over."""
        writers, self._active = self._active, []
        for writer in writers:
            try:
                writer.close()
            except Exception as error:
                logger.warning("could not close the metrics writer %s", writer, exc_info=True)
                self._failed.append(f"the end of {_name(writer)} ({type(error).__name__}: {error})")
        if self._failed:
            logger.warning("metrics are incomplete: without %s", "; ".join(self._failed))
            self._failed = []

    def _interval(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._interval_started - self._paused_in_interval, 1e-9)
        steps = max(step - self._last_report, 1)
        speed = self.ntokens_since_last_log * self._dp_world_size / seconds
        self._speeds.append(speed)
        # The median of a few reports: the first one includes compilation and warm-up.
        usual = seconds / steps * speed / statistics.median(self._speeds[-5:])
        values = {
            "tokens_per_second": speed,
            "seconds_per_step": seconds / steps,
            "data_loading_share": min(math.fsum(self.data_loading_times) / seconds, 1.0),
            "eta_seconds": max(self.total_steps - step, 0) * usual,
            **self._flops(speed),
            **self._memory(),
        }
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self._interval_started, self._paused_in_interval, self._last_report = now, 0.0, step
        return values

    def _flops(self, tokens_per_second: float) -> dict[str, float]:
        per_token = (self.flops_per_token or 0.0) + self.attention_flops_per_token
        per_device = per_token * tokens_per_second / self._world_size
        values = {"tflops": per_device / 1e12}
        if self.peak_flops:
            values["mfu"] = per_device / self.peak_flops
        return values

    def _memory(self) -> dict[str, float]:
        if self._device is not None and self._device.type == "cuda":
            return {
                "memory_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
                "memory_reserved_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
            }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        return {"memory_gib": peak / (GIB if sys.platform == "darwin" else 1024**2)}


def _name(writer: Writer) -> str:
    """Return a writer's class, and the file or folder that it writes."""
    where = getattr(writer, "path", None) or getattr(writer, "folder", None)
    return f"{type(writer).__name__}({where})" if where else type(writer).__name__
