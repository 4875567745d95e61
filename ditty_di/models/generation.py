"""Generation configs: read as they are published, written as transformers accepts them."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ditty_di.models.files import CONFIG, ModelFiles
from ditty_di.models.tokenizer import end_of_turn_ids

log = logging.getLogger(__name__)

FILE = "generation_config.json"
_INVALID = (ValueError, TypeError, AttributeError)


def read(files: ModelFiles) -> GenerationConfig | None:
    """Return the generation config of a pretrained model; None if no file has one.

    As in transformers: `generation_config.json`, else the entries about generation of an older
    `config.json`. Values that transformers refuses to read are left out with a warning.
    """
    with _quiet():
        if (file := files.find(FILE)) is not None:
            try:
                return GenerationConfig.from_pretrained(file.parent)
            except ValueError:
                return GenerationConfig(**_readable(file, _json(file)))
        if (file := files.find(CONFIG)) is not None:
            values = _json(file)
            try:
                return GenerationConfig.from_model_config(values)
            except ValueError:
                names = GenerationConfig().to_dict().keys() & values.keys()
                refused = names - _readable(file, {name: values[name] for name in names}).keys()
                return GenerationConfig.from_model_config(
                    {name: value for name, value in values.items() if name not in refused}
                )
    return None


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _readable(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that transformers reads together, with a warning about the others."""
    kept = _consistent(GenerationConfig, values, strict=False)
    refused = {name: value for name, value in values.items() if name not in kept}
    log.warning("%s: transformers refuses %s; left out", file, shown(refused))
    return kept


def take_over(files: ModelFiles, model: Any) -> None:
    """Give the model the generation config of its files, as transformers reads it.

    A model that does not generate, such as a classifier, gets none.
    """
    found = read(files) if model.can_generate() else None
    if found is None:
        return
    if files.find(FILE) is None:
        # Ids that the model's config took from the tokenizer, where the file has none.
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if getattr(found, name) is None:
                setattr(found, name, getattr(model.generation_config, name))
    model.generation_config = found


def savable(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return a copy that `save_pretrained` accepts, and the values that had to be reset.

    transformers refuses to save a changed config with values that contradict each other, such as
    a temperature without sampling or early stopping without beams, though it reads and ignores
    them. Only these are reset to their defaults; end tokens and everything consistent stay.
    """
    repaired = copy.deepcopy(config)
    with _quiet():
        try:
            repaired.validate(strict=True)
            return repaired, {}
        except _INVALID:
            pass
        values = {n: v for n, v in config.to_diff_dict().items() if not n.startswith("_")}
        kept = _consistent(type(config), values, strict=True)
        reset = {name: value for name, value in values.items() if name not in kept}
        default = type(config)()
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
    own = config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or ())
    if new := [token for token in end_of_turn_ids(tokenizer) if token not in ends]:
        if not ends and tokenizer.eos_token_id is not None:
            ends = [tokenizer.eos_token_id]
        config.eos_token_id = list(dict.fromkeys([*ends, *new]))


def _consistent(
    make: Callable[..., GenerationConfig], values: Mapping[str, Any], *, strict: bool
) -> dict[str, Any]:
    """Return the values that a config can have together.

    One by one, as long as one fits those before: a temperature fits once sampling is on.
    """

    def fits(candidate: dict[str, Any]) -> bool:
        try:
            make(**copy.deepcopy(candidate)).validate(strict=strict)
        except _INVALID:
            return False
        return True

    kept: dict[str, Any] = {}
    left = dict(values)
    while name := next((name for name in left if fits(kept | {name: left[name]})), None):
        kept[name] = left.pop(name)
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' own warnings about what is repaired here."""
    with ExitStack() as after:
        after.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        yield
