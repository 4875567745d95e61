"""Contracts against real tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ditty_di.processors.chain import LOADER, LOSS, MODEL, POST, PRE, Stage
from ditty_di.processors.context import Context, MissingKey
from ditty_di.processors.contracts import DTYPES, ContractError, Entry

_TORCH = {
    "torch.float16": "f16",
    "torch.bfloat16": "bf16",
    "torch.float32": "f32",
    "torch.float64": "f64",
    "torch.bool": "b",
    "torch.uint8": "u8",
    **{f"torch.int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
}
_PYTHON = {bool: "b", int: "i64", float: "f64"}
_ABSENT = object()


class TensorChecks:
    """Compares what stages take and give with their contracts, on the first batch or on every one.

    Args:
        stages: as `ditty_di.processors.stages.pipeline` gives them.
        every: every batch, and not just the first that no processor rejects.
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
        """The checks of the next batch; None when it needs none. Set `done` once one is through."""
        return None if self.done and not self.every else BatchChecks()


class BatchChecks:
    """One batch on its way; knows what names the stage before gave to what flows."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()  # empty: nobody knows
        self._ranks: dict[str, tuple[int, str]] = {}

    def takes(self, stage: Stage, flow: Any, ctx: Context) -> None:
        """Checks what a stage, or each of its parts, is about to take.

        Raises:
            ContractError: names stage, tensor, what was expected and what was found.
        """
        self._ranks = {}
        if stage.contract is not None:
            for n, entry in enumerate(stage.contract.inputs):
                value = self._flowing(entry, n, flow, ctx, before=stage.kind in (PRE, MODEL))
                self._check(f"{stage} takes {entry.name}", entry, value)
            for entry in stage.contract.reads:
                value = _in_context(ctx, entry.name)
                self._check(f"{stage} reads ctx.{entry.name}", entry, value)
        for part in stage.parts:
            self.takes(part, flow, ctx)

    def gives(self, stage: Stage, flow: Any, ctx: Context) -> None:
        """Checks what a stage has given, after its `takes`, which tells the letters' ranks.

        Raises:
            ContractError: as `takes` does.
        """
        if stage.contract is None:
            self._names = ()
            return
        if stage.contract.outputs:
            self._names = tuple(entry.name for entry in stage.contract.outputs)
        elif stage.kind == MODEL:
            self._names = ()
        for n, entry in enumerate(stage.contract.outputs):
            value = self._flowing(entry, n, flow, ctx, before=stage.kind in (LOADER, PRE))
            self._check(f"{stage} gives {entry.name}", entry, value)
        for entry in stage.contract.writes:
            self._check(f"{stage} writes ctx.{entry.name}", entry, _in_context(ctx, entry.name))

    def _flowing(self, entry: Entry, n: int, flow: Any, ctx: Context, *, before: bool) -> Any:
        """The value of an entry: by its name where names are known, else by its place."""
        if not entry.is_position:
            if isinstance(flow, Mapping) and entry.name in flow:
                return flow[entry.name]
            if before and entry.name in (kwargs := ctx.get("forward_kwargs") or {}):
                return kwargs[entry.name]
            if not (hasattr(flow, "shape") or isinstance(flow, tuple | list)):
                value = getattr(flow, entry.name, _ABSENT)  # an output with attributes
                if value is not _ABSENT:
                    return value
            if self._names and entry.name not in self._names:
                return _ABSENT
            n = self._names.index(entry.name) if self._names else n
        place = int(entry.name) if entry.is_position else n
        if isinstance(flow, Mapping):
            flow = tuple(flow.values())
        if isinstance(flow, tuple | list):
            return flow[place] if place < len(flow) else _ABSENT
        return flow if place == 0 else _ABSENT

    def _check(self, what: str, entry: Entry, value: Any) -> None:
        if value is _ABSENT:
            raise ContractError(f"{what}: expected {_expected(entry)}; found nothing")
        shape = getattr(value, "shape", None)
        if shape is not None:
            rank, found = len(shape), _TORCH.get(str(value.dtype), str(value.dtype))
            text = f"rank {rank}, dtype {found} (shape {list(shape)})"
        elif type(value) in _PYTHON:
            rank, found, text = 0, _PYTHON[type(value)], f"{value!r}, a Python number"
        elif entry.rank == "*" and entry.dtype is None:
            return
        else:
            raise ContractError(
                f"{what}: expected {_expected(entry)}; found no tensor, but {type(value).__name__}"
            )
        fits = entry.dtype is None or found in DTYPES[entry.dtype]
        letter, more = entry.variable
        because = ""
        if letter:
            number, by = self._ranks.setdefault(letter, (rank - more, what))
            if number < 0 or rank - more != number:
                fits = False
                because = f" ({letter} is {number}: {by})" if by != what else ""
        elif entry.rank != "*":
            fits = fits and rank == entry.rank
        if not fits:
            raise ContractError(f"{what}: expected {_expected(entry)}{because}; found {text}")


def _in_context(ctx: Context, path: str) -> Any:
    try:
        return ctx.at(path)
    except MissingKey:
        return _ABSENT


def _expected(entry: Entry) -> str:
    rank = "any rank" if entry.rank == "*" else f"rank {entry.rank}"
    return f"{rank}, {f'dtype {entry.dtype}' if entry.dtype else 'any dtype'}"
