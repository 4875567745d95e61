"""Fused linear cross-entropy: a language model whose forward pass stops before its LM head.

`[batch, seq, vocab]` logits are often the largest tensor of a training step. With `skip_lm_head`
in the `model.head` slot a model returns its last hidden states and a function from hidden states to
logits, so that a loss can compute logits for a few tokens at a time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ditty_di.parallelize.collectives import gather_output
from ditty_di.replaced import replaced

#: Attribute of a `forward` that defers the head.
DEFERS = "_defers_the_head"

#: Elementwise operations, which can be applied to a few tokens at a time.
ELEMENTWISE = frozenset(
    ("add", "clone", "contiguous", "div", "float", "mul", "neg", "sub", "tanh", "to", "true_divide")
)


def skip_lm_head(model: nn.Module, /) -> nn.Module:
    """Make a Hugging Face language model return a `HiddenStatesOutput`; its names do not change.

    The model's own `forward` runs without its output projection: operations on the logits
    (soft-capping, scaling, a bias) are recorded and applied later. Calls that need logits get the
    ordinary output: with `labels`, `logits_to_keep`, `return_dict=False`, or a key-value cache
    (`use_cache`, `past_key_values`), as `generate` calls it.

    Apply it last, around adapters.

    Args:
        model: the language model, which is changed in place.

    Raises:
        ValueError: the model has no output embeddings, or its head is deferred already.
        NotImplementedError: (in `forward`) an operation on the logits cannot be deferred.
    """
    kind = type(model).__name__
    projection = getattr(model, "get_output_embeddings", lambda: None)()
    if projection is None:
        raise ValueError(
            f"model.head: {kind} has no output embeddings to defer (get_output_embeddings() gives "
            f"none); leave model.head out and choose a loss on logits, such as loss=causal_lm"
        )
    if hasattr(model.forward, DEFERS):
        raise ValueError(f"model.head: the head of this {kind} is deferred already")
    own = vars(model).get("forward")
    ordinary = type(model).forward if own is None else _without_self(own)

    @functools.wraps(ordinary)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _wants_logits(**kwargs):
            return ordinary(self, *args, **kwargs)
        projection = self.get_output_embeddings()
        with replaced(vars(projection), "forward", _LazyLogits):
            output = ordinary(self, *args, **kwargs)
        logits = output.logits
        if not isinstance(logits, _LazyLogits):
            raise NotImplementedError(
                f"model.head: {kind} does not call its output embeddings to make its logits, so "
                f"they cannot be deferred; leave model.head out (loss=causal_lm)"
            )
        # The output of a sharded module must not be a view: FSDP's hooks would sit on its base.
        hidden = logits.hidden.clone() if logits.hidden._is_view() else logits.hidden
        others = type(output)(**{k: v for k, v in output.items() if k != "logits"})
        return HiddenStatesOutput(
            hidden, others, Head(self, projection, logits.steps, _autocast(hidden.device.type))
        )

    setattr(forward, DEFERS, True)
    # A bound method, so that a deep copy of the model is bound to the copy.
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    return model


def without_lm_head(model: nn.Module) -> nn.Module:
    """Return the model with a deferred head, for a loss on hidden states (`Loss.prepare_model`).

    A model whose head is deferred already stays as it is.
    """
    return model if hasattr(model.forward, DEFERS) else skip_lm_head(model)


LOGITS = object()


@dataclass(frozen=True, eq=False)
class Step:
    """A recorded operation on logits: `function(*arguments, **keywords)`.

    Args:
        name: name of the operation.
        function: the operation.
        arguments: positional arguments, with `LOGITS` in place of the logits.
        keywords: keyword arguments.
    """

    name: str
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the operation."""
        arguments = [logits if a is LOGITS else a for a in self.arguments]
        return self.function(*arguments, **self.keywords)


