"""Check contracts against the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ditty_di.contracts.check import Letters
from ditty_di.contracts.grammar import ContractError, Entry
from ditty_di.contracts.stages import LOADER, LOSS, MODEL, POST, PRE, Stage

_TORCH = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "b",
}
_PYTHON = {bool: "b", int: "i64", float: "f64"}
_ABSENT = object()


class TensorChecks:
    """Compare what stages take and return with their contracts, on the first batch or on each.

    Args:
        stages: as `ditty_di.contracts.stages.pipeline` returns them.
        every: check every batch instead of the first that no processor rejects.
    """

    def __init__(self, stages: Iterable[Stage], *, every: bool = False) -> None:
        self.every, self.done = every, False
        by_kind: dict[str, list[Stage]] = {kind: [] for kind in (LOADER, PRE, MODEL, POST, LOSS)}
        for stage in stages:
            by_kind[stage.kind].append(stage)
        self.loader, self.model, self.loss = (
            (by_kind[kind] or [Stage(kind, "")])[0] for kind in (LOADER, MODEL, LOSS)
        )
        self.preprocessors, self.postprocessors = by_kind[PRE], by_kind[POST]

    def begin(self) -> BatchChecks | None:
        """Return the checks of the next batch, or None; set `done` once a batch has passed."""
        return None if self.done and not self.every else BatchChecks()


class BatchChecks:
    """Check one batch on its way through the pipeline."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()  # of the batch or output by position; empty if unknown
        self._letters = Letters()

    def takes(self, stage: Stage, flow: Any, ctx: Any) -> None:
        """Check what a stage, or each of its parts, is about to take.

        Args:
            stage: of the pipeline.
            flow: the batch, or the model's output.
            ctx: the batch's `Context`.

        Raises:
            ContractError: names stage, tensor, what was expected and what was found.
        """
        self._letters = Letters()
        if stage.contract is not None:
            for n, entry in enumerate(stage.contract.inputs):
                value = self._flowing(entry, n, flow, ctx, before=stage.kind in (PRE, MODEL))
                self._check(f"{stage} takes {entry.name}", entry, value)
            for entry in stage.contract.reads:
                self._check(f"{stage} reads ctx.{entry.name}", entry, _read(ctx, entry.name))
        for part in stage.parts:
            self.takes(part, flow, ctx)

    def gives(self, stage: Stage, flow: Any, ctx: Any) -> None:
        """Check what a stage has returned; called after its `takes`, which determines the letters.

        Args:
            stage: as in `takes`.
            flow: as in `takes`.
            ctx: as in `takes`.

        Raises:
            ContractError: as in `takes`.
        """
        contract = stage.contract
        if contract is None or contract.outputs or stage.kind == MODEL:
            self._names = tuple(entry.name for entry in contract.outputs) if contract else ()
        if contract is None:
            return
        for n, entry in enumerate(contract.outputs):
            value = self._flowing(entry, n, flow, ctx, before=stage.kind in (LOADER, PRE))
            self._check(f"{stage} gives {entry.name}", entry, value)
        for entry in contract.writes:
            self._check(f"{stage} writes ctx.{entry.name}", entry, _read(ctx, entry.name))

    def _flowing(self, entry: Entry, n: int, flow: Any, ctx: Any, *, before: bool) -> Any:
        """Return the value of an entry: by name where names are known, else by position."""
        name, position = entry.name, n
        if entry.is_position:
            position = int(name)
        elif isinstance(flow, Mapping) and name in flow:
            return flow[name]
        elif before and name in (kwargs := ctx.get("forward_kwargs") or {}):
            return kwargs[name]
        elif not isinstance(flow, torch.Tensor | tuple | list) and hasattr(flow, name):
            return getattr(flow, name)
        elif self._names:
            if name not in self._names:
                return _ABSENT
            position = self._names.index(name)
        if isinstance(flow, Mapping):
            flow = tuple(flow.values())
        values = flow if isinstance(flow, tuple | list) else (flow,)
        return values[position] if position < len(values) else _ABSENT

    def _check(self, what: str, entry: Entry, value: Any) -> None:
        """Raise ContractError if a value does not satisfy an entry."""
        if hasattr(value, "shape"):
            rank, dtype = len(value.shape), _TORCH.get(value.dtype, str(value.dtype))
            found = f"rank {rank}, dtype {dtype} (shape {list(value.shape)})"
        elif type(value) in _PYTHON:
            rank, dtype, found = 0, _PYTHON[type(value)], f"{value!r}, a Python number"
        elif value is not _ABSENT and entry.rank == "*" and entry.dtype is None:
            return
        else:
            found = f"no tensor, but {type(value).__name__}"
            found = "nothing" if value is _ABSENT else found
            raise ContractError(f"{what}: expected {_expected(entry)}; found {found}")
        if self._letters.mismatch(entry, rank, dtype, what):
            letter, _ = entry.variable
            number, by = self._letters.get(letter, (0, what))
            because = f" ({letter} is {number}: {by})" if by != what else ""
            raise ContractError(f"{what}: expected {_expected(entry)}{because}; found {found}")


def _read(ctx: Any, path: str) -> Any:
    try:
        return ctx.at(path)
    except KeyError:
        return _ABSENT


def _expected(entry: Entry) -> str:
    rank = "any rank" if entry.rank == "*" else f"rank {entry.rank}"
    return f"{rank}, {f'dtype {entry.dtype}' if entry.dtype else 'any dtype'}"
