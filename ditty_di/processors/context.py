"""What stages tell each other beside the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditty_di.config.targets import did_you_mean

if TYPE_CHECKING:
    import torch


class MissingKey(KeyError):
    """A key that nobody has written."""

    def __str__(self) -> str:  # KeyError's own shows the message's repr
        return str(self.args[0])


class Context(dict[str, Any]):
    """A dictionary that goes with a batch from the loader to the loss.

    The trainer writes:
        original_batch: the loader's `(inputs, labels)`.
        target: the labels, until a processor writes another.
        forward_kwargs: keyword arguments of `model.forward`; the loader's inputs but `"input"`.
        epoch: the loader's, from 0; 0 where the loader has no `epoch`.
        step: the optimizer step, from 1.
        total_steps: the steps of the whole training.
        device: the `torch.device` that the model is on.
        model: the module (or this rank's first stage of it) that is trained.

    By convention processors write `mask` for what counts in the loss, and what they like under
    other keys. Reading a key that is not there raises `MissingKey`, which names what there is.
    """

    #: What is known of this batch while contracts are checked against its tensors.
    checks: Any = None
    #: The model's inputs, and what the loss counted of the batch, before the model runs.
    counted: Any = None

    def __missing__(self, key: str) -> Any:
        known = ", ".join(map(str, self)) or "nothing"
        raise MissingKey(
            f"the context has no {key!r}{did_you_mean(key, self)}; it has {known}. A processor "
            f"before must write it"
        )

    def at(self, path: str) -> Any:
        """The value of a key, or of a path into nested mappings: `"forward_kwargs.t"`.

        Raises:
            MissingKey: there is none.
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
        """A context whose tensors, also those in dicts, tuples and lists, are on `device`: this one
        if they are all there.

        What is no tensor is the same object, and a tensor that occurs twice is moved once.
        """
        import torch

        device = torch.device(device)

        def is_there(value: Any) -> bool:
            if isinstance(value, torch.Tensor):
                return value.device == device
            if isinstance(value, tuple | list):
                return all(map(is_there, value))
            return type(value) is not dict or all(map(is_there, value.values()))

        if all(map(is_there, self.values())):
            return self
        moved: dict[int, Any] = {}

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if id(value) not in moved:
                    moved[id(value)] = value.to(device, non_blocking=non_blocking)
                return moved[id(value)]
            if type(value) is dict:
                return {key: move(inner) for key, inner in value.items()}
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*map(move, value))
            if type(value) in (tuple, list):
                return type(value)(map(move, value))
            return value

        context = Context({key: move(value) for key, value in self.items()})
        if "device" in self:
            context["device"] = device
        context.checks, context.counted = self.checks, self.counted
        return context
