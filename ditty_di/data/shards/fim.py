"""Fill-in-the-middle: documents rearranged so that a model learns to write between two texts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.shards.dataset import Shards


class FillInTheMiddle:
    """Rows of shards in which documents are rearranged (https://arxiv.org/abs/2207.14255).

    A document of a row is cut at two random positions into prefix, middle and suffix:

        PSM: <prefix> prefix <suffix> suffix <middle> middle
        SPM: <prefix> <suffix> suffix <middle> prefix middle

    Its EOS stays last. Rows keep their length: what three more tokens a document push over the end
    is cut off. The draws are from NumPy's global generator, which the loader seeds by position: the
    same on any layout, with any number of workers and after a resume, and others in each epoch.

    Args:
        dataset: The shards.
        rate: Fraction of the documents that are rearranged, 0 to 1.
        spm_rate: Fraction of these that are rearranged as SPM, 0 to 1.
        tokens: Text of the tokens for prefix, middle and suffix.
        tokenizer: The run's tokenizer, which has them.

    Raises:
        ValueError: A rate out of range, a token that the tokenizer lacks, or shards with overlap.
    """

    @staticmethod
    def validate(*, rate: float = 0.0, spm_rate: float = 0.0) -> None:
        """Raise `ValueError` for an option out of range."""
        for name, value in (("rate", rate), ("spm_rate", spm_rate)):
            options.require(0 <= value <= 1, f"{name}={value} must be from 0 to 1")

    def __init__(
        self,
        dataset: Shards,
        rate: float = 0.5,
        spm_rate: float = 0.5,
        *,
        tokens: tuple[str, str, str] = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        tokenizer: Any,
    ) -> None:
        self.validate(rate=rate, spm_rate=spm_rate)
        text = "fill-in-the-middle needs shards with overlap=0: rearranged rows share no context"
        options.require(dataset.overlap == 0, text)
        known = tokenizer.get_vocab()
        lacking = [token for token in tokens if token not in known]
        options.require(
            not lacking,
            f"the tokenizer lacks {', '.join(lacking)}: add special tokens before the text is "
            "tokenized, or name those that it has (tokens=[prefix, middle, suffix])",
        )
        self.dataset, self.rate, self.spm_rate = dataset, rate, spm_rate
        self.ids = tuple(known[token] for token in tokens)
        self.contract = dataset.contract
        self.sampler, self.keyed_sampler = dataset.sampler, dataset.keyed_sampler
        self.needs_pools = dataset.needs_pools

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str | None:
        """Return a digest of the shards and the rates; None if the shards have none."""
        own = self.dataset.fingerprint()
        return None if own is None else fingerprint(own, f"{self.rate} {self.spm_rate} {self.ids}")

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        tokens, starts, _ = self.dataset.window(index)
        bounds = [0, *starts.tolist(), len(tokens)]
        pieces = [
            self._rearranged(tokens[first:last], ends=last < len(tokens))
            for first, last in pairwise(bounds)
        ]
        begins = np.cumsum([len(piece) for piece in pieces])[:-1]
        made = np.concatenate(pieces)[: self.dataset.seq_len + 1]
        return self.dataset.row(made, begins[begins < len(made)])

    def _rearranged(self, piece: np.ndarray, *, ends: bool) -> np.ndarray:
        """Return a document of a row, rearranged or as it is.

        Args:
            piece: Its ids.
            ends: Whether the document's last token, its EOS, is in the row.
        """
        if np.random.random() >= self.rate or len(piece) < 3:
            return piece
        body, end = (piece[:-1], piece[-1:]) if ends else (piece, piece[:0])
        first, last = np.sort(np.random.randint(0, len(body) + 1, 2))
        before, between, after = body[:first], body[first:last], body[last:]
        prefix, middle, suffix = ([token] for token in self.ids)
        parts: list[Any] = [prefix, before, suffix, after, middle, between, end]
        if np.random.random() < self.spm_rate:
            parts = [prefix, suffix, after, middle, before, between, end]
        return np.concatenate([np.asarray(part, piece.dtype) for part in parts])
