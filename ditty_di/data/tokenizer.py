"""Tokenizers trained on text, byte-level BPE and Unigram; and what identifies a tokenizer."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ditty_di.data.cache import build_once, cache_folder, counted, fingerprint
from ditty_di.data.options import require

log = logging.getLogger(__name__)

# Keys of a saved tokenizer's configuration that do not change the ids.
_IRRELEVANT = {"model_max_length", "is_local", "local_files_only", "name_or_path"}
_EOS = "<|endoftext|>"
# Not EOS: a collator that masks the padding's labels by id must not mask the end of a document.
_PAD = "<|pad|>"
_MIN_VOCAB_SIZE = 256 + 2


class TextStream(Protocol):
    """Texts that are read anew by each iteration, such as `tokenization.TextSample`."""

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""

    def fingerprint(self) -> str:
        """Return a digest of the content."""


def train_bpe(
    documents: Sequence[str] | TextStream,
    vocab_size: int = 2048,
    model_max_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (https://arxiv.org/abs/1508.07909, bytes as in GPT-2) on documents.

    Id 0 is `<|endoftext|>` (EOS and BOS), id 1 `<|pad|>`. Any text decodes to itself, special
    tokens included. The same documents give the same tokenizer; it is cached by their content.

    Args:
        documents: Texts to train on; a stream is never in memory as a whole.
        vocab_size: Upper bound of the vocabulary, in tokens. A small corpus runs out of pairs that
            occur twice: use `len(tokenizer)` for the size of a model's embedding.
        model_max_length: The tokenizer's limit, in tokens; None: no limit.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.
        special_tokens: Further special tokens, within the vocabulary's size.

    Raises:
        ValueError: No documents, or a `vocab_size` below 258 (all bytes, two special tokens) and
            the further special tokens.
    """
    # v1: raise it when the same documents would give another tokenizer.
    name = f"bpe-{vocab_size}-v1"
    trainer = partial(trainers.BpeTrainer, vocab_size=vocab_size, min_frequency=2)
    backend = Tokenizer(models.BPE())
    return _trained(documents, backend, trainer, name, special_tokens, model_max_length, cache_dir)


def train_unigram(
    documents: Sequence[str] | TextStream,
    vocab_size: int = 2048,
    model_max_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a Unigram model (https://arxiv.org/abs/1804.10959) on the bytes of documents.

    As `train_bpe`, but its probabilities are sums in an order that varies: trained again, it may
    split some words otherwise. So it is built once, cached, and saved with what it tokenizes.

    Args:
        documents: See `train_bpe`.
        vocab_size: Upper bound of the vocabulary, in tokens.
        model_max_length: See `train_bpe`.
        cache_dir: See `train_bpe`.
        special_tokens: See `train_bpe`.

    Raises:
        ValueError: As `train_bpe`.
    """
    name = f"unigram-{vocab_size}-v1"
    trainer = partial(trainers.UnigramTrainer, vocab_size=vocab_size)
    backend = Tokenizer(models.Unigram())
    return _trained(documents, backend, trainer, name, special_tokens, model_max_length, cache_dir)


def _trained(
    documents: Sequence[str] | TextStream,
    backend: Tokenizer,
    make_trainer: Callable[..., Any],
    name: str,
    special_tokens: Sequence[str],
    model_max_length: int | None,
    cache_dir: str | os.PathLike[str] | None,
) -> PreTrainedTokenizerFast:
    """Return the cached tokenizer of documents, trained the first time."""
    trainer = make_trainer(
        special_tokens=[_EOS, _PAD, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    size, smallest = trainer.vocab_size, _MIN_VOCAB_SIZE + len(special_tokens)
    needed = f"256 bytes and {smallest - 256} special tokens need at least {smallest}"
    require(size >= smallest, f"vocab_size={size} is too small: {needed}")
    if isinstance(documents, Sequence):
        require(
            bool(documents), "no documents to train a tokenizer on: the training split is empty"
        )
        content, number = fingerprint(*documents), f"{len(documents):,}"
    else:
        content, number = documents.fingerprint(), "a sample of the"
    if special_tokens:
        content = fingerprint(content, *special_tokens)

    def train(folder: Path) -> None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        taken = counted(documents, f"training a tokenizer on {number} documents", "documents")
        started = time.monotonic()
        backend.train_from_iterator(taken, trainer)
        seconds = time.monotonic() - started
        log.info("trained a tokenizer of %s tokens in %.0f s", backend.get_vocab_size(), seconds)
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=_EOS,
            eos_token=_EOS,
            pad_token=_PAD,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)

    folder = build_once(cache_folder(cache_dir) / "tokenizers" / f"{name}-{content[:32]}", train)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def eos_id(tokenizer: PreTrainedTokenizerBase, what: str) -> int:
    """Return the tokenizer's EOS id.

    Args:
        tokenizer: The tokenizer.
        what: Kind of sequence that ends with EOS, for the message.

    Raises:
        ValueError: The tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end {what} with: set "
            "`eos_token` (in YAML: `eos_token: <token>` in the tokenizer node)"
        )
    return int(tokenizer.eos_token_id)


def document_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a document: EOS, or the separator of encoders such as BERT.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ValueError: The tokenizer has neither.
    """
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)
    return eos_id(tokenizer, "documents")


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """Return the smaller of uint16 and uint32 that holds the tokenizer's ids."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


@contextmanager
def without_limits(tokenizer: Any) -> Iterator[None]:
    """Turn truncation and padding off within the context, for saving a tokenizer.

    A fast tokenizer keeps those of its last call and saves them, so that its file would depend on
    whether it was called, or its texts were in the cache.

    Args:
        tokenizer: of transformers, or the like; others than fast ones are left alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything the tokenizer saves, except limits and locations."""
    with tempfile.TemporaryDirectory() as folder:
        with without_limits(tokenizer):
            tokenizer.save_pretrained(folder)
        parts: list[str | bytes] = []
        for path in sorted(Path(folder).rglob("*")):
            if path.name == "tokenizer_config.json":
                config = json.loads(path.read_text(encoding="utf-8"))
                config = {key: config[key] for key in sorted(config.keys() - _IRRELEVANT)}
                parts += [path.name, json.dumps(config)]
            elif path.is_file():
                parts += [path.name, path.read_bytes()]
    return fingerprint(*parts)
