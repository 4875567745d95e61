"""How a model generates: `generation_config.json`, read as it is, written as stock accepts it."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.models.files import CONFIG, ModelFiles

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FILE = "generation_config.json"


def read(files: ModelFiles) -> GenerationConfig | None:
    """Return the generation config of a pretrained model; None where no file says anything of it.

    As transformers reads it: `generation_config.json`, else the entries about generation of an
    older `config.json`. Values that transformers refuses to read are left out with a warning.
    """
    from transformers import GenerationConfig

    file = files.find(FILE)
    config = file is None and files.find(CONFIG)
    if config:
        return _of_model_config(config)
    if not file:
        return None
    with _quiet():
        try:
            return GenerationConfig.from_pretrained(file.parent)
        except ValueError:
            return GenerationConfig(**_readable(file, _json(file)))


def take_over(files: ModelFiles, model: Any) -> None:
    """Give the model the generation config of its files, as transformers reads it."""
    found = read(files)
    if found is None:
        return
    if files.find(FILE) is None:
        # Ids that the model's config took from the tokenizer, where the file has none.
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if getattr(found, name) is None:
                setattr(found, name, getattr(model.generation_config, name))
    model.generation_config = found


def _of_model_config(file: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    values = _json(file)
    with _quiet():
        try:
            return GenerationConfig.from_model_config(values)
        except ValueError:
            names = GenerationConfig().to_dict().keys() & values.keys()
            kept = _readable(file, {name: values[name] for name in names})
            refused = names - kept.keys()
            return GenerationConfig.from_model_config(
                {name: value for name, value in values.items() if name not in refused}
            )


def _readable(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    from transformers import GenerationConfig

    kept = _consistent(GenerationConfig, values, strict=False)
    left_out = {name: value for name, value in values.items() if name not in kept}
    log.warning("%s: transformers refuses %s; left out", file, shown(left_out))
    return kept


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def savable(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return a copy that `save_pretrained` accepts, and what had to be reset to its default.

    transformers refuses to save a changed config with values that contradict each other, such as
    a temperature without sampling or early stopping without beams, though it reads and ignores
    them. Only these are reset; end tokens and everything consistent stay.
    """
    kind, repaired = type(config), copy.deepcopy(config)
    with _quiet():
        try:
            repaired.validate(strict=True)
            return repaired, {}
        except (ValueError, TypeError, AttributeError):
            pass
        values = {n: v for n, v in config.to_diff_dict().items() if not n.startswith("_")}
        kept = _consistent(kind, values, strict=True)
        reset = {name: value for name, value in values.items() if name not in kept}
        default = kind()
        for name in reset:
            if hasattr(default, name):
                setattr(repaired, name, getattr(default, name))
            else:
                delattr(repaired, name)
    return repaired, reset


def shown(values: Mapping[str, Any]) -> str:
    """Return `name=value` pairs as one text."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def end_with_turns(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the tokens that end a turn of the tokenizer's chat template to `eos_token_id`."""
    from ditty_di.models.tokenizer import end_of_turn_ids

    own = config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or ())
    if new := [token for token in end_of_turn_ids(tokenizer) if token not in ends]:
        if not ends and tokenizer.eos_token_id is not None:
            ends = [tokenizer.eos_token_id]
        config.eos_token_id = list(dict.fromkeys([*ends, *new]))


def _consistent(kind: Any, values: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Return the values that a config of this class can have together.

    One by one, as long as one fits those before: a temperature fits once sampling is on.
    """
    kept: dict[str, Any] = {}
    left = dict(values)
    while fits := next((n for n in left if _valid(kind, kept | {n: left[n]}, strict)), None):
        kept[fits] = left.pop(fits)
    return {name: value for name, value in values.items() if name in kept}


def _valid(kind: Any, values: dict[str, Any], strict: bool) -> bool:
    try:
        kind(**copy.deepcopy(values)).validate(strict=strict)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Run without transformers' own warnings about what is repaired here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
