"""The changes that a model factory makes, as small objects with familiar names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import peft
import torch
from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di import adapters, quantization
from ditty_di.messages import did_you_mean
from ditty_di.parallelize.data_parallel import shard


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantize the linear layers of a frozen base; called with a model, as any `ModelTransform`.

    The packed tensors are ordinary parameters, which FSDP2 shards; products have the dtype of their
    input, so that neither `quant_storage` nor `compute_dtype` has to be set.

    Args:
        bits: 4 (NormalFloat4 in blocks of 64) or 8 (integers with a scale per row).
        double_quant: quantize the scales to 8 bits; for 4 bits.
        skip: layers to leave as they are, by a part of their path.

    Raises:
        ValueError: other bits, or `double_quant` with 8.
    """

    bits: int = 4
    double_quant: bool = False
    skip: Sequence[str] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quant_config: bits={self.bits}; write 4 or 8")
        if self.bits == 8 and self.double_quant:
            raise ValueError("quant_config: double_quant is for bits=4; leave it out with 8")

    def __call__(self, model: nn.Module, /) -> nn.Module:
        """Return the model with quantized layers.

        Args:
            model: changed in place.
        """
        if self.bits == 8:
            return quantization.int8(model, skip=self.skip)
        return quantization.nf4(model, skip=self.skip, double_quant=self.double_quant)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Add LoRA to a frozen base; called with a model, as any `ModelTransform`.

    For any other method of peft, pass its own configuration (`peft.IA3Config(...)`).

    Args:
        r: rank of the adapters.
        alpha: their scale is `alpha / r`.
        dropout: of their input.
        target_modules: names, a regular expression, or `all-linear` for all but the output head.
        use_dora: train a magnitude for each row as well; also on a quantized base (QDoRA).
        use_rslora: scale by `alpha / sqrt(r)`.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.1
    target_modules: str | Sequence[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False

    def __call__(self, model: nn.Module, /) -> nn.Module:
        """Return the model with adapters.

        Args:
            model: changed in place.
        """
        named = self.target_modules
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=named if isinstance(named, str) else list(named),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )
        return adapters.apply_adapter(model, config=config)


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """How several ranks share a model; one rank shares nothing.

    Args:
        enabled: True is FSDP2 over all ranks, False is DDP: a whole copy on each.
        transformer_layers: classes of the repeated blocks, which are sharded, recomputed and
            compiled one by one, with their neighbors in the same list. Empty: the blocks are the
            `ModuleList` with the most parameters.
        param_dtype: what FSDP2 computes in; None is what the pipeline says (`fp16=`,
            `use_bfloat16=`). The optimizer keeps the parameters' own dtype.
        reduce_dtype: of gradient communication; None is float32 under a `param_dtype`, else the
            gradients' own.
        reshard_after_forward: free a block's gathered parameters until the backward pass.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.

    Raises:
        ValueError: an option of FSDP2 where it is not enabled.
    """

    enabled: bool = True
    transformer_layers: Sequence[type[nn.Module]] = ()
    param_dtype: torch.dtype | str | None = None
    reduce_dtype: torch.dtype | str | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        changed = [f.name for f in fields(self)[2:] if getattr(self, f.name) != f.default]
        if not self.enabled and changed:
            raise ValueError(
                f"fsdp_config: {' and '.join(changed)} would have no effect with enabled=False"
            )

    @property
    def degrees(self) -> dict[str, Any]:
        """The layout of the ranks, as arguments of `ditty_di.Runtime`."""
        return {"dp_shard": -1} if self.enabled else {"dp_replicate": -1, "dp_shard": 1}

    def dtype(self, asked: str | None) -> str | None:
        """Return the dtype to compute in.

        Args:
            asked: the one that the pipeline asks for.

        Raises:
            ValueError: `param_dtype` is another one.
        """
        own = _dtype_name(self.param_dtype)
        if own and asked and own != asked:
            raise ValueError(
                f"fsdp_config: param_dtype={own}, but the pipeline computes in {asked} (fp16, "
                f"use_bfloat16 or mixed_precision); write one of them"
            )
        return own or asked

    def __call__(
        self,
        model: nn.Module,
        /,
        *,
        parallel_dims: ParallelDims,
        activation_checkpointing: Callable[[nn.Module], nn.Module] | None = None,
        compile: Mapping[str, Any] | None = None,
        param_dtype: str | None = None,
    ) -> nn.Module:
        """Return the sharded model; a `ParallelizeFn` once the pipeline has added the options.

        Args:
            model: changed in place.
            parallel_dims: the layout of the ranks.
            activation_checkpointing: wraps a block for activation checkpointing.
            compile: arguments of `nn.Module.compile` for each block; None does not compile.
            param_dtype: what the pipeline computes in.

        Raises:
            ValueError: the model has no module of these classes, or no blocks to recompute.
        """
        param_dtype = self.dtype(param_dtype) if self.enabled else None
        blocks, others = _find_blocks(model, tuple(self.transformer_layers))
        has_blocks = blocks is not None or any(
            isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) for m in model.modules()
        )
        if activation_checkpointing is not None and not has_blocks:
            raise ValueError(
                f"gradient_checkpointing: {type(model).__name__} has no list of blocks to "
                f"recompute; name their class in FSDPConfig(transformer_layers=[...], "
                f"enabled=False), or leave it out"
            )
        options: dict[str, Any] = {
            "parallel_dims": parallel_dims,
            "param_dtype": param_dtype,
            "reduce_dtype": _dtype_name(self.reduce_dtype) or ("float32" if param_dtype else None),
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_offload": self.cpu_offload,
        }
        for path in others:
            block = model.get_submodule(path)
            if activation_checkpointing is not None:
                block = activation_checkpointing(block)
                model.set_submodule(path, block)
            if compile is not None:
                block.compile(**compile)
            shard(block, **options)
        if compile is not None and not has_blocks:
            model.compile(**compile)
        return shard(
            model,
            blocks=blocks,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            **options,
        )


def _find_blocks(
    model: nn.Module, classes: tuple[type[nn.Module], ...]
) -> tuple[str | None, list[str]]:
    """Return the path of the list with most modules of these classes, and the others' paths."""
    if not classes:
        return None, []
    found: dict[str, list[str]] = {}  # parent -> blocks
    inside: tuple[str, ...] = ()  # of a block that was found: its blocks belong to it
    for path, module in model.named_modules():
        if path and isinstance(module, classes) and not path.startswith(inside):
            found.setdefault(path.rpartition(".")[0], []).append(path)
            inside += (f"{path}.",)
    if not found:
        wanted = ", ".join(cls.__name__ for cls in classes)
        names = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"fsdp_config: the model has no {wanted}{did_you_mean(classes[0].__name__, names)}; "
            f"its modules are {', '.join(names[:12])}"
        )
    most = max(found, key=lambda parent: len(found[parent]))
    return most, [path for parent, paths in found.items() if parent != most for path in paths]


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
