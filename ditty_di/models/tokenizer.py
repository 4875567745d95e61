"""The tokenizer of a pretrained model, with what a task adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def from_pretrained(
    path: str,
    *,
    revision: str | None = None,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    model_max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of the hub's `user/name`.

    Args:
        special_tokens: are added where the vocabulary lacks them; a model that is given this
            tokenizer grows its embeddings to match.
        chat_template: a Jinja template, or the file that holds one, in place of the tokenizer's.
        model_max_length: in tokens, in place of the tokenizer's.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: no tokenizer there, or one without an end-of-sequence token, which a model
            needs to learn where to stop.
    """
    from transformers import AutoTokenizer

    from ditty_di.models.files import ModelFiles

    ModelFiles(path, revision).find("tokenizer_config.json")  # says better what is wrong
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"tokenizer: there is none in {path}: {first}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: that of {path} has no end-of-sequence token; name one of its tokens with "
            f"a tokenizer_config.json that has eos_token"
        )
    if special_tokens:
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        is_file = "\n" not in chat_template and "{" not in chat_template and file.is_file()
        tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else chat_template
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer
