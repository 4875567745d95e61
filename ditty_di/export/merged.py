"""Export adapters merged into their unquantized base, and measure how much that changes logits."""

# No `from __future__ import annotations`: see `ditty_di.export.base`.
import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ditty_di.adapters import adapter_state
from ditty_di.dtypes import dtype_by_name
from ditty_di.export import logit_diff
from ditty_di.export.adapter import adapter_file, write_adapter
from ditty_di.export.base import Export, published_as
from ditty_di.export.folder import validate
from ditty_di.export.full import save_model
from ditty_di.export.gather import gathered, only_part
from ditty_di.export.load import on_base
from ditty_di.io import is_first_rank
from ditty_di.models.files import ModelFiles

TEXTS = (
    "The quick brown fox jumps over the lazy dog, "
    "and nobody knows why it would want to.",  # codespell:ignore nobody
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "Question: What is the capital of France?\nAnswer: Paris, which lies on the Seine.",
    "In 1905 he published four papers; the third one introduced what is now called relativity.",
)


@dataclass(eq=False)
class MergedExport(Export):
    """Write a whole model: the published base with the adapters added to its weights.

    The base is read again in `dtype`, not taken from the quantized values that training used:
    merging into those would round twice. peft merges in float32 on the CPU (4 bytes a parameter),
    and the result is rounded to `dtype` once. Rank 0 merges.

    The differences of the logits are printed, and written to `export.json` and the card: against
    `unmerged`, the adapters on the same base, and against `training`, the model as it was trained,
    whose base may have been quantized.

    Arguments are those of `Export`, and:

    Args:
        base: what to merge into; None is where the base was read from.
        revision: of the base on the Hub.
        dtype: of what is written, a name in torch.
        max_shard_size: of one safetensors file, such as `5GB`.
        texts: what logits are compared on, unless `dataset` is given.
        dataset: of `(inputs, labels)`; logits are compared on its first rows.
        rows: number of rows to compare.
        max_tokens: of each row.

    Raises:
        ValueError: a model without adapters, or with pipeline stages.
    """

    validate = staticmethod(validate)

    base: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    max_shard_size: str = "5GB"
    texts: Sequence[str] = TEXTS
    dataset: Any = None
    rows: int = 4
    max_tokens: int = 128

    def check(self, model: Any) -> None:
        """Check adapters, base, dtype and rows.

        Raises:
            ValueError: a model without adapters or that gives no text, or an unknown dtype.
            FileNotFoundError, PermissionError, ConnectionError: the base; see `ModelFiles`.
        """
        config = adapter_file(model, self.base, self.revision)
        if getattr(model, "head_task", None) is not None:
            raise ValueError(
                "export: adapters are merged into language models only; write them alone, with the "
                "head that was trained beside them (export=adapter)"
            )
        self.validate(dtype=self.dtype, max_shard_size=self.max_shard_size)
        self._rows(model)
        if is_first_rank():
            ModelFiles(config["base_model_name_or_path"], config["revision"]).config()

    def _rows(self, model: Any) -> list[logit_diff.Row]:
        """Return the rows that logits are compared on."""
        if self.dataset is not None:
            return logit_diff.rows_of_dataset(
                self.dataset, self.rows, model.config, self.max_tokens
            )
        texts = self.texts[: self.rows]
        return logit_diff.rows_of_texts(texts, self.tokenizer, model.config, self.max_tokens)

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Merge and write; called on every rank."""
        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        state_dict = adapter_state(model)
        rows = self._rows(model)
        training = logit_diff.logits_on(model, rows)
        if state_dict is None:
            return
        base, revision = config["base_model_name_or_path"], config["revision"]
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), config, state_dict)
            adapted = on_base(folder, base, revision, dtype=self.dtype)
        adapted.float()
        unmerged = logit_diff.logits_on(adapted, rows)
        merged: Any = _merge(adapted, rows)
        merged.generation_config = self.generation_config(model)
        with torch.no_grad():  # float32 parameters get the values that they will have in `dtype`
            for parameter in merged.parameters():
                parameter.copy_(parameter.to(dtype_by_name(self.dtype)))
        logits = logit_diff.logits_on(merged, rows)
        found = {
            "unmerged": logit_diff.difference(unmerged, logits),
            "training": logit_diff.difference(training, logits),
        }
        record = {
            **published_as(model),
            "kind": "merged",
            "base": base,
            "revision": revision,
            "dtype": self.dtype,
            "logit_diff": {"rows": len(rows), "tokens": sum(map(len, logits)), "from": found},
        }
        with self.written(record) as path:
            save_model(merged, path, gathered(merged, self.dtype) or {}, self.max_shard_size)
        for name, one in found.items():
            print(
                f"logits of the merged model against {name}: largest difference "
                f"{one['max_abs']:.2g}, mean {one['mean_abs']:.2g}, KL {one['kl']:.2g} nats"
            )


def _merge(adapted: Any, rows: list[logit_diff.Row]) -> PreTrainedModel:
    """Merge the adapters into the weights, and return the model without them.

    An adapter belongs to one layer, a tied weight to several: each gets a copy before the merge,
    and those that are still equal after it are tied again. Otherwise `config` says they are not.

    Args:
        adapted: a `peft.PeftModel`.
        rows: inputs, to find out what tying changes.
    """
    base: Any = adapted.get_base_model()
    config, tied = base.config, getattr(base.config, "tie_word_embeddings", False)
    seen: set[int] = set()
    for layer in base.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) in seen:
                layer._parameters[name] = copy.deepcopy(parameter)
            seen.add(id(parameter))
    for layer in base.modules():
        # Trainable tokens inside LoRA, on a tied head: peft merges the outer one only.
        inner: Any = getattr(layer, "base_layer", None)
        if hasattr(inner, "unload_and_optionally_merge_module"):
            layer.base_layer = inner.unload_and_optionally_merge_module(True, True, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*no longer tied")
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    config.tie_word_embeddings = tied
    pairs = [(merged.get_parameter(a), b) for a, b in merged.all_tied_weights_keys.items()]
    if all(torch.equal(parameter, merged.get_parameter(b)) for parameter, b in pairs):
        merged.tie_weights()
    elif pairs:
        _declare_untied(merged, rows)
        names = [name for pair in merged.all_tied_weights_keys.items() for name in pair]
        print(f"untied, for the adapters of {' and '.join(dict.fromkeys(names))} differ")
    return merged


def _declare_untied(model: Any, rows: list[logit_diff.Row]) -> None:
    """Set `tie_word_embeddings=False` in the model's config, unless that changes anything else.

    In T5's family it also changes the scale of the output, so there it stays: transformers does
    not tie what is different in the files.
    """
    before = logit_diff.logits_on(model, rows)
    configs = (model.config, model.config.get_text_config())
    for config in configs:
        config.tie_word_embeddings = False
    read = type(model.config).from_dict(model.config.to_dict())
    same = all(map(torch.equal, before, logit_diff.logits_on(model, rows)))
    if read.tie_word_embeddings or not same:
        for config in configs:
            config.tie_word_embeddings = True
