"""Where a model comes from, and what changes it before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_safetensors
from torch import nn

from ditty_di import adapters
from ditty_di.api.configs import FSDPConfig
from ditty_di.api.precision import Precision
from ditty_di.checkpoint.read import load_model
from ditty_di.models import causal_lm
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import materialize
from ditty_di.protocols import ModelTransform, WeightsFn

#: Called with `tokenizer` and `seed`: a model, and what fills it if it is on the meta device.
Load = Callable[..., tuple[nn.Module, WeightsFn | None]]


class ModelFactory:
    """Load, transform, add adapters, compile, shard: in this order, and on every rank.

    Args:
        load: returns the model, called with `tokenizer=` and `seed=`.
        transform: any change of the model that has its values; returns the model.
        peft_config: `PeftConfig`, a configuration of peft's, or any `ModelTransform`.
        compile: arguments of `nn.Module.compile` for each block (for the whole model if it has no
            blocks); True is none of them, False does not compile.
        fsdp_config: how ranks share the model; None is DDP.
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
        self.adapter: ModelTransform | None = peft_config
        if peft_config is not None and not callable(peft_config):
            self.adapter = partial(adapters.apply_adapter, config=peft_config)
        self.compile = {} if compile is True else compile or None
        self.fsdp_config = fsdp_config or FSDPConfig(enabled=False)

    @classmethod
    def from_instance(cls, model: nn.Module, **changes: Any) -> ModelFactory:
        """Return a factory for a model that exists; it is changed in place, also by 16 bits.

        Args:
            model: the model.
            **changes: as for the class.
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
        """Return a factory for `model_class(**kwargs)` with the values of a checkpoint.

        It reads nothing else of the checkpoint: to resume a run, run its pipeline again. Building
        raises CheckpointError or RuntimeError if the checkpoint does not fit the model.

        Args:
            path: a folder of checkpoints (the newest), one of them, the URL of either, a
                safetensors file, or a folder with a `model.safetensors` in it, such as a pipeline's
                `export`.
            model_class: makes the model.
            transform: as for the class.
            peft_config: as for the class.
            compile: as for the class.
            fsdp_config: as for the class.
            **kwargs: of `model_class`.
        """

        def load(**_: Any) -> tuple[nn.Module, None]:
            model, folder = model_class(**kwargs), Path(path).expanduser()
            file = folder / "model.safetensors" if folder.is_dir() else folder
            if file.is_file():
                load_safetensors(model, file)
            else:
                load_model(path, model)
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
        """Return a factory for a pretrained model; each rank reads its own slices.

        Args:
            path: a folder, or the id of a repository.
            quant_config: `QuantConfig`, or any of `ditty_di.quantization`, as a partial.
            peft_config: as for the class.
            fsdp_config: as for the class.
            transform: as for the class; it needs values, so each rank reads the whole model first.
            compile: as for the class.
            revision: branch, tag or commit of the repository.
            model: `ditty_di.models.causal_lm.from_pretrained`, or that of `seq2seq`.
            **options: further arguments of it, such as `dtype="bfloat16"`.

        Raises:
            ValueError: a quantized base without adapters, of which nothing could be trained.
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
            weights = Pretrained(path, revision=revision, init_missing=initialize, seed=seed)
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
        """Return the model before it is sharded, and what fills it; None if it has its values.

        Args:
            tokenizer: whose vocabulary the model has to cover.
            seed: of new parameters.
            precision: what the model computes in.

        Raises:
            TypeError: a transform does not return a module.
        """
        model, weights = self.load(tokenizer=tokenizer, seed=seed)
        last = (precision or Precision()).transforms(autocasts=not self.fsdp_config.enabled)
        for change in filter(None, (self.transform, self.adapter, *last)):
            changed = change(model)
            if not hasattr(changed, "parameters"):
                raise TypeError(
                    f"transform: {getattr(change, '__name__', change)} returned "
                    f"{type(changed).__name__}; return the model, also one changed in place"
                )
            model = changed
        return model, weights
