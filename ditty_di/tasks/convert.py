"""A model's folder in the layout of another library."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ditty_di.export.folder import replaced_whole
from ditty_di.export.folder import validate as validate_files
from ditty_di.io import is_first_rank, write_json
from ditty_di.models.deferred import Deferred
from ditty_di.models.files import INDEX, ModelFiles
from ditty_di.models.safetensors import Safetensors
from ditty_di.protocols import early_checks

#: Files that are the same in every layout: tokenizer, chat template, how the model generates.
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)

#: Makes the configuration and the tensors of the new layout, unread, of those of the old.
Conversion = Callable[[Mapping[str, Any], Safetensors], tuple[dict[str, Any], dict[str, Deferred]]]


def _validate(
    *,
    path: Any = None,
    to: Any = None,
    revision: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    validate_files(max_shard_size=max_shard_size)
    if isinstance(path, str):
        try:
            ModelFiles(path, revision)
        except FileNotFoundError as error:
            raise ValueError(
                f"path={path}: {error}; write a folder or the hub's user/name"
            ) from None
    folder = Path(to).expanduser() if isinstance(to, str) else None
    if folder and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise ValueError(f"to={to}: it exists already; write the name of a new folder")


@early_checks(validate=_validate)
def convert(
    path: str,
    to: str,
    conversion: Conversion,
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write a model in another layout; of several ranks only the first does the work.

    No more than one file's tensors are in memory. The folder appears when it is complete.

    Args:
        path: A folder with a config.json and safetensors, or the hub's `user/name`.
        to: The folder to write, which must not exist yet (or be empty).
        conversion: Called with config.json and the tensors, such as
            `ditty_di.models.dolomite.to_hugging_face`.
        revision: Branch, tag or commit on the hub.
        max_shard_size: Of one safetensors file, such as `5GB`.

    Raises:
        ValueError: The conversion refuses the model, or a folder that has files already.
        FileNotFoundError, PermissionError, ConnectionError: See `ModelFiles`.
    """
    if not is_first_rank():
        return {}
    _validate(path=path, to=to, revision=revision, max_shard_size=max_shard_size)
    files, folder = ModelFiles(path, revision), Path(to).expanduser()
    config = json.loads(files.config().read_text(encoding="utf-8"))
    try:
        new, tensors = conversion(config, Safetensors(files.weights()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with replaced_whole(folder) as unfinished:
        size = _write(tensors, unfinished, max_shard_size)
        write_json(unfinished / "config.json", new)
        for name in COPIED:
            if (found := files.find(name)) is not None:
                shutil.copyfile(found, unfinished / name)
    print(f"converted: {folder} ({new['model_type']}, {len(tensors)} tensors, {size:,} bytes)")
    return {"folder": str(folder), "tensors": len(tensors), "bytes": size}


def _write(tensors: Mapping[str, Deferred], folder: Path, max_shard_size: str) -> int:
    """Write tensors file by file, as transformers names and splits them; return their bytes."""
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=_nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        # Not kept in a variable: the next file's tensors would be read beside these.
        save_file(
            {name: tensors[name].read() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
    return sum(map(_nbytes, tensors.values()))


def _nbytes(tensor: Deferred) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
