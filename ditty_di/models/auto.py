"""The tokenizer of a model that has one, or one trained on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditty_di.data.tokenizer import train_bpe
from ditty_di.models.tokenizer import add_to, from_pretrained


def tokenizer(
    path: str | None = None,
    *,
    revision: str | None = None,
    documents: Sequence[str] | None = None,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    vocab_size: int = 2048,
    max_length: int | None = None,
) -> Any:
    """Return the tokenizer of a model's folder, or a BPE trained on documents.

    Args:
        path: folder of the model, or `user/name` on the Hub; None trains a tokenizer.
        revision: branch, tag or commit on the Hub.
        documents: texts to train on where there is no path.
        special_tokens: tokens to add where the vocabulary lacks them.
        chat_template: Jinja template, or the file that holds one.
        vocab_size: largest vocabulary of a trained tokenizer, in tokens.
        max_length: longest row of a trained tokenizer, in tokens.

    Returns:
        A transformers tokenizer; None without a path and documents, for data that is not text.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: no tokenizer at `path`, or documents that are empty.
    """
    if path is not None:
        return from_pretrained(
            path, revision=revision, special_tokens=special_tokens, chat_template=chat_template
        )
    if documents is None:
        return None
    trained = train_bpe(documents, vocab_size, max_length)
    return add_to(trained, special_tokens, chat_template)
