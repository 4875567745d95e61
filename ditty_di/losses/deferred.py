"""Logits on demand: a language model whose forward pass stops before its output projection.

`[batch, seq, vocab]` logits are often the largest tensor of a training step. With `deferred_head`
in the `model.head` slot a model returns its last hidden states and the way from there to logits, so
that a loss can go that way for a few tokens at a time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Marks a `forward` that defers.
DEFERS = "_defers_the_head"

#: Element by element, so they may as well be done to a few tokens at a time.
ELEMENTWISE = frozenset(
    ("add", "clone", "contiguous", "div", "float", "mul", "neg", "sub", "tanh", "to", "true_divide")
)


def deferred_head(model: nn.Module, /) -> nn.Module:
    """Makes a Hugging Face language model return a `DeferredOutput`; names stay as they are.

    The model's own `forward` runs, with its output projection put off: what it does to the logits
    afterwards (soft-capping, scaling, a bias) is recorded and done later. Calls that want more
    than that get the ordinary output: with `labels`, `logits_to_keep`, `return_dict=False`, or a
    key-value cache (`use_cache`, `past_key_values`), as `generate` makes them.

    Apply it last, around adapters.

    Raises:
        ValueError: the model has no output embeddings, or its head is deferred already.
        NotImplementedError: (in `forward`) the model does to its logits what cannot be put off.
    """
    kind = type(model).__name__
    projection = getattr(model, "get_output_embeddings", lambda: None)()
    if projection is None:
        raise ValueError(
            f"model.head: {kind} has no output embeddings to defer (get_output_embeddings() gives "
            f"none); leave model.head out and choose a loss on logits, such as loss=causal_lm"
        )
    if hasattr(model.forward, DEFERS):
        raise ValueError(f"model.head: the head of this {kind} is deferred already; once will do")
    replaced = vars(model).get("forward")
    ordinary = type(model).forward if replaced is None else _without_self(replaced)

    @functools.wraps(ordinary)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _wants_logits(**kwargs):
            return ordinary(self, *args, **kwargs)
        projection = self.get_output_embeddings()
        with _put_off(projection):
            output = ordinary(self, *args, **kwargs)
        logits = output.logits
        if not isinstance(logits, _DeferredLogits):
            raise NotImplementedError(
                f"model.head: {kind} does not call its output embeddings to make its logits, so "
                f"they cannot be deferred; leave model.head out (loss=causal_lm)"
            )
        # The output of a sharded module must not be a view: FSDP's hooks would sit on its base.
        hidden = logits.hidden.clone() if logits.hidden._is_view() else logits.hidden
        others = type(output)(**{k: v for k, v in output.items() if k != "logits"})
        return DeferredOutput(
            hidden, others, Head(self, projection, logits.steps, _autocast(hidden.device.type))
        )

    setattr(forward, DEFERS, True)
    # A bound method, so that a deep copy of the model is bound to the copy.
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    return model


def defer_head(model: nn.Module) -> nn.Module:
    """Return the model with a deferred head, for a loss on hidden states (`Loss.prepare_model`).

    A model whose head is deferred already stays as it is.
    """
    return model if hasattr(model.forward, DEFERS) else deferred_head(model)


@dataclass(frozen=True, eq=False)
class Step:
    """Something done to logits: `function(*arguments)`, with the logits in place of `LOGITS`."""

    name: str
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        arguments = [logits if a is LOGITS else a for a in self.arguments]
        return self.function(*arguments, **self.keywords)


LOGITS = object()


@dataclass(frozen=True, eq=False)
class Head:
    """From hidden states `[..., hidden]` to logits `[..., vocab]`, as `model` does it.

    `projection` is called as the module it is, with adapters, bias and quantisation, and under the
    autocast of the forward pass.
    """

    model: nn.Module
    projection: nn.Module
    steps: tuple[Step, ...]
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, hidden: Tensor) -> Tensor:
        # One that is sharded by itself would be gathered and reduced with every call, and ranks
        # need not make equally many: `gather` has done it, and FSDP reduces at backward's end.
        sharded = hasattr(self.projection, "unshard")
        with self.autocast():
            logits = (self.projection.forward if sharded else self.projection)(hidden)
            for step in self.steps:
                logits = step(logits)
        return logits

    def gather(self) -> None:
        """Makes sharded parameters whole, where FSDP has freed them after the forward pass."""
        for module in (self.model, self.projection):
            unshard: Any = getattr(module, "unshard", None)
            if unshard is not None:
                unshard()


@dataclass(eq=False)
class DeferredOutput:
    """What a model with a deferred head returns.

    Args:
        last_hidden_state: what the output projection would have been given,
            `[batch, seq, hidden]`.
        others: the model's output without logits; its attributes are found here too.
        head: from hidden states to logits.
    """

    last_hidden_state: Tensor
    others: Any
    head: Head

    @property
    def logits(self) -> Tensor:
        """`[batch, seq, vocab]`, computed whenever it is asked for."""
        self.head.gather()
        return self.head(self.last_hidden_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["others"], name)

    def __contains__(self, name: str) -> bool:
        return name == "logits" or name in self.others

    def __getitem__(self, name: str) -> Any:
        return self.logits if name == "logits" else self.others[name]


def _unflatten(children: Iterable[Any], head: Any) -> DeferredOutput:
    hidden, others = children
    return DeferredOutput(hidden, others, head)


# FSDP looks for an output's tensors in dataclasses or pytrees, depending on torch's version.
pytree.register_pytree_node(
    DeferredOutput,
    lambda output: ([output.last_hidden_state, output.others], output.head),
    _unflatten,
    serialized_type_name="ditty_di.losses.deferred.DeferredOutput",
)


def _wants_logits(
    *,
    labels: Any = None,
    use_cache: bool | None = None,
    past_key_values: Any = None,
    logits_to_keep: Any = 0,
    return_dict: bool | None = None,
    **others: Any,
) -> bool:
    return (
        labels is not None
        or bool(use_cache)
        or past_key_values is not None
        or isinstance(logits_to_keep, Tensor)
        or bool(logits_to_keep)
        or return_dict is False
    )


def _without_self(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def ordinary(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return ordinary


def _autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes contexts like the one that is active now."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return functools.partial(torch.autocast, device_type, dtype=dtype, enabled=enabled)


@contextmanager
def _put_off(projection: nn.Module) -> Iterator[None]:
    """Within it, calling `projection` gives what it was called with, as `_DeferredLogits`."""
    before = vars(projection).get("forward")
    projection.forward = _DeferredLogits  # type: ignore[method-assign]
    try:
        yield
    finally:
        del projection.forward
        if before is not None:
            projection.forward = before


class _DeferredLogits:
    """Stands for logits while the rest of a model's forward pass works on them."""

    def __init__(self, hidden: Tensor, steps: tuple[Step, ...] = ()) -> None:
        self.hidden, self.steps = hidden, steps

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> _DeferredLogits:
        name = func.__name__.strip("_")
        logits = next((a for a in args if isinstance(a, cls)), None)
        if logits is None:
            raise _cannot(name)
        return logits._then(name, func, *args, **(kwargs or {}))

    def _then(self, name: str, func: Any, *args: Any, **kwargs: Any) -> _DeferredLogits:
        """The logits after one more step."""
        if name.removeprefix("r") not in ELEMENTWISE and name not in ELEMENTWISE:
            raise _cannot(name)
        arguments = tuple(LOGITS if a is self else _for_any_token(a, name) for a in args)
        keywords = {key: _for_any_token(value, name) for key, value in kwargs.items()}
        return _DeferredLogits(self.hidden, (*self.steps, Step(name, func, arguments, keywords)))

    def __add__(self, other: Any) -> _DeferredLogits:
        return self._then("add", operator.add, self, other)

    def __radd__(self, other: Any) -> _DeferredLogits:
        return self._then("add", operator.add, other, self)

    def __sub__(self, other: Any) -> _DeferredLogits:
        return self._then("sub", operator.sub, self, other)

    def __mul__(self, other: Any) -> _DeferredLogits:
        return self._then("mul", operator.mul, self, other)

    def __rmul__(self, other: Any) -> _DeferredLogits:
        return self._then("mul", operator.mul, other, self)

    def __truediv__(self, other: Any) -> _DeferredLogits:
        return self._then("div", operator.truediv, self, other)

    def __neg__(self) -> _DeferredLogits:
        return self._then("neg", operator.neg, self)

    def __getitem__(self, index: Any) -> Any:
        raise _cannot("indexing")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("device", "dtype"):
            return getattr(self.hidden, name)
        if name not in ELEMENTWISE:
            raise _cannot(name)
        return functools.partial(self._then, name, getattr(Tensor, name), self)


def _for_any_token(argument: Any, name: str) -> Any:
    """What logits are combined with, `[vocab]` or `[]`, so that it fits any number of tokens."""
    if not isinstance(argument, Tensor):
        return argument
    if argument.numel() != argument.shape[-1:].numel():
        raise _cannot(f"{name} with a tensor that has a value for each token")
    return argument.reshape(argument.shape[-1:])


def _cannot(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"model.head: the model's forward applies {what!r} to its logits, which cannot be deferred "
        f"(these can: {', '.join(sorted(ELEMENTWISE))}); leave model.head out (loss=causal_lm)"
    )
