"""Opening what was exported, or published, with stock transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.folder import quiet

# torch is imported when a model is opened: the command line must answer without it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_model(
    path: str, *, revision: str | None = None, base: str | None = None, dtype: str | None = None
) -> Any:
    """A model, or adapters on their base, of a folder or of the hub's `user/name`; on the CPU.

    Args:
        base: in place of the one that `adapter_config.json` names.
        dtype: a name in torch; None keeps that of the files.

    Raises:
        FileNotFoundError: adapters whose base is a folder that is not there.
    """
    config = adapter_config(path, revision)
    if config is None:
        return published(path, revision, dtype=dtype)
    return on_base(
        path,
        base or config["base_model_name_or_path"],
        None if base else config.get("revision"),
        adapter_revision=revision,
        dtype=dtype,
    )


def open_tokenizer(
    path: str, *, revision: str | None = None, base: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; that of their base for adapters which have none."""
    from transformers import AutoTokenizer

    config = adapter_config(path, revision)
    if config is not None and not _has(path, "tokenizer_config.json", revision):
        path, revision = base or config["base_model_name_or_path"], config.get("revision")
    return AutoTokenizer.from_pretrained(_folder(path), revision=revision or "main")


def adapter_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """`adapter_config.json` of a folder or hub id; None where there are no adapters."""
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(_folder(path), revision=revision)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def on_base(
    adapter: str | Path,
    base: str,
    revision: str | None = None,
    *,
    adapter_revision: str | None = None,
    dtype: str | None = None,
) -> Any:
    """Stock peft's model: adapters on their base as it was published, on the CPU.

    The base's vocabulary grows where the adapters bring embeddings of more tokens.

    Args:
        base, revision: a folder, or `user/name` and its revision on the hub.
        dtype: of the base, a name in torch; None keeps its own.
    """
    from peft import PeftModel

    from ditty_di.models import generation
    from ditty_di.models.files import ModelFiles

    if Path(base).expanduser().is_absolute() and not Path(base).expanduser().is_dir():
        raise FileNotFoundError(
            f"the base of the adapters in {adapter} is not where it was, {base}; say where it is: "
            f"base=FOLDER"
        )
    model: Any = published(base, revision, dtype=dtype)
    embeddings = model.get_input_embeddings()
    rows = _rows_brought(adapter, adapter_revision, model, embeddings)
    if rows > embeddings.weight.shape[0]:
        # Their values come with the adapters; drawing random ones from the old takes long.
        model.resize_token_embeddings(rows, mean_resizing=False)
    found = ModelFiles(adapter, adapter_revision)
    if found.find(generation.FILE) is not None:
        model.generation_config = generation.read(found)
    return PeftModel.from_pretrained(model, _folder(adapter), revision=adapter_revision)


def _rows_brought(
    adapter: str | Path, revision: str | None, model: PreTrainedModel, embeddings: Any
) -> int:
    """Rows of the input embeddings that are saved with the adapters; 0 when they are not."""
    from peft import load_peft_weights

    saved = load_peft_weights(_folder(adapter), device="cpu", revision=revision)
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is embeddings]
    ends = tuple(f".{name}{layer}.weight" for name in names for layer in ("", ".base_layer"))
    return max((t.shape[0] for name, t in saved.items() if name.endswith(ends)), default=0)


def published(
    path: str, revision: str | None = None, *, dtype: str | None = None
) -> PreTrainedModel:
    """A causal or a seq2seq model with its values, whichever its configuration says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ditty_di.models import generation
    from ditty_di.models.files import ModelFiles

    generates = generation.read(ModelFiles(path, revision))
    path, revision = _folder(path), revision or "main"
    config = AutoConfig.from_pretrained(path, revision=revision)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    wanted = getattr(torch, dtype) if dtype else "auto"
    with quiet():
        return auto.from_pretrained(
            path, revision=revision, dtype=wanted, generation_config=generates
        )


def _folder(path: str | Path) -> str:
    """A folder by the name that others understand too; a hub id as it is."""
    found = Path(path).expanduser()
    return str(found) if found.is_dir() else str(path)


def _has(path: str, file: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    found = cached_file(
        _folder(path), file, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return found is not None
