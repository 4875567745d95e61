"""Rows of a masked language model: some tokens hidden, which are its labels."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.data import options
from ditty_di.data.content import fingerprint_with
from ditty_di.data.loader import Dataset

_NO_MASK = """\
the tokenizer has no mask token, which stands for a hidden one: name it, such as \
tokenizer.mask_token=<mask> (it is added where the vocabulary lacks it)"""


class MaskedTokens:
    """Hide tokens of each row at random, as BERT does (Devlin et al. 2018, arXiv:1810.04805).

    Of `fraction` of the tokens, `mask_share` become the mask token, `random_share` any other token
    of the vocabulary, and the rest stay. These tokens are the labels, at their own positions; all
    others have `ignore_index`. Special tokens are never hidden. The numbers come from torch's
    generator, which the loader seeds by the row's position in the stream: they are the same on any
    layout and after a resume, and other ones in each epoch. A validation loader, which begins at
    the same position each time, always hides the same tokens.

    Args:
        rows: A dataset of `({"input": ids [length], ...}, labels [length])`. Labels only tell how
            many tokens there are: the number of those that are not `ignore_index`.
        tokenizer: Has the mask token, the special tokens and the size of the vocabulary.
        fraction: Probability that a token is a label.
        mask_share: Fraction of these that become the mask token.
        random_share: Fraction of these that become a random token.
        ignore_index: Label of all other tokens, excluded from the loss.

    Attributes:
        lengths: Tokens of each row, if `rows` has them.

    Raises:
        ValueError: A fraction out of range, or a tokenizer without a mask token.
    """

    @staticmethod
    def validate(
        *, fraction: float = 0.15, mask_share: float = 0.8, random_share: float = 0.1
    ) -> None:
        """Raise `ValueError` for fractions out of range."""
        options.require(0 < fraction <= 1, f"fraction={fraction} must be above 0 and at most 1")
        shares = {"mask_share": mask_share, "random_share": random_share}
        for name, share in shares.items():
            options.require(0 <= share <= 1, f"{name}={share} must be from 0 to 1")
        options.require(
            sum(shares.values()) <= 1 + 1e-9,
            f"mask_share={mask_share} and random_share={random_share} are more than 1 together",
        )

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fraction: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        ignore_index: int = -100,
    ) -> None:
        self.validate(fraction=fraction, mask_share=mask_share, random_share=random_share)
        options.require(tokenizer.mask_token_id is not None, f"tokenizer: {_NO_MASK}")
        self.rows, self.fraction, self.ignore_index = rows, fraction, ignore_index
        self.mask_share, self.random_share = mask_share, random_share
        self._mask_id, self._vocab = int(tokenizer.mask_token_id), len(tokenizer)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        if hasattr(rows, "lengths"):
            self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        inputs, known = self.rows[index]
        ids = inputs["input"][: int((known != self.ignore_index).sum())]
        chosen = torch.rand(len(ids)) < self.fraction
        kind, other = torch.rand(len(ids)), torch.randint(self._vocab, (len(ids),))
        chosen &= ~torch.isin(ids, self._special)
        labels = torch.where(chosen, ids, self.ignore_index)
        masked = chosen & (kind < self.mask_share)
        replaced = chosen & ~masked & (kind < self.mask_share + self.random_share)
        hidden = torch.where(replaced, other, ids).masked_fill(masked, self._mask_id)
        return {"input": hidden}, labels

    def fingerprint(self) -> str | None:
        """Return a digest of the rows and of how they are masked."""
        how = (self.fraction, self.mask_share, self.random_share, self._mask_id, self._vocab)
        return fingerprint_with(self.rows, repr(how))
