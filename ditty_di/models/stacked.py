"""Stand-ins for the fused weights of experts, `[experts, rows, columns]`, multiplied on demand.

The experts of transformers keep the matrices of all experts in one parameter, and either index it
(`F.linear(x, self.up_proj[expert])`, `x @ self.up_proj[expert]`) or give it to `grouped_mm`. What
stands in for such a parameter computes these products itself. A parametrization would return a
plain tensor, which autograd keeps until the backward pass: a dequantized copy of every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Stacked:
    """A weight `[experts, rows, columns]` that multiplies; subclasses say how.

    torch's functions for a product with one expert's matrix, or with each expert's own rows
    (`grouped_mm`), call `multiply`. Any other function gets `whole()`.
    """

    #: For `transformers.initialization`: the values are not written through this object.
    _is_hf_initialized = True

    shape: torch.Size
    dtype: torch.dtype
    ndim = 3

    def multiply(
        self, x: Tensor, *, transposed: bool, expert: int | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """Return `x @ weight[expert]`, or the product of each expert with its own rows of `x`.

        Args:
            x: `[..., rows]`, or `[..., columns]` if transposed; two dimensions with `ends`.
            transposed: multiply by the transposed matrices.
            expert: the index of one.
            ends: `[experts]` int32, where the rows of each expert end in `x`.
        """
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Return the weight as a plain tensor."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
        return _View(self, int(index), transposed=False) if one else self.whole()[index]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Swap two dimensions as `torch.transpose` does."""
        return _View(self, None, transposed=False).transpose(dim0, dim1)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        product = _PRODUCTS.get(function)
        if product is not None:
            result = product(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


@dataclass
class _View:
    """One expert's matrix of a stacked weight, or all of them, maybe transposed."""

    weight: Stacked
    expert: int | None
    transposed: bool

    __torch_function__ = Stacked.__torch_function__

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device  # type: ignore[attr-defined]

    def transpose(self, dim0: int, dim1: int) -> Any:
        dims = 3 if self.expert is None else 2
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self.plain().transpose(dim0, dim1)
        return _View(self.weight, self.expert, not self.transposed)

    def plain(self) -> Tensor:
        whole = self.weight.whole()
        whole = whole if self.expert is None else whole[self.expert]
        return whole.mT if self.transposed else whole


def multiply(x: Tensor, weight: Tensor, *, transposed: bool, ends: Tensor | None = None) -> Tensor:
    """Return what `Stacked.multiply` does, for plain tensors.

    Args:
        x: `[..., rows]`, or `[..., columns]` if transposed.
        weight: `[rows, columns]`, or `[experts, rows, columns]` with `ends`.
        transposed: multiply by the transposed matrices.
        ends: where the rows of each expert end in `x`.
    """
    weight = weight.mT if transposed else weight
    return x @ weight if ends is None else F.grouped_mm(x, weight, offs=ends)


def _plain(value: Any) -> Any:
    if isinstance(value, _View):
        return value.plain()
    return value.whole() if isinstance(value, Stacked) else value


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, _View) or weight.expert is None:
        return NotImplemented
    result = weight.weight.multiply(x, transposed=not weight.transposed, expert=weight.expert)
    return result if bias is None else result + bias


def _matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, _View) or weight.expert is None:
        return NotImplemented
    return weight.weight.multiply(x, transposed=weight.transposed, expert=weight.expert)


def _grouped(x: Any, weight: Any, *, offs: Tensor | None = None, **options: Any) -> Any:
    plain = offs is None or any(value is not None for value in options.values())
    if plain or not isinstance(weight, _View | Stacked):
        return NotImplemented
    view = weight if isinstance(weight, _View) else _View(weight, None, transposed=False)
    return view.weight.multiply(x, transposed=view.transposed, ends=offs)


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.grouped_mm: _grouped,
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls
}


def fused_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (path, module, name) of the weights `[experts, rows, columns]` of a model.

    These are what a module that counts its experts (`num_experts`) has in so many matrices, as a
    parameter or packed.
    """
    for path, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        own: dict[str, Any] = {**module._parameters, **module._modules}
        for name, weight in own.items():
            stacked = isinstance(weight, nn.Parameter | Stacked) and len(weight.shape) == 3
            if stacked and weight.shape[0] == count:
                yield f"{path}.{name}".lstrip("."), module, name


def is_linear(module: nn.Module) -> bool:
    """Return whether it is a linear layer that returns the product: some routers return more."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
