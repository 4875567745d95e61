"""What a training run saves: model, optimizer, schedule and random numbers, as `Stateful`s.

`ModelState` and `OptimizerState` also have `prepare_load(saved)`, which the checkpointer calls
before it asks for their state dict: `saved` maps each key that the checkpoint has for them to a
tensor on meta (shape, dtype) or None (no tensor). A state with that method holds exactly what its
state dict says; from any other state the saved structure wins.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ditty_di.checkpoint.entries import insert, require_same, shown
from ditty_di.names import canonical_fqn

log = logging.getLogger(__name__)

#: The key under which a schedule's state has the rates of the next update.
_RATES = "next_rates"


def model_states(
    model_parts: Iterable[nn.Module], weights: Any = None
) -> dict[str, ModelState | BaseState]:
    """What a checkpoint holds of a model: all of it, or what a known base does not have.

    Args:
        weights: what filled the model. With `identity` (see `ditty_di.protocols.WeightsFn`) it can
            fill the frozen parameters again, so they are left out, and the base is noted instead.
    """
    parts = list(model_parts)
    identity = getattr(weights, "identity", None)
    frozen = any(not p.requires_grad for part in parts for p in part.parameters())
    if identity is None or not frozen:
        return {"model": ModelState(parts)}
    return {"base": BaseState(identity()), "model": ModelState(parts, frozen=False)}


class BaseState:
    """Which base the frozen parameters are of; loading one that was made with another fails.

    A base is known by its `hash` alone: it may lie somewhere else by now. A checkpoint without a
    base has its frozen parameters in it.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self._noted = True

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity} if self._noted else {}

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        self._noted = "identity" in saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint's base is another."""
        self._noted = True
        if "identity" in state_dict:
            require_base(
                state_dict["identity"],
                self.identity,
                hint="set model.path to the first, or load.base=false to load them nevertheless",
            )


def require_base(there: Mapping[str, Any], here: Mapping[str, Any], *, hint: str) -> None:
    """The frozen parameters must be of the base that the checkpoint was made with.

    Raises:
        ValueError: they are of another, both named.
    """
    if there["hash"] != here["hash"]:
        raise ValueError(
            f"the checkpoint's adapters were trained on the base {base_shown(there)}, but the base "
            f"here is {base_shown(here)}; {hint}"
        )


def base_shown(identity: Mapping[str, Any]) -> str:
    """`path@revision (hash 0123456789ab)`."""
    revision = f"@{identity['revision']}" if identity.get("revision") else ""
    return f"{identity['path']}{revision} (hash {identity['hash'][:12]})"


