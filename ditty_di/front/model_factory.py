"""Where a model comes from, and what is done to it before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ditty_di import adapters
from ditty_di.checkpoint.read import load_model
from ditty_di.front.configs import FSDPConfig
from ditty_di.front.precision import Precision
from ditty_di.models import causal_lm
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims

    from ditty_di.protocols import ModelTransform, WeightsFn

    #: Called with `tokenizer` and `seed`: a model, and what fills it if it is on meta.
    Load = Callable[..., tuple[nn.Module, WeightsFn | None]]


class ModelFactory:
    """Loads, transforms, adds adapters, compiles, shards: in this order, on every rank alike.

    Args:
        load: the model, called with `tokenizer=` and `seed=`.
        transform: any change of the model that has its values; returns the model.
        peft_config: `PeftConfig`, a configuration of peft's, or any `ModelTransform`.
        compile: arguments of `nn.Module.compile` for each block (the whole model where there are no
            blocks); True is none of them, False does not compile.
        fsdp_config: how ranks share it; None is DDP.
    """

    def __init__(
        self,
        load: Load,
        *,
        transform: ModelTransform | None = None,
        peft_config: Any = None,
        compile: bool | Mapping[str, Any] = False,
        fsdp_config: FSDPConfig | None = None,
    ) -> None:
        self.load, self.transform = load, transform
        self.adapter: ModelTransform | None = (
            peft_config
            if peft_config is None or callable(peft_config)
            else partial(adapters.add, config=peft_config)
        )
        self.compile = {} if compile is True else compile or None
        self.fsdp_config = fsdp_config or FSDPConfig(enabled=False)

    @classmethod
    def from_instance(cls, model: nn.Module, **changes: Any) -> ModelFactory:
        """A model that there is; it is changed in place, for good: also by a pipeline's 16 bits.

        `changes` as for the class.
        """
        return cls(lambda **_: (model, None), **changes)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        model_class: Callable[..., nn.Module],
        *,
        transform: ModelTransform | None = None,
        peft_config: Any = None,
        compile: bool | Mapping[str, Any] = False,
        fsdp_config: FSDPConfig | None = None,
        **kwargs: Any,
    ) -> ModelFactory:
        """`model_class(**kwargs)` with the values of a checkpoint, and nothing else of it: to go on
        with a run, call its pipeline again.

        Args:
            path: a folder of checkpoints (the newest), one of them, a safetensors file, or a folder
                with a `model.safetensors` in it, such as a pipeline's `export`.

        Raises, when built:
            CheckpointError, RuntimeError: it does not fit the model.
        """

        def load(**_: Any) -> tuple[nn.Module, None]:
            model = model_class(**kwargs)
            _read(Path(path).expanduser(), model)
            return model, None

        return cls(
            load,
            transform=transform,
            peft_config=peft_config,
            compile=compile,
            fsdp_config=fsdp_config,
        )

    @classmethod
    def from_huggingface(
        cls,
        path: str,
        *,
        quant_config: ModelTransform | None = None,
        peft_config: Any = None,
        fsdp_config: FSDPConfig | None = None,
        transform: ModelTransform | None = None,
        compile: bool | Mapping[str, Any] = False,
        revision: str | None = None,
        model: Callable[..., nn.Module] = causal_lm.from_pretrained,
        **options: Any,
    ) -> ModelFactory:
        """A pretrained model of a folder or the hub, of which each rank reads its own slices.

        A `transform` needs values: then each rank first reads the whole model.

        Args:
            quant_config: `QuantConfig`, or any of `ditty_di.quantization`, as a partial.
            model: `ditty_di.models.causal_lm.from_pretrained`, or that of `seq2seq`.
            options: further arguments of it, such as `dtype="bfloat16"`.

        Raises:
            ValueError: a quantised base without adapters, of which nothing could be trained.
        """
        if quant_config is not None and peft_config is None:
            raise ValueError(
                "quant_config: packed weights cannot be trained; add peft_config=PeftConfig(), or "
                "leave quant_config out"
            )

        def load(*, tokenizer: Any, seed: int) -> tuple[nn.Module, WeightsFn | None]:
            built = model(
                path, revision=revision, tokenizer=tokenizer, quantize=quant_config, **options
            )
            initialize = partial(adapters.initialize, seed=seed)
            weights = Pretrained(path, revision=revision, missing=initialize, seed=seed)
            if transform is None:
                return built, weights
            materialize(built, torch.device("cpu"))
            weights(built, device=torch.device("cpu"))
            return built, None

        return cls(
            load,
            transform=transform,
            peft_config=peft_config,
            compile=compile,
            fsdp_config=fsdp_config,
        )

    def build(
        self, *, tokenizer: Any = None, seed: int = 0, precision: Precision | None = None
    ) -> tuple[nn.Module, WeightsFn | None]:
        """The model before it is placed on ranks, and what fills it; None if it has its values.

        Raises:
            TypeError: a transform that returns no module.
        """
        model, weights = self.load(tokenizer=tokenizer, seed=seed)
        last = (precision or Precision()).transforms(autocasts=not self.fsdp_config.enabled)
        for change in (self.transform, self.adapter, *last):
            if change is None:
                continue
            changed = change(model)
            if not hasattr(changed, "parameters"):
                raise TypeError(
                    f"transform: {getattr(change, '__name__', change)} returned "
                    f"{type(changed).__name__}; return the model, also one changed in place"
                )
            model = changed
        return model, weights

    def parallelize(
        self,
        model: nn.Module,
        /,
        *,
        parallel_dims: ParallelDims,
        recompute: Callable[[nn.Module], nn.Module] | None = None,
        param_dtype: str | None = None,
    ) -> nn.Module:
        """Compiles and shards it; for the trainer's `parallelize_fn`."""
        return self.fsdp_config(
            model,
            parallel_dims=parallel_dims,
            recompute=recompute,
            compile=self.compile,
            param_dtype=param_dtype,
        )


def _read(path: Path, model: nn.Module) -> None:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        load_model(path, model)
        return
    from safetensors.torch import load_model as load_file

    load_file(model, file)
