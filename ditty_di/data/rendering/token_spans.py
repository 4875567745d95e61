"""The spans of tokens in a text, and a tokenizer's control tokens."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

# Merges do not reach far: this many tokens before a cut are tokenized again, and the last compared.
_TOKENS_BEFORE, _TOKENS_COMPARED = 12, 4


class TokenSpans:
    """Tokenize texts without adding special tokens, with the span of each token.

    Spans are `(first character, last + 1)` of the text, surrounding whitespace included:
    post-processors with `trim_offsets` (GPT-2, RoBERTa, Llama 3) would leave it out, and a space at
    the border of two parts would belong to no token.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Return token ids `[tokens]`."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and spans `[tokens]`; only for a fast tokenizer."""
        found = self._exact(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), list(found["offset_mapping"])

    @cached_property
    def _exact(self) -> Any:
        """The tokenizer, or a copy without its post-processor if that trims the spans."""
        text = "a b\n c"
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        borders = [0, *(border for span in found["offset_mapping"] for border in span), len(text)]
        if borders[::2] == borders[1::2]:  # each span begins where the previous one ends
            return self.tokenizer
        exact: Any = copy.deepcopy(self.tokenizer)
        exact.backend_tokenizer.post_processor = None
        return exact

    def differs(self, text: str, cut: int) -> bool:
        """Return whether the tokens at `cut` depend on both sides of it.

        That is so if a token spans it, or if the text before it has other tokens alone (line breaks
        that the next character would separate).
        """
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, [cut]) is None
        return self._differs(text, cut, *self.spans(text))

    def _differs(self, text: str, cut: int, ids: list[int], spans: list[tuple[int, int]]) -> bool:
        behind = next((i for i, (start, _) in enumerate(spans) if start >= cut), len(spans))
        if behind and spans[behind - 1][1] > cut:
            return True
        first = max(0, behind - _TOKENS_BEFORE)
        alone = self.ids(text[spans[first][0] if first else 0 : cut])
        seen = _TOKENS_COMPARED if first else behind
        return alone[-seen:] != ids[behind - seen : behind] if seen else bool(alone)

    def split(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int], bool]:
        """Tokenize a text that consists of parts.

        Where tokens would depend on both sides of a cut (`differs`) the parts are tokenized apart:
        in generation a prompt is tokenized without its answer, and training has to use the same
        ids.

        Args:
            text: The text.
            cuts: Positions at which parts 1, 2, ... begin, ascending.

        Returns:
            Token ids and the part of each `[tokens]`, and whether parts were tokenized apart.
        """
        if self.tokenizer.is_fast:
            ids, spans = self.spans(text)
            apart = [cut for cut in cuts if self._differs(text, cut, ids, spans)]
            if not apart:
                return ids, [bisect_right(cuts, start) for start, _ in spans], False
        elif (whole := self._by_prefixes(text, cuts)) is not None:
            return (*whole, False)
        else:
            apart = list(cuts)
        ids, parts = [], list[int]()
        for start, end in zip([0, *apart], [*apart, len(text)], strict=True):
            if self.tokenizer.is_fast:
                some, spans = self.spans(text[start:end])
            else:
                some = self.ids(text[start:end])
                spans = [(0, 0)] * len(some)
            ids += some
            parts += [bisect_right(cuts, start + first) for first, _ in spans]
        return ids, parts, True

    def _by_prefixes(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]] | None:
        ids, parts = self.ids(text), list[int]()
        for part, cut in enumerate(cuts):
            prefix = self.ids(text[:cut])
            if ids[: len(prefix)] != prefix or len(prefix) < len(parts):
                return None
            parts += [part] * (len(prefix) - len(parts))
        return ids, parts + [len(cuts)] * (len(ids) - len(parts))


class Markers:
    """A tokenizer's control tokens.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        special: Ids of its special tokens, EOS included.
        added: Ids of all added tokens, the special ones included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self.special -= {tokenizer.unk_token_id}
        self.added = {*self.special, *(i for i, token in added.items() if token.content.strip())}
        self._tokenizer = tokenizer
        self._blank: dict[int, bool] = {}
        words = sorted({self.text(i) for i in self.added} - {""}, key=len, reverse=True)
        self._longest = max(map(len, words), default=0)
        self._words = re.compile("|".join(map(re.escape, words)) or "(?!)")

    def text(self, token: int) -> str:
        """Return the text of a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def is_blank(self, token: int) -> bool:
        """Return whether the token is only whitespace."""
        if token not in self._blank:
            blank = token not in self.added and not str(self._tokenizer.decode([token])).strip()
            self._blank[token] = blank
        return self._blank[token]

    def ends(self, ids: Sequence[int]) -> bool:
        """Return whether the last token that is not whitespace is a control token."""
        last = next((i for i in reversed(ids) if not self.is_blank(i)), None)
        return last in self.added

    def aligned(self, text: str, position: int) -> int:
        """Return the position, or the start of the control token that it is inside of."""
        begin, end = max(0, position - self._longest), position + self._longest
        starts = (m.start() for m in self._words.finditer(text, begin, end) if m.end() > position)
        return min(position, next(starts, position))


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text, such as BOS, or T5's EOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
