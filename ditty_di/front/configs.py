"""What a model factory does to a model, as small objects with the names that people know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from ditty_di import adapters, quantization
from ditty_di.config.targets import did_you_mean
from ditty_di.parallelize.data_parallel import shard

if TYPE_CHECKING:
    import torch
    from torchtitan.distributed import ParallelDims


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Packs the linear layers of a frozen base; called with a model, as any `ModelTransform`.

    Args:
        bits: 4 (NormalFloat4 in blocks of 64) or 8 (integers with a scale a row).
        double_quant: scales of 8 bits; for 4 bits.
        skip: layers to leave as they are, by a part of their path.

    The packed tensors are ordinary parameters, which FSDP2 shards; products have the dtype of what
    comes in, so that there is neither a `quant_storage` nor a `compute_dtype` to set.

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
            raise ValueError("quant_config: double_quant is for bits=4; with 8 there is no need")

    def __call__(self, model: nn.Module, /) -> nn.Module:
        if self.bits == 8:
            return quantization.int8(model, skip=self.skip)
        return quantization.nf4(model, skip=self.skip, double_quant=self.double_quant)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """LoRA beside a frozen base; called with a model, as any `ModelTransform`.

    Args:
        r, alpha, dropout: rank, scale (`alpha / r`) and dropout of the adapters.
        target_modules: names, a regular expression, or `all-linear` for all but the output head.
        use_dora: a trained magnitude for each row as well; also beside a quantised base (QDoRA).
        use_rslora: scale by `alpha / sqrt(r)`.

    For anything else that peft has, its own configuration (`peft.IA3Config(...)`) fits as well.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.1
    target_modules: str | Sequence[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False

    def __call__(self, model: nn.Module, /) -> nn.Module:
        from peft import LoraConfig

        named = self.target_modules
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=named if isinstance(named, str) else list(named),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )
        return adapters.add(model, config=config)


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """How several ranks share a model; one rank has nothing to share.

    Args:
        enabled: True is FSDP2 over all ranks, False is DDP: a whole copy on each.
        transformer_layers: classes of the repeated blocks, which are sharded, recomputed and
            compiled one by one, with what stands beside them in their list. None of them: the
            `ModuleList` with the most parameters.
        param_dtype: what FSDP2 computes in; None is what the pipeline says (`fp16=`,
            `use_bfloat16=`). The optimizer keeps the parameters' own dtype.
        reduce_dtype: of gradients on their way between ranks; None is float32 under a
            `param_dtype`, else the gradients' own.
        reshard_after_forward: free a block's gathered parameters until the backward pass.
        cpu_offload: parameters, gradients and optimizer state live in host memory.

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
        both = ("enabled", "transformer_layers")
        set_ = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if not self.enabled and (odd := [name for name in set_ if name not in both]):
            raise ValueError(
                f"fsdp_config: {' and '.join(odd)} would have no effect with enabled=False"
            )

    @property
    def degrees(self) -> dict[str, int]:
        """How `ditty_di.Runtime` lays out the ranks."""
        return {"dp_shard": -1} if self.enabled else {"dp_replicate": -1, "dp_shard": 1}

    def dtype(self, asked: str | None) -> str | None:
        """The dtype to compute in, where the pipeline asks for one too.

        Raises:
            ValueError: they differ.
        """
        own = _name(self.param_dtype)
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
        recompute: Callable[[nn.Module], nn.Module] | None = None,
        compile: Mapping[str, Any] | None = None,
        param_dtype: str | None = None,
    ) -> nn.Module:
        """A `ParallelizeFn` once the pipeline has added what it knows.

        Raises:
            ValueError: no module of these classes; nothing that could be recomputed.
        """
        param_dtype = self.dtype(param_dtype) if self.enabled else None
        blocks, others = _find(model, tuple(self.transformer_layers))
        if recompute is not None and blocks is None and not _has_lists(model):
            raise ValueError(
                f"gradient_checkpointing: {type(model).__name__} has no list of blocks to "
                f"recompute; name their class in FSDPConfig(transformer_layers=[...], "
                f"enabled=False), or leave it out"
            )
        options: dict[str, Any] = {
            "parallel_dims": parallel_dims,
            "param_dtype": param_dtype,
            "reduce_dtype": _name(self.reduce_dtype) or ("float32" if param_dtype else None),
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_offload": self.cpu_offload,
        }
        for parent, name in others:
            block = parent._modules[name]
            assert block is not None
            if recompute is not None:
                block = recompute(block)
                parent.register_module(name, block)
            if compile is not None:
                block.compile(**compile)
            shard(block, **options)
        if compile is not None and blocks is None and not _has_lists(model):
            model.compile(**compile)
        return shard(model, blocks=blocks, recompute=recompute, compile=compile, **options)


def _find(
    model: nn.Module, classes: tuple[type[nn.Module], ...]
) -> tuple[str | None, list[tuple[nn.Module, str]]]:
    """The path of what holds most modules of these classes, and where the others are."""
    if not classes:
        return None, []
    held: dict[str, list[str]] = {}
    inside: list[str] = []  # of a block that was found: its blocks belong to it
    for path, module in model.named_modules():
        if path and isinstance(module, classes) and not path.startswith(tuple(inside)):
            parent, _, name = path.rpartition(".")
            held.setdefault(parent, []).append(name)
            inside.append(f"{path}.")
    if not held:
        wanted = ", ".join(cls.__name__ for cls in classes)
        there = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"fsdp_config: the model has no {wanted}{did_you_mean(classes[0].__name__, there)}; "
            f"its modules are {', '.join(there[:12])}"
        )
    most = max(held, key=lambda parent: len(held[parent]))
    others = [
        (model.get_submodule(parent), name)
        for parent, names in held.items()
        for name in names
        if parent != most
    ]
    return most, others


def _has_lists(model: nn.Module) -> bool:
    return any(isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) for m in model.modules())


def _name(dtype: torch.dtype | str | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
