"""The states that a training run saves beside the model: optimizer, schedule, random numbers.

A state may have `prepare_load(saved)`, which the checkpointer calls before it asks for its state
dict: `saved` maps each key that the checkpoint has for it to a tensor on meta (shape, dtype) or
None (not a tensor). A state with that method must match its state dict exactly; for any other state
the saved structure wins.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ditty_di.checkpoint.serialization import insert, require_same
from ditty_di.fqn import canonical_fqn
from ditty_di.messages import first_of

log = logging.getLogger(__name__)

#: The key under which a schedule's state has the learning rates of the next update.
_RATES = "next_rates"
#: Options of a parameter group that are not saved with the optimizer: names, and what belongs to
#: the schedule, which `SchedulerState` saves.
_NOT_SAVED = ("params", "param_names", "lr", "initial_lr")


class OptimizerState:
    """An optimizer's state by parameter name, so that it fits any layout and any grouping.

    Keys are `state.<fqn>.<name>` and `param_groups.<fqn>` (the options of the parameter's group).
    An option whose *configured* value differs from the one when the checkpoint was made keeps the
    new value; the others take the saved one.

    Args:
        optimizer: its groups have `param_names` (it was built from (name, parameter) pairs).

    Raises:
        ValueError: a group without `param_names`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            if len(group.get("param_names", ())) != len(group["params"]):
                raise ValueError(
                    "optimizer: its groups have no param_names; build it from (name, parameter) "
                    "pairs, such as model.named_parameters()"
                )
        self._configured = [copy.deepcopy(self._options(g)) for g in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the options, flat."""
        flat = {key: holder[name] for key, holder, name in self._entries()}
        for group, configured in zip(self.optimizer.param_groups, self._configured, strict=True):
            options = {"now": self._options(group), "configured": configured}
            flat |= {f"param_groups.{name}": options for name in _names(group)}
        return flat

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        """Allocate the state that the checkpoint has and this optimizer does not have yet.

        Optimizers allocate their state in the first step; parameters without a gradient have none.
        So only parameters that have state in the checkpoint get it, by a step that is undone.

        Args:
            saved: see the module.

        Raises:
            ValueError: the checkpoint is of another optimizer or another model.
        """
        parameters = dict(self._named())
        owned = {key: name for key in saved if (name := _owner(key, parameters)) is not None}
        lacking = [
            parameters[name]
            for name in dict.fromkeys(owned.values())
            if not self.optimizer.state.get(parameters[name])
        ]
        if lacking:
            with _undone_step(self.optimizer, lacking):
                # The class's own step: a scheduler has put a counting one on the instance.
                type(self.optimizer).step(self.optimizer)
        live = self.state_dict()
        hint = "; load.optimizer=false starts it afresh"
        if unknown := [key for key in owned if saved[key] is not None and key not in live]:
            raise ValueError(
                f"the checkpoint has state that {type(self.optimizer).__name__} does not keep: "
                f"{first_of(unknown, 5)}{hint}"
            )
        require_same(live, saved, hint=hint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the values, not by `Optimizer.load_state_dict`: it casts to the parameter's dtype.

        Args:
            state_dict: as `state_dict` returned it.
        """
        known: set[str] = set()
        with torch.no_grad():
            for key, holder, name in self._entries():
                _assign(holder, name, state_dict[key])
                known.add(key)
        parameters = dict(self._named())
        for key, value in state_dict.items():  # allocated late in training, and not a tensor
            if key not in known and (owner := _owner(key, parameters)) is not None:
                path = tuple(key.removeprefix(f"state.{owner}.").split("."))
                insert(self.optimizer.state[parameters[owner]], path, value)
        for group, configured in zip(self.optimizer.param_groups, self._configured, strict=True):
            for parameter_name in _names(group)[:1]:  # all of a group have its options
                there = state_dict[f"param_groups.{parameter_name}"]
                for option, value in there["now"].items():
                    if _same(configured.get(option), there["configured"].get(option)):
                        _assign(group, option, value)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key not in _NOT_SAVED}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(_names(group), group["params"], strict=True)

    def _entries(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield (key, holder, name) for each value of the state: it is `holder[name]`."""

        def walk(prefix: str, state: dict[str, Any]) -> Iterator[Any]:
            for name, value in state.items():
                if isinstance(value, dict):
                    yield from walk(f"{prefix}.{name}", value)
                else:
                    yield f"{prefix}.{name}", state, name

        for name, parameter in self._named():
            if parameter in self.optimizer.state:
                yield from walk(f"state.{name}", self.optimizer.state[parameter])


class SchedulerState:
    """A schedule's whole state; loading it also sets the learning rates that it had reached.

    Args:
        scheduler: of any class of torch's interface.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state and the learning rates of the next update."""
        rates = [float(rate) for rate in self.scheduler.get_last_lr()]
        return {**self.scheduler.state_dict(), _RATES: rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the schedule; log how its curve differs from the configured one.

        Args:
            state_dict: as `state_dict` returned it.
        """
        saved = dict(state_dict)
        rates_before = saved.pop(_RATES, None)
        fresh = self.scheduler.state_dict()
        self.scheduler.load_state_dict(copy.deepcopy(saved))  # composite schedules modify it
        given = inspect.signature(type(self.scheduler)).parameters.keys() - {"last_epoch"}
        other = {k: fresh[k] for k in given & fresh.keys() if fresh[k] != saved.get(k)}
        if other and all(isinstance(v, int | float) for v in other.values()):
            log.warning(
                "the schedule continues from the checkpoint with %s, not the configured %s; "
                "load.lr_scheduler=false starts the configured one",
                ", ".join(f"{k}={saved.get(k)}" for k in other),
                ", ".join(f"{k}={v}" for k, v in other.items()),
            )
        base_rates = self.scheduler.state_dict().get("base_lrs")
        if base_rates != fresh.get("base_lrs"):
            log.warning(
                "the schedule continues from the checkpoint with its base learning rates %s, not "
                "the configured %s; load.lr_scheduler=false starts the configured one",
                base_rates,
                fresh.get("base_lrs"),
            )
        rates = self.scheduler.get_last_lr()
        for group, rate in zip(self.scheduler.optimizer.param_groups, rates, strict=True):
            _assign(group, "lr", rate)
        if rates_before is not None and rates_before != [float(rate) for rate in rates]:
            log.warning(
                "the learning rate goes from %.3g to %.3g here: the schedule follows its new curve "
                "(with max_steps=N longer, lr_scheduler.max_steps=OLD keeps the old one, whose end "
                "then holds)",
                rates_before[0],
                float(rates[0]),
            )


class RNGState:
    """This process's random number generators.

    Python's, NumPy's global one, torch's on the CPU and on this process's accelerator.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return their states, in plain types."""
        kind, keys, *rest = cast(tuple, np.random.get_state())
        return {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "accelerator": _accelerator().get_rng_state() if _accelerator() else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set their states.

        Args:
            state_dict: as `state_dict` returned it.
        """
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if _accelerator() and state_dict["accelerator"] is not None:
            _accelerator().set_rng_state(state_dict["accelerator"])


def _names(group: dict[str, Any]) -> list[str]:
    return [canonical_fqn(name) for name in group["param_names"]]


def _owner(key: str, parameters: Mapping[str, Any]) -> str | None:
    """Return the parameter that an entry `state.<parameter>.<...>` belongs to, None for others."""
    name = key.removeprefix("state.")
    while name and name not in parameters:
        name = name.rpartition(".")[0]
    return name if name and key.startswith("state.") else None


def _accelerator() -> Any:
    return torch.get_device_module() if torch.accelerator.is_available() else None


def _assign(holder: dict[Any, Any], key: Any, new: Any) -> None:
    """Set a value; a tensor of the same shape is written in place, as others may hold it too."""
    old = holder.get(key)
    if isinstance(old, Tensor) and old is not new:
        new = torch.as_tensor(new)
        if old.shape == new.shape:
            new = old.copy_(new)
    holder[key] = new


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return a == b


@contextmanager
def _undone_step(optimizer: Optimizer, stepped: list[Tensor]) -> Iterator[None]:
    """Undo a step taken in this block but for the state that it allocates.

    `stepped` get zero gradients. Zero gradients and a zero rate would not be enough: 0 * inf is
    NaN, an epsilon may underflow, -0.0 becomes 0.0, stochastic rounding draws random numbers,
    options count steps.
    """
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in everything]
    values = [p.detach().clone() for p in stepped]
    groups = [
        {k: (v, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    tables = [getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    hooks = [list(table.items()) for table in tables]
    for parameter in everything:
        parameter.grad = None
    for parameter in stepped:
        parameter.grad = torch.zeros_like(parameter)
    for table in tables:
        table.clear()
    accelerator = _accelerator()
    devices = [accelerator.current_device()] if accelerator else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(stepped, values, strict=True):
                parameter.copy_(value)
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                for key in group.keys() - saved.keys() - {"params"}:
                    del group[key]
                for key, (value, content) in saved.items():
                    group[key] = value.copy_(content) if isinstance(value, Tensor) else content
        for parameter, gradient in zip(everything, gradients, strict=True):
            parameter.grad = gradient
        for table, items in zip(tables, hooks, strict=True):
            table.update(items)
