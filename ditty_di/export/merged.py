"""Adapters merged into the unquantised base, and how much that changed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.adapter import adapter_file, write_adapter
from ditty_di.export.full import save_model
from ditty_di.export.gather import gathered, only_part
from ditty_di.export.opening import on_base
from ditty_di.export.publish import Publication

# torch is imported when a model is exported: the command line must answer without it.
if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody knows why it would want to.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "Question: What is the capital of France?\nAnswer: Paris, which lies on the Seine.",
    "In 1905 he published four papers; the third one introduced what is now called relativity.",
)


class MergedExport:
    """Writes a whole model: the base as it was published, with the adapters added to its weights.

    The base is read again, in `dtype`, never the quantised values that training saw: merging into
    those would round twice. peft merges in float32 on the CPU, where the result is rounded to
    `dtype` once; so 4 bytes a parameter are needed. Called on every rank; rank 0 merges.

    How far the logits went is printed, and written to `export.json` and the card, against
    `unmerged`, the adapters on the same base, and against `training`, the model as it was trained,
    whose base may have been quantised.

    Args:
        tokenizer: written beside the model.
        path: the folder; one that is there already is replaced once the new one is whole.
        base, revision: what to merge into; None is where the base was read from.
        dtype: of what is written, a name in torch.
        max_shard_size: of one safetensors file, such as `5GB`.
        texts: what the logits are compared on, unless `dataset` has rows of `(inputs, labels)`.
        rows, max_tokens: how much of them.
        run, push_to, private, license: see `publish.Publication`.

    Raises:
        ValueError: a model without adapters, or a pipeline's stages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        *,
        base: str | None = None,
        revision: str | None = None,
        dtype: str = "bfloat16",
        max_shard_size: str = "5GB",
        texts: Sequence[str] = TEXTS,
        dataset: Any = None,
        rows: int = 4,
        max_tokens: int = 128,
        run: str | None = None,
        push_to: str | None = None,
        private: bool = True,
        license: str | None = None,
    ) -> None:
        self.tokenizer, self.base, self.revision = tokenizer, base, revision
        self.dtype, self.max_shard_size = dtype, max_shard_size
        self.texts, self.dataset = list(texts), dataset
        self.rows, self.max_tokens = rows, max_tokens
        self.publication = Publication(
            path, tokenizer=tokenizer, run=run, push_to=push_to, private=private, license=license
        )

    def __call__(self, model_parts: list[nn.Module]) -> None:
        from ditty_di.adapters import adapter_state
        from ditty_di.export import drift

        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        state_dict = adapter_state(model)
        if self.dataset is not None:
            rows = drift.rows_of_dataset(self.dataset, self.rows, model.config, self.max_tokens)
        else:
            texts = self.texts[: self.rows]
            rows = drift.rows_of_texts(texts, self.tokenizer, model.config, self.max_tokens)
        training = drift.logits_on(model, rows)
        if state_dict is None:
            return
        base, revision = config["base_model_name_or_path"], config["revision"]
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), config, state_dict)
            adapted = on_base(folder, base, revision, dtype=self.dtype)
        adapted.float()
        unmerged = drift.logits_on(adapted, rows)
        merged = adapted.merge_and_unload(safe_merge=True)
        _round(merged, self.dtype)
        logits = drift.logits_on(merged, rows)
        found = {
            "unmerged": drift.difference(unmerged, logits),
            "training": drift.difference(training, logits),
        }
        record = {
            "kind": "merged",
            "base": base,
            "revision": revision,
            "dtype": self.dtype,
            "drift": {"rows": len(rows), "tokens": sum(map(len, logits)), "from": found},
        }
        with self.publication.written(record) as folder:
            tensors = gathered(merged, self.dtype)
            assert tensors is not None
            save_model(merged, folder, tensors, self.max_shard_size)
        for name, one in found.items():
            print(
                f"logits of the merged model against {name}: largest difference "
                f"{one['max_abs']:.2g}, mean {one['mean_abs']:.2g}, KL {one['kl']:.2g} nats"
            )


def _round(model: nn.Module, dtype: str) -> None:
    """Gives float32 parameters the values that they will have in `dtype`."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
