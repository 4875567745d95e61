"""Metrics of a run, passed to any number of loggers."""

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

from ditty_di.loggers import flops
from ditty_di.runtime import Runtime

log = logging.getLogger(__name__)

GIB = 1024**3


class Logger(Protocol):
    """Where metrics are written. Only rank 0's is started, and so only it may open a file."""

    def start(self, *, step: int, max_steps: int) -> None:
        """Start before the first value; `step` is the restored step, 0 in a new run."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step."""

    def close(self) -> None:
        """Flush and close."""


class MetricsProcessor:
    """Add speed, memory and remaining time to the trainer's metrics; rank 0 writes them.

    Args:
        loggers: a list, or a mapping by name (in YAML, one can be added or removed by its name;
            None is left out).
        log_interval: optimizer steps between two reports; the first and the last step are always
            reported.
        flops_per_token: FLOPs of a training step per token; None is `flops.per_token` of the model.
        attention_flops_per_token: added to them (`flops.attention_per_token`).
        peak_flops: of one device, in FLOP/s; None looks the GPU up (`flops.peak`). Without it, as
            on a CPU, there is no `mfu`.

    Added to each report of a training step: `tokens_per_second` (all ranks, padding included),
    `seconds_per_step`, `data_loading_share` (of this rank's time, 0 to 1), `eta_seconds`,
    `tflops` (per device) and `mfu` (0 to 1, CUDA), `memory_gib` and `memory_reserved_gib` (this
    rank's peak since the start; on a CPU `memory_gib` is the peak resident memory of the process).

    Attributes:
        paused_seconds: time within `pause` so far.

    Raises:
        ValueError: `log_interval` is below 1.
    """

    @staticmethod
    def validate(*, log_interval: int = 1) -> None:
        """Raise ValueError for an interval below 1."""
        if log_interval < 1:
            raise ValueError(
                f"logger: log_interval must be a number of steps, at least 1; got {log_interval}"
            )

    def __init__(
        self,
        loggers: Sequence[Logger] | Mapping[str, Logger | None] = (),
        log_interval: int = 10,
        flops_per_token: float | None = None,
        attention_flops_per_token: float = 0.0,
        peak_flops: float | None = None,
    ) -> None:
        self.validate(log_interval=log_interval)
        listed = loggers.values() if isinstance(loggers, Mapping) else loggers
        self.loggers = [logger for logger in listed if logger is not None]
        self.log_interval, self.peak_flops = log_interval, peak_flops
        self.flops_per_token = flops_per_token
        self.attention_flops_per_token = attention_flops_per_token
        # The trainer's batch generator adds to both.
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.max_steps = 0
        self._device: torch.device | None = None
        self._dp_world_size = self._world_size = 1
        self._active: list[Logger] = []
        self._failed: list[str] = []
        self._step = self._last_report = 0
        self._speeds: list[float] = []
        self.paused_seconds = self._paused_in_interval = 0.0
        self._started = self._interval_started = time.perf_counter()

    def start(
        self, *, model_parts: list[nn.Module], max_steps: int, runtime: Runtime, step: int = 0
    ) -> None:
        """Start the loggers on rank 0.

        Args:
            model_parts: modules whose parameters are counted for `flops_per_token`.
            max_steps: number of optimizer steps.
            runtime: device and ranks.
            step: restored step. What an earlier attempt wrote after it is dropped, so that no step
                is reported twice.
        """
        self.max_steps = max_steps
        self._last_report = self._step = step
        self._device = runtime.device
        self._dp_world_size, self._world_size = runtime.dp_world_size, runtime.world_size
        if self.flops_per_token is None:
            self.flops_per_token = flops.per_token(model_parts)
        total, active = flops.parameters(model_parts)
        if active < total and runtime.rank == 0:
            stages = " of the stages of rank 0" if runtime.parallel_dims.pp_enabled else ""
            said = f"{total:,} parameters{stages}", f"{active:,}"
            log.info("%s, %s of them active for a token", *said)
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)
            name = torch.cuda.get_device_name(runtime.device)
            self.peak_flops = self.peak_flops or flops.peak(name)
            if self.peak_flops is None and runtime.rank == 0:
                log.info("no MFU: logger.peak_flops=FLOP/s gives the peak of %s", name)
        if runtime.rank == 0:
            self._active = list(self.loggers)
            self._write(lambda logger: logger.start(step=step, max_steps=max_steps))
        self._started = self._interval_started = time.perf_counter()

    def should_log(self, step: int) -> bool:
        """Return whether the metrics of a step are reported."""
        return step == 1 or step % self.log_interval == 0 or step == self.max_steps

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time within the context (validation, a blocking save) from training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.paused_seconds += seconds
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
        self._write(lambda logger: logger.write(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text.

        Args:
            step: optimizer step.
            name: name of the text.
            text: the text.
        """
        self._step = step
        self._write(lambda logger: logger.text(step, name, text))

    def _write(self, call: Callable[[Logger], None]) -> None:
        """Call every logger.

        A logger that fails is left out from then on, with a warning: an outage of a dashboard must
        not end the training.
        """
        for logger in list(self._active):
            try:
                call(logger)
            except ImportError:
                raise  # a missing package is known before the first step
            except Exception as error:
                self._active.remove(logger)
                failed = (
                    f"{_name(logger)} since step {self._step} ({type(error).__name__}: {error})"
                )
                self._failed.append(failed)
                log.warning("the training goes on without the metrics logger %s", failed)
                with suppress(Exception):
                    logger.close()

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
            "train_seconds": time.perf_counter() - self._started - self.paused_seconds,
        }

    def close(self) -> None:
        """Close every logger. One that fails is named in a warning: the training is over."""
        loggers, self._active = self._active, []
        for logger in loggers:
            try:
                logger.close()
            except Exception as error:
                log.warning("could not close the metrics logger %s", logger, exc_info=True)
                self._failed.append(f"the end of {_name(logger)} ({type(error).__name__}: {error})")
        if self._failed:
            log.warning("metrics are incomplete: without %s", "; ".join(self._failed))
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
            "eta_seconds": max(self.max_steps - step, 0) * usual,
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


def _name(logger: Logger) -> str:
    """Return a logger's class, and the file or folder that it writes."""
    where = getattr(logger, "path", None) or getattr(logger, "folder", None)
    return f"{type(logger).__name__}({where})" if where else type(logger).__name__
