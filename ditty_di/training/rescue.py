"""Save the last complete optimizer step when an exception ends the training."""

from __future__ import annotations

import copy
import ctypes
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditty_di.models.weights import local
from ditty_di.protocols import Stateful
from ditty_di.runtime import gathered

log = logging.getLogger(__name__)

#: How long a failed rank waits for the others. Ranks that fail together arrive together. When one
#: fails alone the others do not come, since they are in a collective, so the wait is short: a run
#: one of whose processes is killed has to end within five seconds.
_AGREEMENT_SECONDS = 3.0
_EXCHANGE_SECONDS = 20.0
#: 624 words and the position among them, each of 32 bits.
_MT19937_BYTES = 4 * 625

_Buffer = tuple[nn.Module, str, Tensor]  # a module, the name of a buffer of it, its value
_Version = tuple[int, int | None, str]


class RankFailedError(RuntimeError):
    """Another rank failed; the message says which and how."""


class NumPyState:
    """The state of NumPy's global generator, copied only when numbers were drawn meanwhile.

    `numpy.random.get_state` takes longer than everything else that is recorded before a step.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._words = b""

    def read(self) -> Any:
        """Return what `np.random.get_state()` returns."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return np.random.get_state()
        words = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        # Taking a normal number that was kept back for the next call does not change the words.
        kept_back = self._state is not None and self._state[3]
        if words != self._words or kept_back:
            self._state, self._words = np.random.get_state(), words
        return self._state


class HeldPosition:
    """A data loader's state for a checkpoint: the live one, or an earlier one that is held.

    Args:
        dataloader: the loader; all its attributes are available here too.
    """

    def __init__(self, dataloader: Any) -> None:
        self._dataloader = dataloader
        self.held: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the held state, or the live one."""
        return self._dataloader.state_dict() if self.held is None else self.held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the loader.

        Args:
            state_dict: as `state_dict` returned it.
        """
        self._dataloader.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)


class StepBoundary:
    """A snapshot, between two steps, of the state that a step changes before its update.

    A step that fails before the update has changed random numbers, the position in the data,
    counters, and buffers such as those of batch norm. `mark` records them between two steps,
    `restore` sets them back. Parameters, optimizer and schedule change only with the update.

    Args:
        dataloader: with `state_dict`; it is called at every `mark`.
        states: flat dicts of counters, recorded whole.
        modules: whose buffers are recorded if they change: the first step shows which do.
        device: whose random numbers are recorded beside those of Python, NumPy and torch's CPU.

    Attributes:
        position: the loader's state, for the checkpointer.
        changed: why the current step cannot be undone any more; None before its update and between
            steps.
        in_step: whether a step is running.
    """

    def __init__(
        self,
        *,
        dataloader: Any,
        states: Mapping[str, Stateful],
        modules: Iterable[nn.Module],
        device: torch.device,
    ) -> None:
        self.position = HeldPosition(dataloader)
        self._states, self._device = states, device
        self._numpy = NumPyState()
        self._modules = list(modules)
        self._versions: dict[tuple[int, str], _Version] = {}
        self._moving: list[_Buffer] = []
        self._marks = 0
        self.changed: str | None = None
        self.in_step = False

    def mark(self) -> None:
        """Record the state before a step."""
        self.position.held = None
        self._data = copy.deepcopy(self.position.state_dict())
        self._recorded = {name: dict(s.state_dict()) for name, s in self._states.items()}
        self._random = random.getstate(), self._numpy.read(), torch.get_rng_state()
        if self._device.type != "cpu":
            self._device_random = torch.get_device_module(self._device).get_rng_state(self._device)
        if self._marks < 2:
            versions = {(id(m), name): _version(tensor) for m, name, tensor in self._buffers()}
            if self._marks == 1:  # those that the first step changed are copied from now on
                self._moving = [
                    (module, name, tensor)
                    for module, name, tensor in self._buffers()
                    if versions[id(module), name] != self._versions.get((id(module), name))
                ]
            self._versions = versions
        self._marks += 1
        self._moving = [(m, name, _buffer(m, name).clone()) for m, name, _ in self._moving]
        self.changed, self.in_step = None, True

    def updating(self, what: str) -> None:
        """Note that the step changes parameters or schedule from here on, and cannot be undone.

        Args:
            what: the part that is updated, for the message.
        """
        self.changed = f"the update of {what} failed"

    def complete(self) -> None:
        """Note that the step is over, or did not begin."""
        self.changed, self.in_step = None, False

    def restore(self) -> str | None:
        """Go back to the last `mark`; return why that is not possible, or None."""
        if self.changed is not None:
            return self.changed
        if not self.in_step:
            return None
        moving = {(id(m), name) for m, name, _ in self._moving}
        for module, name, tensor in self._buffers():
            key = (id(module), name)
            if key not in moving and self._versions.get(key) != _version(tensor):
                return f"the buffer {name!r} of {type(module).__name__} changed in the failed step"
        for module in (m for part in self._modules for m in part.modules()):
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                return f"{type(module).__name__} has a state of its own, which the step changed"
        for module, name, before in self._moving:
            _buffer(module, name).copy_(before)
        self.position.held = self._data
        for name, state in self._states.items():
            state.load_state_dict(self._recorded[name])
        python, numpy, cpu = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._device.type != "cpu":
            device = torch.get_device_module(self._device)
            device.set_rng_state(self._device_random, self._device)
        self.in_step = False
        return None

    def _buffers(self) -> Iterator[_Buffer]:
        for part in self._modules:
            for module in part.modules():
                for name, tensor in module._buffers.items():
                    if tensor is not None:
                        yield module, name, tensor