@dataclass(frozen=True, eq=False)
class Head:
    """The function from hidden states `[..., hidden]` to logits `[..., vocab]`.

    Args:
        model: the language model.
        projection: its output projection, called as a module with adapters, bias and quantization.
        steps: operations on the logits after the projection.
        autocast: makes the autocast context of the forward pass.
    """

    model: nn.Module
    projection: nn.Module
    steps: tuple[Step, ...]
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., vocab]` of hidden states `[..., hidden]`."""
        # A projection that is an FSDP module of its own would be gathered and reduced with every
        # call, and ranks need not make equally many: `gather` has unsharded it, and FSDP reduces
        # gradients at the end of the backward pass.
        sharded = hasattr(self.projection, "unshard")
        with self.autocast():
            logits = (self.projection.forward if sharded else self.projection)(hidden)
            for step in self.steps:
                logits = step(logits)
        return logits

    def gather(self) -> None:
        """Unshard parameters that FSDP has freed after the forward pass."""
        for module in (self.model, self.projection):
            getattr(module, "unshard", lambda: None)()


@dataclass(eq=False)
class HiddenStatesOutput:
    """The output of a model with a deferred head.

    Args:
        last_hidden_state: input of the output projection, `[batch, seq, hidden]`.
        others: the model's output without logits; its attributes are found here too.
        head: from hidden states to logits.
    """

    last_hidden_state: Tensor
    others: Any
    head: Head

    @property
    def logits(self) -> Tensor:
        """`[batch, seq, vocab]`, computed at every access."""
        self.head.gather()
        return gather_output(self.head(self.last_hidden_state))  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["others"], name)

    def __contains__(self, name: str) -> bool:
        return name == "logits" or name in self.others

    def __getitem__(self, name: str) -> Any:
        return self.logits if name == "logits" else self.others[name]


# FSDP looks for an output's tensors in dataclasses or pytrees, depending on torch's version.
pytree.register_pytree_node(
    HiddenStatesOutput,
    lambda output: ([output.last_hidden_state, output.others], output.head),
    lambda children, head: HiddenStatesOutput(*tuple(children), head),  # type: ignore[call-arg]
    serialized_type_name="ditty_di.losses.hidden_states.HiddenStatesOutput",
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
    """Return a function that makes contexts like the autocast context active now."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return functools.partial(torch.autocast, device_type, dtype=dtype, enabled=enabled)


def _operator(name: str, func: Any, reflected: bool = False) -> Any:
    def method(logits: _LazyLogits, *other: Any) -> _LazyLogits:
        return logits._then(name, func, *((*other, logits) if reflected else (logits, *other)))

    return method


class _LazyLogits:
    """Record elementwise operations while a model's forward pass works on its logits."""

    def __init__(self, hidden: Tensor, steps: tuple[Step, ...] = ()) -> None:
        self.hidden, self.steps = hidden, steps

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> _LazyLogits:
        name = func.__name__.strip("_")
        logits = next((a for a in args if isinstance(a, cls)), None)
        if logits is None:
            raise _cannot(name)
        return logits._then(name, func, *args, **(kwargs or {}))

    def _then(self, name: str, func: Any, *args: Any, **kwargs: Any) -> _LazyLogits:
        """Return the logits after one more operation."""
        if name.removeprefix("r") not in ELEMENTWISE and name not in ELEMENTWISE:
            raise _cannot(name)
        arguments = tuple(LOGITS if a is self else _for_any_token(a, name) for a in args)
        keywords = {key: _for_any_token(value, name) for key, value in kwargs.items()}
        return _LazyLogits(self.hidden, (*self.steps, Step(name, func, arguments, keywords)))

    __add__ = _operator("add", operator.add)
    __radd__ = _operator("add", operator.add, reflected=True)
    __sub__ = _operator("sub", operator.sub)
    __mul__ = _operator("mul", operator.mul)
    __rmul__ = _operator("mul", operator.mul, reflected=True)
    __truediv__ = _operator("div", operator.truediv)
    __neg__ = _operator("neg", operator.neg)

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
    """Return an operand of shape `[vocab]` or `[]`, so that it fits any number of tokens."""
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
