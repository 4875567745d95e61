"""The export that suits a model: adapters alone, a transformers model, or plain tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditty_di.export.adapter import AdapterExport
from ditty_di.export.folder import validate
from ditty_di.export.full import HuggingFaceExport, SafetensorsExport
from ditty_di.export.gather import only_part


class AutoExport:
    """Export adapters alone if the model has them, else the whole model.

    A whole model with `save_pretrained` is written for transformers, any other as its tensors.

    Args:
        tokenizer: a transformers tokenizer, written beside the weights; None for other models.
        path: folder; one that exists is replaced once the new one is complete.
        dtype: dtype of the values of a whole model; None keeps each tensor's own.
        max_shard_size: largest size of one file, such as `5GB`.
        base: base that adapters belong to; None is where the base was read from.
        revision: branch, tag or commit of the base.
        run: run folder that the model card is written from.
        push_to: `user/name` on the Hub; None uploads nothing.
        private: visibility of a repository that has to be created.
        license: license in the model card, such as apache-2.0.
        processor: of a vision-language model, written beside the weights; None for other models.
    """

    validate = staticmethod(validate)

    def __init__(
        self,
        tokenizer: Any,
        path: str,
        *,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        base: str | None = None,
        revision: str | None = None,
        run: str | None = None,
        push_to: str | None = None,
        private: bool = True,
        license: str | None = None,
        processor: Any = None,
    ) -> None:
        self.validate(dtype=dtype, max_shard_size=max_shard_size)
        publication: dict[str, Any] = {
            "run": run,
            "push_to": push_to,
            "private": private,
            "license": license,
            "processor": processor,
        }
        self._adapter = AdapterExport(tokenizer, path, base=base, revision=revision, **publication)
        self._model = HuggingFaceExport(
            tokenizer, path, dtype=dtype, max_shard_size=max_shard_size, **publication
        )
        self._tensors = SafetensorsExport(path, dtype=dtype)

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
        model = only_part(model_parts)
        if any(hasattr(module, "peft_config") for module in model.modules()):
            return self._adapter
        return self._model if hasattr(model, "save_pretrained") else self._tensors
