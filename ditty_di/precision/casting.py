"""Mixed precision on one device, with the numbers of FSDP2 and without its copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def compute_in(model: nn.Module, dtype: torch.dtype, *, units: Iterable[nn.Module] = ()) -> None:
    """Run forward passes on copies of the parameters in `dtype`, as FSDP2's mixed precision does.

    With the start of a unit's forward pass, its parameters of another floating-point dtype are
    cast once, and so are its inputs. Gradients reach the parameters in the parameters' own dtype.
    What has `dtype` already, such as a frozen base, is used as it is. Packed weights stay too.

    Args:
        model: any module.
        dtype: dtype of the copies.
        units: modules inside the model whose copies live for their own forward pass only. Those of
            the rest of the model stay for the loss, which may use the output head, until their
            gradients are there or `release_copies`.
    """
    inner = {id(module) for unit in units for module in unit.modules()}
    for unit in units:
        _cast_within(unit, [*unit.modules()], dtype, keep=False)
    _cast_within(model, [m for m in model.modules() if id(m) not in inner], dtype, keep=True)


def _cast_within(unit: nn.Module, modules: list[nn.Module], dtype: torch.dtype, keep: bool) -> None:
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    watched: set[int] = set()

    def forget(parameter: Tensor) -> None:
        """Drop the copies of a parameter that has its gradient: the loss needs them no more."""
        for owner in modules:
            for name, own in owner._parameters.items():
                if own is parameter:
                    owner.__dict__.pop(name, None)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        copies: dict[int, Tensor] = {}
        for owner in modules:
            if hasattr(owner, "qweight"):
                continue
            for name, parameter in owner._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                owner.__dict__.pop(name, None)
                if parameter.dtype != dtype:
                    copy = copies.get(id(parameter))
                    copies[id(parameter)] = parameter.to(dtype) if copy is None else copy
                    swapped.append((owner, name, parameter))
        for owner, name, parameter in swapped:
            owner._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
        return tree_map(lambda x: _cast(x, dtype), (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for owner, name, parameter in swapped:
            # A parametrization that lasts for a forward pass gives it back as a buffer.
            copy = owner._buffers.pop(name, None)
            copy = owner._parameters.get(name) if copy is None else copy
            if keep:
                # Found before the parameter by code that says `self.weight`, and by no list of
                # parameters, state dict or optimizer.
                owner.__dict__[name] = copy
                if parameter.requires_grad and id(parameter) not in watched:
                    watched.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(forget)
            owner._parameters[name] = parameter
        swapped.clear()

    unit.register_forward_pre_hook(enter, with_kwargs=True)
    unit.register_forward_hook(leave, always_call=True)


def release_copies(model: nn.Module) -> None:
    """Drop the copies that a forward pass without a backward pass has left for the loss."""
    for owner in model.modules():
        for name in owner._parameters:
            owner.__dict__.pop(name, None)


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that the first floating-point parameter has in a forward pass."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                return getattr(owner, name).dtype
    return None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
