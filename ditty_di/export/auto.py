"""The export that suits a model: adapters alone, a transformers model, or plain tensors."""

# No `from __future__ import annotations`: see `ditty_di.export.base`.
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditty_di.data.options import called_with
from ditty_di.export.adapter import AdapterExport
from ditty_di.export.base import Export
from ditty_di.export.full import HuggingFaceExport, SafetensorsExport
from ditty_di.export.gather import only_part


@dataclass(eq=False)
class AutoExport(Export):
    """Export adapters alone if the model has them, else the whole model.

    A whole model with `save_pretrained` is written for transformers, any other as its tensors.

    Arguments are those of `Export`, and:

    Args:
        tokenizer: as for `Export`; None for models that are not of transformers.
        dtype: dtype of the values of a whole model; None keeps each tensor's own.
        max_shard_size: largest size of one file, such as `5GB`.
        base: base that adapters belong to; None is where the base was read from.
        revision: branch, tag or commit of the base.
    """

    tokenizer: Any
    dtype: str | None = None
    max_shard_size: str = "5GB"
    base: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._export: Any = None

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Try before the training what the export needs after it.

        Raises:
            ValueError: the model cannot be exported, or the folder cannot be written.
        """
        self._chosen(model_parts).prepare(model_parts)

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Write the model, on every rank of a run."""
        self._chosen(model_parts)(model_parts)

    def _chosen(self, model_parts: list[nn.Module]) -> Any:
        model: Any = only_part(model_parts)
        kind: Any = HuggingFaceExport if hasattr(model, "save_pretrained") else SafetensorsExport
        if any(hasattr(module, "peft_config") for module in model.modules()):
            kind = AdapterExport
        if self._export is None:  # once: it looks whether the Hub can be written
            self._export = called_with(vars(self), kind)
        return self._export