def _buffer(module: nn.Module, name: str) -> Tensor:
    return module._buffers[name]  # type: ignore[return-value]


def _version(tensor: Tensor) -> _Version:
    """Return a tensor's id, how often it was written in place, and the sum of its values.

    The sum is needed because kernels such as batch norm's write without counting.
    """
    written = None if tensor.is_inference() else tensor._version
    try:
        dtype = torch.complex128 if tensor.is_complex() else torch.float64
        content = str(local(tensor).detach().sum(dtype=dtype).item())
    except (RuntimeError, NotImplementedError):  # dtypes that cannot be summed
        content = ""
    return id(tensor), written, content


class Agreement:
    """Exchange messages among failed ranks, in their own process group with a short timeout."""

    def __init__(self) -> None:
        self.ranks = dist.get_world_size()
        self.group = None
        if self.ranks > 1:
            timeout = timedelta(seconds=_EXCHANGE_SECONDS)
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, message: Any) -> list[Any] | None:
        """Return every rank's message; None when a rank does not come: the group is unusable then.

        Args:
            message: this rank's.
        """
        if self.ranks == 1:
            return [message]
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=_AGREEMENT_SECONDS))
            return gathered(message, self.group)
        except Exception:
            return None

    def close(self) -> None:
        """Destroy the group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


class Progress(Protocol):
    """The trainer's position: its current step, and the step of its newest checkpoint."""

    @property
    def step(self) -> int:
        """The current optimizer step."""
        ...

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint."""
        ...


class Rescue:
    """Save the last complete step when an exception ends the training.

    Args:
        boundary: undoes the step that failed.
        progress: the training's; restoring the boundary sets its step.
        save: saves the current step and waits until it is written; None without a checkpointer.
            Ranks may agree only over the group that it is given: an exception in the middle of a
            collective leaves every other group's ranks in different ones.
        unfit: returns why this rank's values must not be saved, or None.
        rank: rank 0 logs where the training goes on.
    """

    def __init__(
        self,
        boundary: StepBoundary,
        *,
        progress: Progress,
        save: Callable[[Any], None] | None,
        unfit: Callable[[], str | None],
        rank: int,
    ) -> None:
        self.boundary, self.progress, self.save, self.rank = boundary, progress, save, rank
        self.unfit = unfit
        self.agreement = Agreement()

    def close(self) -> None:
        """Destroy the process group."""
        self.agreement.close()

    def after(self, error: Exception) -> Exception:
        """Save the last complete step after an exception; return the exception to raise.

        With several ranks it is saved if all fail together (as they do when one fails in its data
        or in a callback). One that fails alone in the middle of a collective cannot be helped.

        Args:
            error: the exception.
        """
        progress = self.progress
        # A callback's exception is raised in the next step, by all ranks together.
        failed = getattr(error, "training_step", progress.step)
        error.training_step = failed  # type: ignore[attr-defined]
        problem = self.boundary.restore() or self.unfit()
        own = None if isinstance(error, RankFailedError) else f"{type(error).__name__}: {error}"
        messages = self.agreement.gather((progress.step, problem, own))
        if messages is None:
            problem = "the other ranks did not fail with this one"
        else:
            problem = next((p for _, p, _ in messages if p), None)
            if len({step for step, _, _ in messages}) > 1:
                problem = "the ranks failed in different steps"
        if problem is None and self.save and progress.step > progress.saved_step:
            try:
                self.save(self.agreement.group)
            except Exception as second:
                problem = f"{type(second).__name__}: {second}"
        done = progress.step - self.boundary.in_step
        if self.save and done and self.rank == 0:
            where = f"it goes on from step {progress.saved_step}"
            lost = done - progress.saved_step if problem else 0
            log.error(
                "step %d failed; %s",
                failed,
                f"{where} ({lost} lost: not saved, for {problem})" if lost else where,
            )
        if own is None and messages is not None:
            time.sleep(1.0)  # the rank that failed should report first
            rank = next((r for r, (_, _, o) in enumerate(messages) if o), None)
            if rank is not None:
                return RankFailedError(f"rank {rank}: {messages[rank][2]}")
        return error
