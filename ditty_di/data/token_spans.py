"""Which part of a text each token belongs to, and which tokens are control tokens."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_BEFORE, _TOKENS_COMPARED = 12, 4


class TokenSpans:
    """Tokenize texts without special tokens of the tokenizer's own, with the span of each token.

    Spans are `(first character, behind the last)` of the text, surrounding whitespace included:
    post-processors with `trim_offsets` (GPT-2, RoBERTa, Llama 3) would leave it out, so that a
    space at the border of two parts belonged to no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._exact: Any = None

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and spans `[tokens]`. Only for a fast tokenizer."""
        if self._exact is None:
            self._exact = _without_trimming(self.tokenizer)
        found = self._exact(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), list(found["offset_mapping"])

    def differs(self, text: str, cut: int) -> bool:
        """Return whether the tokens at `cut` depend on both sides of it.

        That is so if one begins before it and ends behind it, or if the text before it alone has
        other tokens (line breaks that the next character would part).
        """
        if not self.tokenizer.is_fast:
            return self._by_prefixes(text, [cut]) is None
        return self._differs(text, cut, *self.spans(text))

    def _differs(self, text: str, cut: int, ids: list[int], spans: list[tuple[int, int]]) -> bool:
        behind = next((i for i, (start, _) in enumerate(spans) if start >= cut), len(spans))
        if behind and spans[behind - 1][1] > cut:
            return True
        # Merges do not reach far: some tokens before the cut are enough to see the last ones alike.
        first = max(0, behind - _TOKENS_BEFORE)
        alone = self.ids(text[spans[first][0] if first else 0 : cut])
        seen = _TOKENS_COMPARED if first else behind
        return alone[-seen:] != ids[behind - seen : behind] if seen else bool(alone)

    def split(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int], bool]:
        """Return ids, the part that each is in `[tokens]`, and whether parts were tokenized apart.

        Part 0 ends at `cuts[0]`. Where tokens would depend on both sides of a cut (`differs`) the
        parts are tokenized apart: in use a prompt is tokenized without its answer, and training has
        to show the same ids.
        """
        if not self.tokenizer.is_fast:
            whole = self._by_prefixes(text, cuts)
            return (*whole, False) if whole is not None else self._apart(text, cuts, cuts)
        ids, spans = self.spans(text)
        apart = [cut for cut in cuts if self._differs(text, cut, ids, spans)]
        if apart:
            return self._apart(text, cuts, apart)
        return ids, [bisect_right(cuts, start) for start, _ in spans], False

    def _apart(
        self, text: str, cuts: Sequence[int], apart: Sequence[int]
    ) -> tuple[list[int], list[int], bool]:
        ids: list[int] = []
        parts: list[int] = []
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
    """A tokenizer's control tokens: special ones (EOS included), and all added ones."""

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
        """Return how the token is written."""
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
        """Return the position, or the begin of the control token that it lies within."""
        begin, end = max(0, position - self._longest), position + self._longest
        for match in self._words.finditer(text, begin, end):
            if match.start() < position < match.end():
                return match.start()
        return position


def _without_trimming(tokenizer: Any) -> Any:
    """Return the tokenizer, or a copy without post-processor if that one trims the spans."""
    text = "a b\n c"
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    borders = [0, *(border for span in spans for border in span), len(text)]
    if borders[::2] == borders[1::2]:  # each span begins where the one before ends
        return tokenizer
    exact = copy.deepcopy(tokenizer)
    exact.backend_tokenizer.post_processor = None
    return exact
