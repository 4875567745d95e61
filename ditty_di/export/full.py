"""Export a whole model as a folder for transformers, or as plain safetensors."""

# No `from __future__ import annotations`: see `ditty_di.export.base`.
import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

import ditty_di.models.modeling  # noqa: F401

# isort: split
from transformers import PreTrainedModel

from ditty_di.dtypes import dtype_name
from ditty_di.export.base import Export, published_as, require_writable
from ditty_di.export.folder import quiet, replaced_whole, validate
from ditty_di.export.gather import gathered, only_part, saved
from ditty_di.fqn import canonical_fqn
from ditty_di.io import is_first_rank
from ditty_di.models.conversion import bare_model


@dataclass(eq=False)
class HuggingFaceExport(Export):
    """Write config, safetensors and tokenizer for transformers' `from_pretrained`.

    Sharded parameters are gathered one by one, and rank 0 keeps copies on the CPU. What is written
    is the model's own class, without what training added (float8 layers, a deferred head, noise).

    Arguments are those of `Export`, and:

    Args:
        dtype: name in torch, for the floating-point values; None keeps each tensor's own.
        max_shard_size: of one safetensors file, such as `5GB`.

    Raises:
        ValueError: a quantized base, adapters or pipeline stages: these have other exports.
    """

    #: Further entries of `export.json`, and of the card (`card.write_card`).
    about: ClassVar[dict[str, str]] = {}
    validate = staticmethod(validate)

    dtype: str | None = None
    max_shard_size: str = "5GB"

    def check(self, model: Any) -> None:
        """Raise ValueError for a model that is not an unchanged model of transformers."""
        self.validate(dtype=self.dtype, max_shard_size=self.max_shard_size)
        _require_exportable(model)
        _match(_bare(model), {canonical_fqn(name): t for name, t in saved(model)})

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Write the model; called on every rank."""
        model: Any = only_part(model_parts)
        _require_exportable(model)
        state_dict = gathered(model, self.dtype)
        if state_dict is None:
            return
        bare: Any = _bare(model)
        bare.generation_config = self.generation_config(model)
        record = {"kind": "model", **published_as(model), **self.about}
        with self.written(record) as folder:
            save_model(bare, folder, state_dict, self.max_shard_size)
            self.write_beside(folder, model)

    def write_beside(self, folder: Path, model: nn.Module) -> None:
        """Write further files into the folder, on rank 0; a subclass overrides it.

        Args:
            folder: which has the weights and the configuration.
            model: as it was trained.
        """


class SafetensorsExport:
    """Write `model.safetensors` alone, for a model of any kind.

    Tied parameters are written once, under the first of their names.

    Args:
        path: folder to write; an earlier export there is replaced once the new one is complete.
        dtype: name in torch, for the floating-point values; None keeps each tensor's own.
    """

    validate = staticmethod(validate)

    def __init__(self, path: str, *, dtype: str | None = None) -> None:
        self.validate(dtype=dtype)
        self.path, self.dtype = Path(path).expanduser(), dtype

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Check before training what the export needs after it.

        Args:
            model_parts: the trainer's.

        Raises:
            ValueError: pipeline stages, or a folder that cannot be written.
        """
        only_part(model_parts)
        if is_first_rank():
            require_writable(self.path)

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Write the tensors; called on every rank."""
        state_dict = gathered(only_part(model_parts), self.dtype)
        if state_dict is None:
            return
        with replaced_whole(self.path) as folder:
            save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
        print(f"exported: {self.path}/model.safetensors")


def _require_exportable(model: Any) -> None:
    instead = "write the adapters alone (export=adapter), or merge them (export=merged)"
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"export: the base is quantized, and its rounded weights are not worth publishing; "
            f"{instead}"
        )
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError(f"export: the model has adapters beside its base; {instead}")
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"export: {type(model).__name__} is not a transformers model; export=safetensors "
            f"writes the tensors of any model"
        )


def _bare(model: Any) -> PreTrainedModel:
    """Return the model's own class on meta, with its real vocabulary."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = True  # off while training
    bare: Any = bare_model(model, config)
    rows = model.get_input_embeddings().weight.shape[0]
    if bare.get_input_embeddings().weight.shape[0] != rows:
        config.get_text_config().vocab_size = rows
        bare = bare_model(model, config)
    return bare


def save_model(
    bare: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor], max_shard_size: str
) -> None:
    """Write config and safetensors of a model whose tensors are in `state_dict`.

    Args:
        bare: a model of the class to write, also on meta.
        folder: to write in.
        state_dict: the tensors by name.
        max_shard_size: of one safetensors file, such as `5GB`.

    Raises:
        ValueError: `state_dict` is not what the class will look for; nothing is written.
    """
    state_dict = _match(bare, state_dict)
    elements: Counter[str] = Counter()
    for tensor in state_dict.values():
        elements[dtype_name(tensor.dtype)] += tensor.numel()
    with quiet():
        bare.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    # transformers writes the dtype of `bare`; what is in the files counts.
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": elements.most_common(1)[0][0]}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _match(bare: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of `bare`, where tied parameters have one name each.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
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
    problems += [f"{name} is not expected" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError(
            f"export: the trained model no longer fits {type(bare).__name__} (export=safetensors "
            f"writes the tensors that it has): " + "; ".join(sorted(problems)[:5])
        )
    return found
