"""A byte-level BPE tokenizer trained on the corpus, in Hugging Face's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ditty_di.data.cache import build_once, cache_folder, counted, documents_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
# Not EOS: a collator that masks the padding's labels by id must not mask the end of a document.
PAD = "<|pad|>"
_SMALLEST_VOCABULARY = 256 + 2
# Raise it when the same documents would give another tokenizer.
_BPE_FORMAT = 1


def train_bpe(
    documents: Sequence[str],
    vocab_size: int = 2048,
    model_max_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (https://arxiv.org/abs/1508.07909, bytes as in GPT-2) on `documents`.

    Id 0 is `<|endoftext|>` (EOS and BOS), id 1 `<|pad|>`. `vocab_size` is an upper bound: a small
    corpus runs out of pairs that occur twice, and `len(tokenizer)` is the truth. Any text decodes
    to itself, special tokens included. The same documents give the same tokenizer; it is cached by
    their content. `model_max_length` in tokens; None: no limit.

    Raises `ValueError` for no documents, or a `vocab_size` below 258 (all bytes, two specials).
    """
    if not documents:
        raise ValueError("no documents to train a tokenizer on: the training split is empty")
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens need "
            f"at least {_SMALLEST_VOCABULARY}"
        )
    name = f"bpe-{vocab_size}-v{_BPE_FORMAT}-{documents_fingerprint(documents)[:32]}"
    folder = build_once(
        cache_folder(cache_dir) / "tokenizers" / name,
        lambda aside: _train(documents, vocab_size, aside),
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def _train(documents: Sequence[str], vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    taken = counted(documents, f"training a tokenizer on {len(documents):,} documents", "documents")
    backend.train_from_iterator(taken, trainer, length=len(documents))
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
