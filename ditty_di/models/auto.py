"""The tokenizer of a model or of tokenized data, or one trained on the data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditty_di.data.reading.remote import fetched_folder, is_url, listed
from ditty_di.data.tokenizer import TextStream, train_bpe
from ditty_di.models.tokenizer import add_to, from_pretrained

log = logging.getLogger(__name__)
_VOCAB_SIZE = 2048


def tokenizer(
    path: str | None = None,
    *,
    revision: str | None = None,
    shards: str | Sequence[str] | None = None,
    documents: Sequence[str] | TextStream | None = None,
    special_tokens: Sequence[str] = (),
    mask_token: str | None = None,
    chat_template: str | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Any:
    """Return the tokenizer of a model's folder, of shards, or a BPE trained on documents.

    Args:
        path: folder of the model, or `user/name` on the Hub; None: the data's, or a trained one.
        revision: branch, tag or commit on the Hub.
        shards: folders of shards; the tokenizer that made the first is taken where there is no path
            and no `vocab_size`.
        documents: texts to train on otherwise.
        special_tokens: tokens to add where the vocabulary lacks them.
        mask_token: token that stands for a hidden one in masked language models.
        chat_template: Jinja template, or the file that holds one.
        vocab_size: largest vocabulary of a trained tokenizer, in tokens; None: 2048.
        max_length: longest row of a trained tokenizer, in tokens.

    Returns:
        A transformers tokenizer; None without a path and documents, for data that is not text.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `ModelFiles`.
        ValueError: no tokenizer at `path`, or documents that are empty.
    """
    if path is None and vocab_size is None and (saved := _of_shards(shards)) is not None:
        log.info("the tokenizer is that of the shards: %s", saved)
        path, revision = str(saved), None
    if path is not None:
        return from_pretrained(
            path,
            revision=revision,
            special_tokens=special_tokens,
            mask_token=mask_token,
            chat_template=chat_template,
        )
    if documents is None:
        return None
    trained = train_bpe(documents, vocab_size or _VOCAB_SIZE, max_length)
    return add_to(trained, special_tokens, chat_template, mask_token)


def _of_shards(folders: str | Sequence[str] | None) -> Path | None:
    """Return the folder of the tokenizer that made the shards of folders, or of folders in them."""
    for folder in [folders] if isinstance(folders, str) else folders or ():
        if is_url(folder):
            places = (f"{folder.rstrip('/')}/{place}/*" for place in ("tokenizer", "*/tokenizer"))
            if found := next(filter(None, map(listed, places)), None):
                return fetched_folder(min(file.url for file in found.values()).rpartition("/")[0])
            continue
        root = Path(folder).expanduser()
        for saved in (root / "tokenizer", *sorted(root.glob("*/tokenizer"))):
            if saved.is_dir():
                return saved
    return None