class ModelState:
    """The model's parameters and persistent buffers, under the names of the whole model.

    Args:
        model_parts: the model, or the stages of it that this rank has.
        frozen: whether parameters that are not trained are saved. If not, they are still loaded
            from a checkpoint that has them.

    Raises:
        ValueError: two parts (or two wrapped modules) have different tensors of one name.
    """

    def __init__(self, model_parts: Iterable[nn.Module], *, frozen: bool = True) -> None:
        self.model_parts = list(model_parts)
        self.frozen = frozen
        self._also: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in self.model_parts:
            for raw, value in self._of(part).items():
                name = canonical_fqn(raw)
                if name in merged:
                    raise ValueError(
                        f"two tensors of the model are called {name!r} (one is {raw!r}); every "
                        f"part must keep the names of the whole model"
                    )
                # A module's extra state may change its size; in a list it is saved as an object.
                merged[name] = [value] if raw.endswith(_EXTRA_STATE_KEY_SUFFIX) else value
        return merged

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        """Raises ValueError when the checkpoint is not this model's."""
        self._also = frozenset(saved)
        require_same(self.state_dict(), saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.model_parts:
            own = {raw: state_dict[canonical_fqn(raw)] for raw in self._of(part)}
            extra = [raw for raw in own if raw.endswith(_EXTRA_STATE_KEY_SUFFIX)]
            values = {**own, **{raw: own[raw][0] for raw in extra}}
            part.load_state_dict(values, strict=self.frozen)
        self._also = frozenset()

    def _of(self, part: nn.Module) -> dict[str, Any]:
        """The entries of a part's state dict that are saved, or loaded now."""
        entries = part.state_dict()
        if self.frozen:
            return entries
        # By what is kept: quantised layers may put more into a state dict than parameters.
        kept = {name for name, _ in part.named_buffers(remove_duplicate=False)}
        kept |= {n for n, p in part.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept = {canonical_fqn(name) for name in kept} | self._also
        return {
            raw: value
            for raw, value in entries.items()
            if canonical_fqn(raw) in kept or raw.endswith(_EXTRA_STATE_KEY_SUFFIX)
        }


class OptimizerState:
    """An optimizer's state by parameter name, so that it fits any layout and any grouping.

    Keys are `state.<fqn>.<name>` and `param_groups.<fqn>` (the options of the parameter's group).
    An option whose *configured* value is another than when the checkpoint was made keeps the new
    value; the others take the saved one.

    Args:
        optimizer: its groups have `param_names` (it was built from (name, parameter) pairs).
        scheduled: options that belong to the schedule, and are saved by `SchedulerState`.

    Raises:
        ValueError: a group without `param_names`.
    """

    def __init__(
        self, optimizer: Optimizer, *, scheduled: Iterable[str] = ("lr", "initial_lr")
    ) -> None:
        self.optimizer = optimizer
        self._not_saved = {"params", "param_names", *scheduled}
        for group in optimizer.param_groups:
            if len(group.get("param_names", ())) != len(group["params"]):
                raise ValueError(
                    "optimizer: its groups have no param_names; build it from (name, parameter) "
                    "pairs, such as model.named_parameters()"
                )
        self._configured = [copy.deepcopy(self._options(g)) for g in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, parameter in self._named():
            for key, value, _ in self._entries(name, parameter):
                flat[key] = value
        for group, configured in zip(self.optimizer.param_groups, self._configured, strict=True):
            options = {"now": self._options(group), "configured": configured}
            for name in self._names(group):
                flat[f"param_groups.{name}"] = options
        return flat

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        """Makes the state that the checkpoint has and this optimizer does not yet.

        Optimizers make their state in the first step; parameters without a gradient have none. So
        only parameters that have state in the checkpoint get it, by a step that leaves no trace.

        Raises:
            ValueError: the checkpoint is another optimizer's or another model's.
        """
        parameters = dict(self._named())
        owned = {key: name for key in saved if (name := _owner(key, parameters)) is not None}
        self._make_state([parameters[name] for name in dict.fromkeys(owned.values())])
        live = self.state_dict()
        hint = "; load.optimizer=false starts it afresh"
        if unknown := [key for key in owned if saved[key] is not None and key not in live]:
            raise ValueError(
                f"the checkpoint has state that {type(self.optimizer).__name__} does not keep: "
                f"{shown(unknown)}{hint}"
            )
        require_same(live, saved, hint=hint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts the values in place.

        Not through `Optimizer.load_state_dict`, which casts state to the parameter's dtype.
        """
        known: set[str] = set()
        with torch.no_grad():
            for name, parameter in self._named():
                for key, value, place in self._entries(name, parameter):
                    _assign(*place, value, state_dict[key])
                    known.add(key)
        parameters = dict(self._named())
        for key, value in state_dict.items():  # what is made late in training, and is no tensor
            if key not in known and (owner := _owner(key, parameters)) is not None:
                path = tuple(key.removeprefix(f"state.{owner}.").split("."))
                insert(self.optimizer.state[parameters[owner]], path, value)
        for group, configured in zip(self.optimizer.param_groups, self._configured, strict=True):
            for name in self._names(group)[:1]:  # one group, one set of options
                there = state_dict[f"param_groups.{name}"]
                for option, value in there["now"].items():
                    if _same(configured.get(option), there["configured"].get(option)):
                        _assign(group, option, group.get(option), value)

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key not in self._not_saved}

    @staticmethod
    def _names(group: dict[str, Any]) -> list[str]:
        return [canonical_fqn(name) for name in group["param_names"]]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(self._names(group), group["params"], strict=True)

    def _entries(
        self, name: str, parameter: Tensor
    ) -> Iterator[tuple[str, Any, tuple[dict[str, Any], str]]]:
        """(key, value, where it is) of one parameter's state, nested dicts flattened."""

        def walk(prefix: str, state: dict[str, Any]) -> Iterator[Any]:
            for key, value in state.items():
                if isinstance(value, dict):
                    yield from walk(f"{prefix}.{key}", value)
                else:
                    yield f"{prefix}.{key}", value, (state, key)

        if parameter in self.optimizer.state:
            yield from walk(f"state.{name}", self.optimizer.state[parameter])

    def _make_state(self, parameters: list[Tensor]) -> None:
        lacking = [p for p in parameters if not self.optimizer.state.get(p)]
        if not lacking:
            return
        with _without_trace(self.optimizer, lacking):
            # The class's own step: a scheduler has put a counting one on the instance.
            type(self.optimizer).step(self.optimizer)


class SchedulerState:
    """A schedule's whole state; loading it also sets the learning rates that it had reached."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {**self.scheduler.state_dict(), _RATES: list(map(float, self._rates()))}

    def _rates(self) -> list[Any]:
        return self.scheduler.get_last_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        rates_before = state_dict.pop(_RATES, None)
        fresh = self.scheduler.state_dict()
        configured = fresh.get("base_lrs")
        # Composite schedulers take what they are given apart.
        self.scheduler.load_state_dict(copy.deepcopy(state_dict))
        given = inspect.signature(type(self.scheduler)).parameters.keys() - {"last_epoch"}
        other = {k: fresh[k] for k in given & fresh.keys() if fresh[k] != state_dict.get(k)}
        if other and all(isinstance(v, int | float) for v in other.values()):
            log.warning(
                "the schedule continues from the checkpoint with %s, not the configured %s; "
                "load.lr_scheduler=false starts the configured one",
                ", ".join(f"{k}={state_dict.get(k)}" for k in other),
                ", ".join(f"{k}={v}" for k, v in other.items()),
            )
        if configured != (saved := self.scheduler.state_dict().get("base_lrs")):
            log.warning(
                "the schedule continues from the checkpoint with its base learning rates %s, not "
                "the configured %s; load.lr_scheduler=false starts the configured one",
                saved,
                configured,
            )
        rates = self.scheduler.get_last_lr()
        for group, rate in zip(self.scheduler.optimizer.param_groups, rates, strict=True):
            _assign(group, "lr", group["lr"], rate)
        now = list(map(float, rates))
        if rates_before is not None and now != rates_before:
            log.warning(
                "the learning rate goes from %.3g to %.3g here: the schedule follows its new curve "
                "(with steps=N longer, lr_scheduler.total_steps=OLD keeps the old one, whose end "
                "then holds)",
                rates_before[0],
                now[0],
            )


class RNGState:
    """This process's random number generators: Python, NumPy's global one, torch's on the CPU and
    on this process's accelerator."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = cast(tuple, np.random.get_state())
        return {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "accelerator": _accelerator().get_rng_state() if _accelerator() else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if _accelerator() and state_dict["accelerator"] is not None:
            _accelerator().set_rng_state(state_dict["accelerator"])


def _owner(key: str, parameters: Mapping[str, Any]) -> str | None:
    """The parameter whose state is under `state.<its name>.<...>`, if it is one of these."""
    name = key.removeprefix("state.")
    while name and name not in parameters:
        name = name.rpartition(".")[0]
    return name if name and key.startswith("state.") else None


def _accelerator() -> Any:
    return torch.get_device_module() if torch.accelerator.is_available() else None


def _assign(holder: dict[Any, Any], key: Any, old: Any, new: Any) -> None:
    """Sets a value; a tensor that fits keeps its identity, for others may hold it too."""
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
def _without_trace(optimizer: Optimizer, stepped: list[Tensor]) -> Iterator[None]:
    """A step within it, on zero gradients of `stepped`, makes their state and changes nothing else.

    Zero gradients and a zero rate would not be enough: 0 * inf is no number, an epsilon may
    underflow, -0.0 becomes 0.0, stochastic rounding draws random numbers, options count steps.
    """
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in everything]
    values = [p.detach().clone() for p in stepped]
    groups = [
        {k: (v, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    hooks = [
        (table, list(table.items()))
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if (table := getattr(optimizer, name, None))
    ]
    for parameter in everything:
        parameter.grad = None
    for parameter in stepped:
        parameter.grad = torch.zeros_like(parameter)
    for table, _ in hooks:
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
            for parameter, gradient in zip(everything, gradients, strict=True):
                parameter.grad = gradient
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                for key in [k for k in group if k != "params" and k not in saved]:
                    del group[key]
                for key, (value, content) in saved.items():
                    group[key] = value.copy_(content) if isinstance(value, Tensor) else content
        for table, items in hooks:
            table.update(items)
