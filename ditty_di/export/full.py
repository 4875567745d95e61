"""A whole model as a folder that others open."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.folder import quiet, replaced_whole
from ditty_di.export.gather import gathered, only_part, saved
from ditty_di.export.publish import Publication
from ditty_di.io import is_first_rank
from ditty_di.names import canonical_fqn

# torch is imported when a model is exported: the command line must answer without it.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HuggingFaceExport:
    """Writes config, safetensors and tokenizer for transformers' `from_pretrained`.

    Called with the trainer's model parts, on every rank: sharded parameters are gathered one by
    one, and rank 0 keeps copies on the CPU and writes. What is written is the model's own class,
    whatever training put into it (float8 layers, a loss that takes the head's place, noise).

    Args:
        tokenizer: written beside the model.
        path: the folder; one that is there already is replaced once the new one is whole.
        dtype: a name in torch for the floating-point values; None keeps each tensor's own.
        max_shard_size: of one safetensors file, such as `5GB`.
        run, push_to, private, license: see `publish.Publication`.

    Raises:
        ValueError: a quantised base, adapters, or a pipeline's stages: these have other exports.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        *,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        run: str | None = None,
        push_to: str | None = None,
        private: bool = True,
        license: str | None = None,
    ) -> None:
        self.dtype, self.max_shard_size = dtype, max_shard_size
        self.publication = Publication(
            path, tokenizer=tokenizer, run=run, push_to=push_to, private=private, license=license
        )

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Try before the training what the export needs after it.

        Raises:
            ValueError: see the class; also for a folder that cannot be written.
        """
        model: Any = only_part(model_parts)
        _refuse_parts_of_a_model(model)
        _as_expected(_bare(model), {canonical_fqn(name): t for name, t in saved(model)})
        if is_first_rank():
            self.publication.prepare()

    def __call__(self, model_parts: list[nn.Module]) -> None:
        model: Any = only_part(model_parts)
        _refuse_parts_of_a_model(model)
        state_dict = gathered(model, self.dtype)
        if state_dict is None:
            return
        bare: Any = _bare(model)
        bare.generation_config = self.publication.generation_config(model)
        with self.publication.written({"kind": "model"}) as folder:
            save_model(bare, folder, state_dict, self.max_shard_size)


class SafetensorsExport:
    """Writes `model.safetensors` alone, for a model of any kind; otherwise as `HuggingFaceExport`.

    Tied parameters are written once, under the first of their names.
    """

    def __init__(self, path: str, *, dtype: str | None = None) -> None:
        self.path, self.dtype = path, dtype

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Try before the training what the export needs after it.

        Raises:
            ValueError: a pipeline's stages, or a folder that cannot be written.
        """
        only_part(model_parts)
        if is_first_rank():
            Publication(
                self.path, tokenizer=None, run=None, push_to=None, private=True, license=None
            ).prepare()

    def __call__(self, model_parts: list[nn.Module]) -> None:
        state_dict = gathered(only_part(model_parts), self.dtype)
        if state_dict is None:
            return
        from safetensors.torch import save_file

        path = Path(self.path).expanduser()
        with replaced_whole(path) as folder:
            save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
        print(f"exported: {path}/model.safetensors")


def _refuse_parts_of_a_model(model: Any) -> None:
    instead = "write the adapters alone (export=adapter), or merge them (export=merged)"
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"export: the base is quantised, and its rounded weights are no model to publish; "
            f"{instead}"
        )
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError(f"export: the model has adapters beside its base; {instead}")
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"export: {type(model).__name__} is no transformers model; export=safetensors writes "
            f"the tensors of any model"
        )


def _bare(model: Any) -> PreTrainedModel:
    """The model's own class on meta, as `from_pretrained` builds it, with its real vocabulary."""
    from ditty_di.models.conversion import bare_model

    config = copy.deepcopy(model.config)
    if hasattr(config, "use_cache"):
        config.use_cache = True  # off while training
    bare: Any = bare_model(model, config)
    rows = model.get_input_embeddings().weight.shape[0]
    if bare.get_input_embeddings().weight.shape[0] != rows:
        config.get_text_config().vocab_size = rows
        bare = bare_model(model, config)
    return bare


def save_model(
    bare: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor], max_shard_size: str
) -> None:
    """Writes config and safetensors of a model whose tensors are in `state_dict`.

    Raises:
        ValueError: `state_dict` is not what the class will look for; nothing is written.
    """
    state_dict = _as_expected(bare, state_dict)
    weight: Counter[str] = Counter()
    for tensor in state_dict.values():
        weight[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    with quiet():
        bare.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    # transformers writes the dtype of `bare`; what is in the files counts.
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": weight.most_common(1)[0][0]}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_expected(bare: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of `bare`, of which tied parameters have one each."""
    # Of tied parameters, transformers saves the one that the others are tied to.
    tied, named = bare.all_tied_weights_keys, dict(bare.named_parameters(remove_duplicate=False))
    order = sorted(reversed(named), key=lambda name: name not in tied)
    known = {id(named[name]): name for name in order}
    aliases = {name: known[id(p)] for name, p in named.items()}
    persistent = set(bare.state_dict())
    expected = {name: named[name].shape for name in known.values()}
    expected |= {name: b.shape for name, b in bare.named_buffers() if name in persistent}
    found = {aliases.get(name, name): tensor for name, tensor in state_dict.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is too much" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError(
            f"export: the trained model is no {type(bare).__name__} any more (export=safetensors "
            f"writes what it is): " + "; ".join(sorted(problems)[:5])
        )
    return found
