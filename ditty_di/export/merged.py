"""Adapters merged into the unquantised base, and how much that changed."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.adapter import adapter_file, write_adapter
from ditty_di.export.full import save_model
from ditty_di.export.gather import gathered, only_part
from ditty_di.export.opening import on_base
from ditty_di.export.publish import Publication
from ditty_di.io import is_first_rank

# torch is imported when a model is exported: the command line must answer without it.
if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ditty_di.export.drift import Row

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

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Try before the training what the export needs after it: base, rows and folder.

        Raises:
            ValueError: see the class; also for a dtype or a folder that cannot be.
            FileNotFoundError, PermissionError, ConnectionError: the base; see `ModelFiles`.
        """
        import torch

        from ditty_di.models.files import ModelFiles

        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f"export.dtype={self.dtype!r} is not a dtype; write float32, bfloat16 or float16"
            )
        self._rows(model)
        if is_first_rank():
            ModelFiles(config["base_model_name_or_path"], config["revision"]).config()
            self.publication.prepare()

    def _rows(self, model: Any) -> list[Row]:
        """Return the rows that logits are compared on."""
        from ditty_di.export import drift

        if self.dataset is not None:
            return drift.rows_of_dataset(self.dataset, self.rows, model.config, self.max_tokens)
        texts = self.texts[: self.rows]
        return drift.rows_of_texts(texts, self.tokenizer, model.config, self.max_tokens)

    def __call__(self, model_parts: list[nn.Module]) -> None:
        from ditty_di.adapters import adapter_state
        from ditty_di.export import drift

        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        state_dict = adapter_state(model)
        rows = self._rows(model)
        training = drift.logits_on(model, rows)
        if state_dict is None:
            return
        base, revision = config["base_model_name_or_path"], config["revision"]
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), config, state_dict)
            adapted = on_base(folder, base, revision, dtype=self.dtype)
        adapted.float()
        unmerged = drift.logits_on(adapted, rows)
        merged: Any = _merged(adapted, rows)
        merged.generation_config = self.publication.generation_config(model)
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


def _merged(adapted: PeftModel, rows: list[Row]) -> PreTrainedModel:
    """Merge the adapters into the weights, and return the model without them.

    An adapter belongs to one layer, a tied weight to several: each gets a copy before the merge,
    and those that are still equal after it are tied again. Where they are not, `config` says so.
    """
    import torch

    base: Any = adapted.get_base_model()
    config, tied = base.config, getattr(base.config, "tie_word_embeddings", False)
    for module, name in _shared(base):
        module._parameters[name] = copy.deepcopy(module._parameters[name])
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
        _say_untied(merged, rows)
        names = [name for pair in merged.all_tied_weights_keys.items() for name in pair]
        print(f"untied, for the adapters of {' and '.join(dict.fromkeys(names))} differ")
    return merged


def _shared(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the (module, name) of every parameter that was met in another module before."""
    met: set[int] = set()
    found = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in met:
                found.append((module, name))
            met.add(id(parameter))
    return found


def _say_untied(model: Any, rows: list[Row]) -> None:
    """Write into the model's config that no weight is tied, if that means nothing else for it.

    In T5's family it also changes the scale of the output. There it stays: transformers keeps
    apart what the files have apart.
    """
    import torch

    from ditty_di.export.drift import logits_on

    before = logits_on(model, rows)
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}
    for part in parts.values():
        part.tie_word_embeddings = False
    read = type(model.config).from_dict(model.config.to_dict())
    same = all(map(torch.equal, before, logits_on(model, rows)))
    if read.tie_word_embeddings or not same:
        for part in parts.values():
            part.tie_word_embeddings = True


def _round(model: nn.Module, dtype: str) -> None:
    """Gives float32 parameters the values that they will have in `dtype`."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
