"""A byte-level BPE tokenizer trained on the corpus, in Hugging Face's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ditty_di.data.cache import build_once, cache_folder, counted, fingerprint
from ditty_di.data.options import require

_EOS = "<|endoftext|>"
# Not EOS: a collator that masks the padding's labels by id must not mask the end of a document.
_PAD = "<|pad|>"
_MIN_VOCAB_SIZE = 256 + 2


def train_bpe(
    documents: Sequence[str],
    vocab_size: int = 2048,
    model_max_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (https://arxiv.org/abs/1508.07909, bytes as in GPT-2) on documents.

    Id 0 is `<|endoftext|>` (EOS and BOS), id 1 `<|pad|>`. Any text decodes to itself, special
    tokens included. The same documents give the same tokenizer; it is cached by their content.

    Args:
        documents: Texts to train on.
        vocab_size: Upper bound of the vocabulary, in tokens. A small corpus runs out of pairs that
            occur twice: use `len(tokenizer)` for the size of a model's embedding.
        model_max_length: The tokenizer's limit, in tokens; None: no limit.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: No documents, or a `vocab_size` below 258 (all bytes, two special tokens).
    """
    require(bool(documents), "no documents to train a tokenizer on: the training split is empty")
    needed = f"256 bytes and 2 special tokens need at least {_MIN_VOCAB_SIZE}"
    require(vocab_size >= _MIN_VOCAB_SIZE, f"vocab_size={vocab_size} is too small: {needed}")
    # v1: raise it when the same documents would give another tokenizer.
    name = f"bpe-{vocab_size}-v1-{fingerprint(*documents)[:32]}"
    folder = build_once(
        cache_folder(cache_dir) / "tokenizers" / name,
        lambda aside: _train(documents, vocab_size, aside),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def _train(documents: Sequence[str], vocab_size: int, folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_EOS, _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    taken = counted(documents, f"training a tokenizer on {len(documents):,} documents", "documents")
    backend.train_from_iterator(taken, trainer, length=len(documents))
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_EOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
