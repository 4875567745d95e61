"""Documents as one flat array of token ids, and that array as rows to train on."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.data import options
from ditty_di.data.cache import build_once, cache_folder, chunks, counted, fingerprint
from ditty_di.data.content import array_digest
from ditty_di.data.tokenizer import document_end_id, id_dtype, tokenizer_fingerprint
from ditty_di.data.windows import JOINED_CONTRACT, WindowRows

_DOCUMENTS_AT_ONCE = 1000
_TOKENS_AT_ONCE = 1 << 24


def tokenize(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | os.PathLike[str] | None = None,
    split_special_tokens: bool = False,
) -> np.ndarray:
    """Return all documents as token ids, with EOS after each document.

    Args:
        documents: The texts.
        tokenizer: The tokenizer; its settings are part of the cache's key.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.
        split_special_tokens: Take special tokens that are spelt out in a document as text; else
            they become special tokens, as in Hugging Face.

    Returns:
        Token ids `[tokens]`, memory-mapped and read only; uint16 where the vocabulary fits, else
        uint32.

    Raises:
        ValueError: No documents, or a tokenizer without EOS.
    """
    options.require(bool(documents), "no documents to tokenize: this split of the corpus is empty")
    eos, dtype = document_end_id(tokenizer), id_dtype(tokenizer)
    # The number is the format's: raise it when the same input would give other tokens.
    key = fingerprint(
        fingerprint(*documents), tokenizer_fingerprint(tokenizer), f"1 {split_special_tokens}"
    )

    def build(path: Path) -> None:
        taken = counted(documents, f"tokenizing {len(documents):,} documents", "documents")
        parts = []
        for some in chunks(taken, _DOCUMENTS_AT_ONCE):
            batch = tokenizer(
                some,
                add_special_tokens=False,
                split_special_tokens=split_special_tokens,
                return_attention_mask=False,
                verbose=False,  # documents may exceed the model's limit, rows do not
            )
            parts += [np.asarray([*ids, eos], dtype) for ids in batch["input_ids"]]
        with path.open("wb") as stream:
            np.save(stream, np.concatenate(parts))

    path = build_once(cache_folder(cache_dir) / "tokens" / f"{key[:32]}.npy", build)
    return np.load(path, mmap_mode="r", allow_pickle=False)


class TokenDataset:
    """A dataset of rows of `seq_len` consecutive tokens, with labels shifted by one.

    `dataset[i]` is `({"input": int64 [seq_len]}, labels int64 [seq_len])`, and `labels[t]` is the
    token after `input[t]`. Rows do not overlap: over all rows every token but the first is a label
    exactly once. The last row is padded. Documents follow each other within a row.

    Args:
        tokens: Token ids `[tokens]`.
        seq_len: Length of a row, in tokens.
        pad_id: Id of the padding's inputs.
        ignore_index: Label of the padding, excluded from the loss.

    Raises:
        ValueError: Fewer than two tokens, or a `seq_len` below 1.
    """

    contract = JOINED_CONTRACT  # of a micro-batch

    validate = staticmethod(WindowRows.validate)

    def __init__(
        self, tokens: np.ndarray, seq_len: int, pad_id: int = 0, ignore_index: int = -100
    ) -> None:
        self._row = WindowRows(seq_len, "joined", pad_id, ignore_index)
        few = f"{len(tokens)} tokens make no row, which needs 2: the split has hardly any text"
        options.require(len(tokens) >= 2, few)
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.seq_len)

    def fingerprint(self) -> str:
        """Return a digest of the tokens and how they are cut into rows."""
        return fingerprint(array_digest(np.asarray(self.tokens)), str(self.seq_len))

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        start = options.row_index(index, len(self)) * self.seq_len
        return self._row(self.tokens[start : start + self.seq_len + 1])

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked receive the dataset by pickle: they map the file again,
        # instead of a copy of all tokens each. Only a whole mapping knows its own offset.
        state = self.__dict__.copy()
        tokens: Any = self.tokens
        if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
            state["tokens"] = (tokens.filename, tokens.dtype, "r", tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            self.tokens = np.memmap(*self.tokens)


def unigram_entropy(
    tokens: np.ndarray, vocab_size: int | None = None, *, tokenizer: Any = None
) -> float:
    """Return the entropy of the tokens' own frequencies, in nats per token: `-sum p log p`.

    This is the loss of the best model that ignores all context; a language model must get below it.

    Args:
        tokens: token ids `[tokens]`.
        vocab_size: size of the vocabulary; None is that of `tokenizer`.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: no tokens, or an id outside the vocabulary.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    options.require(len(tokens) > 0, "no tokens to take the entropy of")
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        part = np.bincount(tokens[start : start + _TOKENS_AT_ONCE], minlength=vocab_size)
        options.require(
            len(part) == vocab_size,
            f"token id {len(part) - 1} does not fit a vocabulary of {vocab_size}: "
            "these tokens were made by another tokenizer",
        )
        counts += part
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())
