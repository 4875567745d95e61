"""One micro-batch on its way from the loader to the loss, and what processors write beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditty_di.messages import did_you_mean


class MissingKey(KeyError):
    """A context key that no processor has written."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0])


class Context(dict[str, Any]):
    """A dictionary that accompanies a batch through processors and loss.

    The trainer writes these keys before the first preprocessor:
        original_batch: the loader's `(inputs, labels)`.
        target: the labels, until a processor writes another target.
        forward_kwargs: keyword arguments of `model.forward`: the loader's inputs except `"input"`.
        epoch: epoch of the loader, from 0; 0 for a loader without an attribute `epoch`.
        step: optimizer step, from 1.
        total_steps: number of optimizer steps of the training.
        device: the `torch.device` of the model.
        model: the trained module, or this rank's first pipeline stage of it.
        source: number of each row's source, `[rows]`, or of each label's, in the shape of the
            labels, if the data is a `ditty_di.data.Mixture`.

    By convention processors write `mask` for the elements that count in the loss. Reading a missing
    key raises `MissingKey`, whose message lists the keys that exist.
    """

    def __missing__(self, key: str) -> Any:
        known = ", ".join(map(str, self)) or "nothing"
        raise MissingKey(
            f"the context has no {key!r}{did_you_mean(key, self)}; it has {known}. An earlier "
            f"processor must write it"
        )

    def at(self, path: str) -> Any:
        """Return the value of a key, or of a path into nested mappings: `"forward_kwargs.t"`.

        Args:
            path: key, or keys separated by dots.

        Raises:
            MissingKey: the path does not exist.
        """
        if path in self or "." not in path:
            return self[path]
        value: Any = self
        for n, key in enumerate(path.split(".")):
            try:
                value = value[key]
            except (KeyError, TypeError, IndexError):
                if n == 0:
                    raise
                above = ".".join(path.split(".")[:n])
                has = f"; it has {', '.join(map(str, value))}" if hasattr(value, "keys") else ""
                raise MissingKey(f"the context's {above!r} has no {key!r}{has}") from None
        return value

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Context:
        """Return a context whose tensors are on `device`, also those in dicts, lists and tuples.

        Args:
            device: target device. A key `device` is set to it.
            non_blocking: as in `torch.Tensor.to`.

        Returns:
            A new context. Other values are the same objects; a tensor that occurs twice is moved
            once.
        """
        return self._moved(torch.device(device), _mover(device, non_blocking))

    def _moved(self, device: torch.device, move: Callable[[Tensor], Tensor]) -> Context:
        context = Context({key: _map_tensors(move, value) for key, value in self.items()})
        if "device" in self:
            context["device"] = device
        return context


def _mover(device: torch.device | str, non_blocking: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that moves each tensor once."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
        return moved[id(tensor)]

    return move


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in dicts, lists and tuples (pytree is five times slower)."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {key: _map_tensors(function, inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(function, inner) for inner in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(function, inner) for inner in value))
    return value


@dataclass(eq=False)
class Batch:
    """One micro-batch.

    Args:
        inputs: arguments of the model by name. `inputs["input"]` is its first positional argument
            (`[batch, seq]` token ids for a language model); the others are passed by keyword.
        labels: the loader's labels.
        context: what processors share about this batch; empty without processors.
        num_valid: what the loss counted in this batch before the model ran, or None.
        checks: state of the runtime checks of contracts for this batch, or None.
    """

    inputs: dict[str, Any]
    labels: Any
    context: Context = field(default_factory=Context)
    num_valid: Tensor | None = None
    checks: Any = None

    @classmethod
    def of(cls, loaded: Any) -> Batch:
        """Return the batch that a loader yielded.

        Args:
            loaded: a `Batch`, or a pair `(inputs, labels)`. An input `source` (the source of each
                row of a mixture, or of each label) goes to the context: it is not the model's.
        """
        if isinstance(loaded, cls):
            return loaded
        inputs, labels = loaded
        if not isinstance(inputs, dict) or "source" not in inputs:
            return cls(inputs, labels)
        own = {name: value for name, value in inputs.items() if name != "source"}
        return cls(own, labels, Context(source=inputs["source"]))

    @property
    def target(self) -> Any:
        """What the loss compares the prediction with: a processor's `target`, else the labels."""
        return self.context.get("target", self.labels)

    def to(self, device: torch.device) -> Batch:
        """Return a batch whose tensors are on `device`.

        Args:
            device: target device; copies to an accelerator do not block the host.
        """
        # Inputs and context share tensors: pixels are on the device once.
        move = _mover(device, device.type != "cpu")
        inputs = {
            name: move(value) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        labels = move(self.labels) if isinstance(self.labels, Tensor) else self.labels
        context = self.context and self.context._moved(device, move)
        return Batch(inputs, labels, context, self.num_valid, self.checks)

    def full_context(self) -> Context:
        """Return the context with `target` and `original_batch`, also without processors."""
        if "original_batch" in self.context:
            return self.context
        own = {"original_batch": (self.inputs, self.labels), "target": self.labels}
        return Context({**own, **self.context})


def document_starts(position_ids: Tensor) -> Tensor:
    """Return where documents begin, bool; both `[rows, length]`.

    A row begins with one, and so does each position that is not the previous one plus 1.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts


def document_index(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document within its row; both `[rows, length]`."""
    return document_starts(position_ids).cumsum(1) - 1
