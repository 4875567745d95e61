"""LoRA on the fused weights of experts, plain or packed, by peft's `target_parameters`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ditty_di.adapters.quantized import QuantizedLoraLinear, refuse_to_merge
from ditty_di.adapters.targets import is_quantized
from ditty_di.models.stacked import Stacked, fused_weights, multiply


class Adapted(Stacked):
    """A weight `W + scaling * left @ right` that multiplies without computing the sum.

    peft computes it for all experts in every forward pass, in the weight's dtype, and autograd
    keeps it. In bfloat16 the sum rounds small updates away.

    Args:
        weight: `[experts, rows, columns]`, a tensor or another stand-in.
        left: `[experts, rows, rank]`.
        right: `[experts, rank, columns]`.
        scaling: of the update.
    """

    def __init__(self, weight: Any, left: Tensor, right: Tensor, scaling: float) -> None:
        self.weight, self.scaling = weight, scaling
        # `grouped_mm` takes rows of a multiple of 16 bytes; zeros change nothing.
        more = -left.shape[-1] % 8
        self.left = F.pad(left, (0, more)).contiguous()
        self.right = F.pad(right, (0, 0, 0, more)).contiguous()
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def multiply(
        self, x: Tensor, *, transposed: bool, expert: int | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """Return the product; see `Stacked.multiply`."""

        def product(x: Tensor, weight: Any) -> Tensor:
            if isinstance(weight, Stacked):
                return weight.multiply(x, transposed=transposed, expert=expert, ends=ends)
            weight = weight if expert is None else weight[expert]
            return multiply(x, weight.to(x.dtype), transposed=transposed, ends=ends)

        first, second = (self.right, self.left) if transposed else (self.left, self.right)
        result = product(x, self.weight)
        return result + self.scaling * product(product(x, first), second).to(result.dtype)

    def whole(self) -> Tensor:
        """Return the sum."""
        weight = self.weight.whole() if isinstance(self.weight, Stacked) else self.weight
        left, right = self.left.to(weight.dtype), self.right.to(weight.dtype)
        return torch.baddbmm(weight, left, right, alpha=self.scaling)


class ParamWrapper(lora.ParamWrapper):
    """peft's LoRA on a fused weight of experts, with the same parameters and values.

    It has the name of peft's class: peft nests two of them by that name.
    """

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        layer, weight = self.get_base_layer(), self.get_param()
        for name in active_adapters:
            if name in self.lora_A:
                weight = Adapted(weight, *self.get_delta_factors(name))
        # Found before the parameter, or the packed module, of that name.
        layer.__dict__[self.parameter_name] = weight
        try:
            yield
        finally:
            del layer.__dict__[self.parameter_name]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the update to the weight; raise ValueError for a packed one."""
        if isinstance(self.get_param(), Stacked):
            refuse_to_merge()
        super().merge(*args, **kwargs)


def register(config: Any, model: nn.Module) -> None:
    """Let peft make the layers of this package for fused experts and for packed layers.

    A linear layer that is named by its weight in `target_parameters` gets LoRA as any other.

    Args:
        config: of peft.
        model: without adapters.
    """
    if not hasattr(config, "_register_custom_module"):
        return

    def of_experts(
        target: Any, name: str, *, parameter_name: str | None = None, **options: Any
    ) -> Any:
        base = target.get_base_layer() if isinstance(target, lora.ParamWrapper) else target
        if parameter_name is None or getattr(base, parameter_name).ndim != 3:
            return None
        return ParamWrapper(target, name, parameter_name, **options)

    def of_linear(
        target: Any, name: str, *, parameter_name: str | None = None, **options: Any
    ) -> Any:
        if is_quantized(target):
            return QuantizedLoraLinear(target, name, **options)
        return None if parameter_name is None else lora.Linear(target, name, **options)

    kinds: dict[Any, Any] = {type(owner): of_experts for _, owner, _ in fused_weights(model)}
    layers = [m for m in model.modules() if is_quantized(m) or isinstance(m, nn.Linear)]
    config._register_custom_module(kinds | {type(layer): of_linear for layer in layers})


@contextmanager
def packed_as_parameters(config: Any, model: nn.Module) -> Iterator[None]:
    """Put a parameter without memory in the place of each packed weight, within the context.

    peft looks for the names in `target_parameters` among parameters.

    Args:
        config: of peft.
        model: without adapters.
    """
    if not getattr(config, "target_parameters", None):
        yield
        return
    layers: list[Any] = [m for m in model.modules() if is_quantized(m) and hasattr(m, "qweight")]
    fused = [own for own in fused_weights(model) if own[2] in own[1]._modules]

    def stand_in(shape: Sequence[int], like: Any) -> nn.Parameter:
        one = torch.empty((), dtype=like.dtype, device=like.qweight.device)
        return nn.Parameter(one.expand(shape), requires_grad=False)

    packed: list[Any] = [(owner, name, owner._modules.pop(name)) for _, owner, name in fused]
    for owner, name, module in packed:
        owner._parameters[name] = stand_in(module.shape, module)
    for layer in layers:
        layer._parameters["weight"] = stand_in((layer.out_features, layer.in_features), layer)
    try:
        yield
    finally:
        for owner, name, module in packed:
            del owner._parameters[name]
            owner._modules[name] = module
        for layer in layers:
            del layer._parameters["weight"]


def renamed_by_peft(config: Any, model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of layers that peft takes for experts as transformers 4 had them.

    It replaces `gate_proj`, `up_proj` and `down_proj` in `target_modules` by the fused weights of
    some architectures, also where a dense layer or a shared expert is called so.

    Args:
        config: of peft.
        model: without adapters.
        names: of layers.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_kept(end: str) -> bool:
        tried = copy.deepcopy(config)
        tried.target_modules = {end}
        try:
            convert_peft_config_for_transformers(tried, model=model, conversions=None)
        except ValueError:  # one of several that belong together
            return False
        return end in tried.target_modules

    kept = {end: is_kept(end) for end in {name.rpartition(".")[2] for name in names}}
    return [name for name in names if not kept[name.rpartition(".")[2]]]
