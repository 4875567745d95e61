"""Restore live objects from a checkpoint: what to read, whether it fits, handing it over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditty_di.checkpoint.folder import Checkpoint
from ditty_di.checkpoint.restricted import loads
from ditty_di.checkpoint.serialization import KeyPath, insert, key_of, leaves
from ditty_di.messages import first_of
from ditty_di.protocols import Stateful

log = logging.getLogger(__name__)


class LoadPlan:
    """One rank's part of restoring a checkpoint: `prepare`, read `targets`, `restore`.

    Args:
        checkpoint: the checkpoint.
        rank_key: the key of this rank's entry in the states that each rank has for itself.

    Attributes:
        targets: entries to read, by state and key: a live tensor (read in place, each rank its
            shards), a new one where the live one does not have the saved shape, or None for a
            pickled entry.
    """

    def __init__(self, checkpoint: Checkpoint, *, rank_key: str) -> None:
        self.checkpoint = checkpoint
        self.rank_key = rank_key
        self.targets: dict[str, dict[str, Any]] = {}
        self._paths: dict[tuple[str, str], KeyPath] = {}
        self._claims: dict[str, bool] = {}

    def prepare(self, states: Mapping[str, Stateful], rank_states: Mapping[str, Stateful]) -> None:
        """Decide what is read.

        Args:
            states: by name; one logical object each over all ranks.
            rank_states: by name; each rank's own.

        Raises:
            FileNotFoundError: this rank does not see the checkpoint.
            ValueError: the checkpoint lacks entries of the live states, or has other shapes.
        """
        self._states, self._rank_states = states, rank_states
        saved = self.checkpoint.entries
        missing: dict[str, list[str]] = {}
        for name, state in states.items():
            missing[name] = self._add(name, state, saved.get(name, {}))
        for name in rank_states:
            self.targets[name] = {self.rank_key: None}
            missing[name] = [key for key in self.targets[name] if key not in saved.get(name, {})]
        names = [f"{name}.{key}" for name, keys in missing.items() for key in keys]
        if names:
            switches = " ".join(f"load.{name}=false" for name, keys in missing.items() if keys)
            raise ValueError(
                f"the checkpoint does not have {first_of(names, 5)}; {switches} starts without"
            )

    def _add(self, name: str, state: Stateful, saved: dict[str, Tensor | None]) -> list[str]:
        """Add the targets of one state; return the keys that the checkpoint lacks."""
        prepare_load = getattr(state, "prepare_load", None)
        if prepare_load is not None:
            try:
                prepare_load(saved)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        targets = self.targets.setdefault(name, {})
        missing, cast = [], []
        for path, value in leaves(state.state_dict()):
            key = key_of(path)
            if key not in saved:
                missing.append(key)
                continue
            there = saved[key]
            fits = isinstance(value, Tensor) and there is not None and there.shape == value.shape
            if isinstance(value, DTensor) and not fits:
                raise ValueError(f"{name}.{key} is not a tensor of shape {list(value.shape)} there")
            targets[key], self._paths[name, key] = value if fits else _empty(there), path
            if fits and there is not None and there.dtype != value.dtype:
                cast.append(f"{name}.{key} ({there.dtype} -> {value.dtype})")
        if cast:
            log.warning("these are cast while they are loaded: %s", first_of(cast, 5))
        for key, there in saved.items():
            if prepare_load is not None and there is not None:
                self._claims[f"{name}.{key}"] = key in targets
            elif key not in targets:
                targets[key], self._paths[name, key] = _empty(there), (key,)
        return missing

    def unclaimed(self, group: Any) -> list[str]:
        """Return saved tensors that no rank loads (with pipeline stages, a rank loads its own).

        Only states with `prepare_load` are checked; from others the saved structure is taken.

        Args:
            group: the process group of all ranks.
        """
        keys = sorted(self._claims)
        claimed = torch.tensor([self._claims[key] for key in keys], dtype=torch.uint8)
        if keys:
            dist.all_reduce(claimed, dist.ReduceOp.MAX, group=group)
        return [key for key, has in zip(keys, claimed.tolist(), strict=True) if not has]

    def restore(self) -> None:
        """Load what was read into every state."""
        for name, state in self._states.items():
            state_dict: dict[Any, Any] = {}
            for key, value in self.targets[name].items():
                path = self._paths[name, key]
                if isinstance(value, bytes):
                    path, value = loads(value)
                insert(state_dict, path, value)
            state.load_state_dict(state_dict)
        for name, state in self._rank_states.items():
            state.load_state_dict(loads(self.targets[name][self.rank_key])[1])


def _empty(there: Tensor | None) -> Tensor | None:
    return None if there is None else torch.empty(there.shape, dtype=there.dtype)
