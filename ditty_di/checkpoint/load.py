"""From a checkpoint back into live objects: what to read, whether it fits, handing it over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditty_di.checkpoint.entries import (
    KeyPath,
    insert,
    key_of,
    leaves,
    saved_entries,
    shown,
    unpack,
)

if TYPE_CHECKING:
    from ditty_di.protocols import Stateful

log = logging.getLogger(__name__)


class LoadPlan:
    """One rank's part of restoring a checkpoint: `prepare`, read `targets`, `restore`.

    `targets` are the entries to read, by state and key: a live tensor (read in place, each rank
    its shards), a new one where the live one does not have the saved shape, or None for a pickled
    entry.
    """

    def __init__(self, checkpoint: Path, *, rank_key: str) -> None:
        self.checkpoint = checkpoint
        self.rank_key = rank_key
        self.targets: dict[str, dict[str, Any]] = {}
        self._paths: dict[str, dict[str, KeyPath]] = {}
        self._claims: dict[str, bool] = {}

    def prepare(self, states: Mapping[str, Stateful], rank_states: Mapping[str, Stateful]) -> None:
        """Decides what is read.

        Raises:
            FileNotFoundError: this rank does not see the checkpoint.
            ValueError: the live states have what the checkpoint does not, or in another shape.
        """
        self._states, self._rank_states = states, rank_states
        saved = saved_entries(self.checkpoint)
        missing: dict[str, list[str]] = {}
        for name, state in states.items():
            missing[name] = self._add(name, state, saved.get(name, {}))
        for name in rank_states:
            self.targets[name] = {self.rank_key: None}
            missing[name] = [key for key in self.targets[name] if key not in saved.get(name, {})]
        if lacking := {name: keys for name, keys in missing.items() if keys}:
            names = [f"{name}.{key}" for name, keys in lacking.items() for key in keys]
            switches = " ".join(f"load.{name}=false" for name in lacking)
            raise ValueError(
                f"the checkpoint does not have {shown(names)}; {switches} starts without"
            )

    def _add(self, name: str, state: Stateful, saved: dict[str, Tensor | None]) -> list[str]:
        """Adds one state's targets; returns what the checkpoint lacks."""
        exact = getattr(state, "prepare_load", None)
        if exact is not None:
            try:
                exact(saved)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        targets, paths = self.targets.setdefault(name, {}), self._paths.setdefault(name, {})
        missing, cast = [], []
        for path, value in leaves(state.state_dict()):
            key = key_of(path)
            if key not in saved:
                missing.append(key)
                continue
            there = saved[key]
            fits = isinstance(value, Tensor) and there is not None and there.shape == value.shape
            if isinstance(value, DTensor) and not fits:
                raise ValueError(f"{name}.{key} is no tensor of shape {list(value.shape)} there")
            targets[key], paths[key] = value if fits else _empty(there), path
            if fits and there is not None and there.dtype != value.dtype:
                cast.append(f"{name}.{key} ({there.dtype} -> {value.dtype})")
        if cast:
            log.warning("these are cast while they are loaded: %s", shown(cast))
        for key, there in saved.items():
            if exact is not None and there is not None:
                self._claims[f"{name}.{key}"] = key in targets
            elif key not in targets:
                targets[key], paths[key] = _empty(there), (key,)
        return missing

    def unclaimed(self, group: Any) -> list[str]:
        """Tensors of exact states that no rank has a place for (a rank has its part of a model)."""
        keys = sorted(self._claims)
        claimed = torch.tensor([self._claims[key] for key in keys], dtype=torch.uint8)
        if keys:
            dist.all_reduce(claimed, dist.ReduceOp.MAX, group=group)
        return [key for key, has in zip(keys, claimed.tolist(), strict=True) if not has]

    @staticmethod
    def require_claimed(unclaimed: list[str]) -> None:
        """Raises ValueError when something of the checkpoint would be left behind."""
        if unclaimed:
            raise ValueError(f"the checkpoint has what this run does not: {shown(unclaimed)}")

    def restore(self) -> None:
        """Hands every state what was read."""
        for name, state in self._states.items():
            state_dict: dict[Any, Any] = {}
            for key, value in self.targets[name].items():
                path = self._paths[name][key]
                if isinstance(value, bytes):
                    path, value = unpack(value)
                insert(state_dict, path, value)
            state.load_state_dict(state_dict)
        for name, state in self._rank_states.items():
            state.load_state_dict(unpack(self.targets[name][self.rank_key])[1])


def _empty(there: Tensor | None) -> Tensor | None:
    return None if there is None else torch.empty(there.shape, dtype=there.dtype)
