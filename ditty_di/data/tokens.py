"""Documents as one flat array of token ids, and that array as rows to train on."""

from __future__ import annotations

import json
import math
import mmap
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditty_di.data.cache import (
    build_once,
    cache_folder,
    counted,
    documents_fingerprint,
    fingerprint,
)
from ditty_di.data.content import array_digest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# In a saved tokenizer's configuration, but without a say in the ids.
_IRRELEVANT = {"model_max_length", "is_local", "local_files_only", "name_or_path"}
# Raise it when the same documents and tokenizer would give other tokens.
_TOKENS_FORMAT = 1
_DOCUMENTS_AT_ONCE = 1000
_TOKENS_AT_ONCE = 1 << 24


def tokenize(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | os.PathLike[str] | None = None,
    split_special_tokens: bool = False,
) -> np.ndarray:
    """All documents as token ids `[tokens]`, the tokenizer's EOS after each.

    uint16 where the vocabulary fits, else uint32; memory-mapped, read only, cached by the content
    of documents and tokenizer. Special tokens spelt out in a document become special tokens, as
    Hugging Face does it, unless `split_special_tokens`.

    Raises `ValueError` for no documents, or a tokenizer without EOS.
    """
    if not documents:
        raise ValueError("no documents to tokenize: this split of the corpus is empty")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end documents with: "
            "set its `eos_token` (in YAML: `eos_token: <token>` in the tokenizer node)"
        )
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    key = fingerprint(
        documents_fingerprint(documents),
        tokenizer_fingerprint(tokenizer),
        f"{_TOKENS_FORMAT} {split_special_tokens}",
    )

    def encode(some: Sequence[str]) -> Iterator[np.ndarray]:
        batch = tokenizer(
            list(some),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,  # documents may be longer than the model's limit: rows are not
        )
        for ids in batch["input_ids"]:
            yield np.asarray([*ids, eos], dtype)

    def build(path: Path) -> None:
        taken = counted(documents, f"tokenizing {len(documents):,} documents", "documents")
        parts = [
            np.concatenate(list(encode(some)))
            for some in iter(lambda: list(islice(taken, _DOCUMENTS_AT_ONCE)), [])
        ]
        with path.open("wb") as stream:
            np.save(stream, np.concatenate(parts))

    path = build_once(cache_folder(cache_dir) / "tokens" / f"{key[:32]}.npy", build)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides about ids: everything the tokenizer saves, but for limits and locations."""
    with tempfile.TemporaryDirectory() as folder:
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


class TokenDataset:
    """Rows of `seq_len` consecutive tokens, labels shifted by one.

    `dataset[i]` is `({"input": int64 [seq_len]}, labels int64 [seq_len])`, and `labels[t]` is the
    token after `input[t]`. Rows do not overlap: over all rows every token is a label exactly once,
    but for the very first, which nothing precedes. The last row is filled up (input `pad_id`,
    labels `ignore_index`), so nothing is lost. Documents follow each other within a row.

    Raises `ValueError` for fewer than two tokens or a `seq_len` below 1.
    """

    contract = "-> input:2:i64 | ctx.target:2:i64"  # of a micro-batch

    @staticmethod
    def validate(*, seq_len: int = 1) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")

    def __init__(
        self, tokens: np.ndarray, seq_len: int, pad_id: int = 0, ignore_index: int = -100
    ) -> None:
        self.validate(seq_len=seq_len)
        if len(tokens) < 2:
            raise ValueError(
                f"{len(tokens)} tokens make no row: at least 2 are needed, one to read and one to "
                "predict. The split of the corpus that they come from is empty or nearly so."
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.seq_len)

    def fingerprint(self) -> str:
        """Of the tokens and how they are cut into rows."""
        return fingerprint(array_digest(np.asarray(self.tokens)), str(self.seq_len))

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row % len(self) * self.seq_len
        window = np.asarray(self.tokens[start : start + self.seq_len + 1], np.int64)
        inputs = np.full(self.seq_len, self.pad_id, np.int64)
        labels = np.full(self.seq_len, self.ignore_index, np.int64)
        inputs[: len(window) - 1] = window[:-1]
        labels[: len(window) - 1] = window[1:]
        return {"input": torch.from_numpy(inputs)}, torch.from_numpy(labels)

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked receive the dataset by pickle: they map the file again,
        # instead of a copy of all tokens each. Only a whole mapping knows its own offset.
        state = self.__dict__.copy()
        tokens: Any = self.tokens
        if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
            state["tokens"] = (tokens.filename, tokens.dtype, "r", tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            state = {**state, "tokens": np.memmap(*state["tokens"])}
        self.__dict__.update(state)


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
    if not len(tokens):
        raise ValueError("no tokens to take the entropy of")
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        part = np.bincount(tokens[start : start + _TOKENS_AT_ONCE], minlength=vocab_size)
        if len(part) > vocab_size:
            raise ValueError(
                f"token id {len(part) - 1} does not fit a vocabulary of {vocab_size}: "
                "these tokens were made by another tokenizer"
            )
        counts += part
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())
