"""Open what was exported or published, with stock transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file
from transformers.utils.quantization_config import Mxfp4Config

from ditty_di.dtypes import dtype_by_name
from ditty_di.export.folder import quiet
from ditty_di.models import generation
from ditty_di.models.files import ModelFiles
from ditty_di.models.mxfp4 import is_mxfp4

_TEXT = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
}
#: Classes that a file names as its architecture, of which another class would make text.
_WITHOUT_TEXT = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
} - _TEXT
_TASKS_WITHOUT_TEXT = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
_NO_TEXT = "{path} has {kind}, which give no text; open them with transformers itself"


def open_model(
    path: str, *, revision: str | None = None, base: str | None = None, dtype: str | None = None
) -> Any:
    """Open a model, or adapters on their base, on the CPU.

    Args:
        path: a folder, or the hub's `user/name`.
        revision: of `path` on the hub; None is its main branch.
        base: replaces the one that `adapter_config.json` names.
        dtype: name in torch; None keeps that of the files.

    Raises:
        FileNotFoundError: the adapters' base is a folder that does not exist.
        ValueError: a classifier, or another model that gives no text.
    """
    config = adapter_config(path, revision)
    if config is None:
        return published(path, revision, dtype=dtype)
    if config.get("task_type") in _TASKS_WITHOUT_TEXT:
        raise ValueError(_NO_TEXT.format(path=path, kind=f"adapters for {config['task_type']}"))
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
    """Open the tokenizer of a folder or hub id; for adapters without one, that of their base.

    Args:
        path: a folder, or the hub's `user/name`.
        revision: of `path` on the hub; None is its main branch.
        base: replaces the one that `adapter_config.json` names.
    """
    config = adapter_config(path, revision)
    if config is not None:
        own = cached_file(
            _folder(path),
            "tokenizer_config.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if own is None:
            path, revision = base or config["base_model_name_or_path"], config.get("revision")
    return AutoTokenizer.from_pretrained(_folder(path), revision=revision or "main")


def adapter_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return `adapter_config.json` of a folder or hub id; None without adapters."""
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
    """Return stock peft's model: adapters on their published base, on the CPU.

    The base's vocabulary grows if the adapters bring embeddings of more tokens.

    Args:
        adapter: a folder, or the hub's `user/name`.
        base: a folder, or the hub's `user/name`.
        revision: of the base on the hub.
        adapter_revision: of the adapter on the hub.
        dtype: of the base, a name in torch; None keeps its own.

    Raises:
        FileNotFoundError: the base is a folder that does not exist.
    """
    from peft import PeftModel

    if Path(base).expanduser().is_absolute() and not Path(base).expanduser().is_dir():
        raise FileNotFoundError(
            f"the base of the adapters in {adapter} is not where it was, {base}; say where it is: "
            f"base=FOLDER"
        )
    model: Any = published(base, revision, dtype=dtype)
    rows = _embedding_rows(adapter, adapter_revision, model)
    if rows > model.get_input_embeddings().weight.shape[0]:
        # Their values come with the adapters; drawing random ones from the old takes long.
        model.resize_token_embeddings(rows, mean_resizing=False)
    files = ModelFiles(adapter, adapter_revision)
    if files.find(generation.FILE) is not None:
        model.generation_config = generation.read(files)
    return PeftModel.from_pretrained(model, _folder(adapter), revision=adapter_revision)


def _embedding_rows(adapter: str | Path, revision: str | None, model: PreTrainedModel) -> int:
    """Return the rows of the input embeddings saved with the adapters; 0 without any."""
    from peft import load_peft_weights

    saved = load_peft_weights(_folder(adapter), device="cpu", revision=revision)
    embeddings = model.get_input_embeddings()
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is embeddings]
    ends = tuple(f".{name}{layer}.weight" for name in names for layer in ("", ".base_layer"))
    return max((t.shape[0] for name, t in saved.items() if name.endswith(ends)), default=0)


def published(
    path: str, revision: str | None = None, *, dtype: str | None = None
) -> PreTrainedModel:
    """Return a causal, seq2seq or vision-language model with its values, as its configuration says.

    Args:
        path: a folder, or the hub's `user/name`.
        revision: on the hub; None is its main branch.
        dtype: name in torch; None keeps that of the files.

    Raises:
        ValueError: a classifier, or another model that gives no text.
    """
    generates = generation.read(ModelFiles(path, revision))
    path, revision = _folder(path), revision or "main"
    config = AutoConfig.from_pretrained(path, revision=revision)
    if named := _WITHOUT_TEXT & {*(config.architectures or ())}:
        kind = f"weights of {' and '.join(sorted(named))}"
        raise ValueError(_NO_TEXT.format(path=path, kind=kind))
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if reads_images(config):
        auto = AutoModelForImageTextToText
    options: dict[str, Any] = {"dtype": dtype_by_name(dtype) if dtype else "auto"}
    if is_mxfp4(config):  # with its kernels, transformers would leave it packed
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    with quiet():
        return auto.from_pretrained(path, revision=revision, generation_config=generates, **options)


def reads_images(config: Any) -> bool:
    """Return whether a configuration of transformers is that of a vision-language model."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return known and config.get_text_config() is not config


def _folder(path: str | Path) -> str:
    """Return a folder with `~` expanded, and a hub id as it is."""
    found = Path(path).expanduser()
    return str(found) if found.is_dir() else str(path)
