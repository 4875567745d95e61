"""Encode many texts with one tokenizer: words that recur are encoded once.

Made for tokenizers 0.23, which encodes 1 to 3 MB/s on a core. 1.0.0rc3 encoded 64 MB/s, but
transformers does not allow it yet: with it, this file can go.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, filterfalse, product

from tokenizers import AddedToken, Tokenizer

#: Words that are remembered, some 70 MB; then all are forgotten.
_REMEMBERED = 1 << 18
#: Characters of the longest of them: longer ones hardly recur.
_LONG = 32
# Where a text may be cut: before a space behind a character, before one behind white space (but not
# before a digit: some tokenizers take digits out of a text first), and behind a letter or digit
# before a newline or punctuation (an apostrophe belongs to what is around it). All characters that
# are looked at are ASCII, on whose class all tokenizers agree.
_SPACE = r"(?= [!-~])(?<=[!-~])"
_SECOND_SPACE = r"(?= [!-/:-~])(?<=[ \n])"
_PUNCTUATION = r"(?=[\n!-&(-/:-@\[-`{-~])(?<=[A-Za-z0-9])"
_CUTS = (
    f"{_SPACE}|{_SECOND_SPACE}|{_PUNCTUATION}",
    f"{_SPACE}|{_PUNCTUATION}",
    f"{_SPACE}|{_SECOND_SPACE}",
    _SPACE,
)
# An entry for a byte that no other entry has; it is of no text.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# How vocabularies write a space and a newline.
_AS_TEXT = str.maketrans("\u0120\u2581\u010a", "  \n")


class WordEncoder:
    """Encode texts without special tokens; the ids are those of `Tokenizer.encode_batch_fast`.

    Texts are cut into words where no token can lie on both sides, a word is encoded once, and the
    words that are new in a call are encoded as one text with EOS between them. What a tokenizer
    does not allow is not done: see `separator_of` and `cut_of`.

    Args:
        tokenizer: The tokenizer; without truncation and padding, and not changed later.
        eos: Id of its EOS.
    """

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.tokenizer, self.eos = tokenizer, eos
        self._known: dict[str, Sequence[int]] = {}

    # Found with the first text: they take a tenth of a second.
    @cached_property
    def separator(self) -> str:
        """Text of EOS if it separates texts, else ""."""
        return separator_of(self.tokenizer, self.eos)

    @cached_property
    def cut(self) -> re.Pattern[str] | None:
        """Where a text is cut into words; None if it is not."""
        return cut_of(self.tokenizer) if self.separator else None

    @cached_property
    def _whole(self) -> re.Pattern[str] | None:
        return _whole(self.tokenizer, self.cut) if self.cut else None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if not self.cut:
            return self._encoded(texts)
        cut, whole = self.cut, self._whole
        words = [[text] if whole and whole.search(text) else cut.split(text) for text in texts]
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = list(set(chain.from_iterable(words)).difference(self._known))
        self._known.update(zip(new, map(tuple, self._encoded(new)), strict=True))
        found = [[*chain.from_iterable(map(self._known.__getitem__, some))] for some in words]
        for word in new:
            if len(word) > _LONG:
                del self._known[word]
        return found

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        if self.separator:
            joined = self.separator.join([*texts, ""])
            (encoding,) = self.tokenizer.encode_batch_fast([joined], add_special_tokens=False)
            ids, found, start = encoding.ids, list[list[int]](), 0
            if ids.count(self.eos) == len(texts):  # none of the texts has EOS
                for _ in texts:
                    end = ids.index(self.eos, start)
                    found.append(ids[start:end])
                    start = end + 1
                return found
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def separator_of(tokenizer: Tokenizer, eos: int) -> str:
    """Return the text of EOS if it separates documents in a text that is encoded as one, else "".

    It does where added tokens are cut out of the text before anything else sees it, where no other
    one can begin in a document and end in EOS, and where the tokenizer treats what follows EOS as
    the beginning of a text.
    """
    added = tokenizer.get_added_tokens_decoder()
    end = added.pop(eos, None)
    if end is None or end.normalized or end.lstrip or end.rstrip or end.single_word:
        return ""
    others = [token.content for token in added.values()]
    meets = any(end.content.startswith(t[n:]) for t in others for n in range(1, len(t)))
    longer = any(other.startswith(end.content) for other in others)
    alone = any(token.single_word for token in added.values())
    if tokenizer.encode_special_tokens or meets or longer or alone:
        return ""
    probes = ["a b", " a", "", "1\n\n", "\n", "b "]
    (joined,) = tokenizer.encode_batch([end.content.join([*probes, ""])], add_special_tokens=False)
    each = tokenizer.encode_batch(probes, add_special_tokens=False)
    same = joined.ids == [i for encoding in each for i in (*encoding.ids, eos)]
    return end.content if same else ""


def cut_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return where a text can be cut and each part be encoded alone; None if nowhere.

    None also where the tokenizer itself does not divide a text into words (Llama 2, Gemma): it
    encodes a long text faster than its words.

    No entry of the vocabulary may have a cut inside, so that nothing is merged across one; and
    texts with all pairs of kinds of ASCII characters must have the ids of their parts, so that
    neither normalization nor the division into words looks across one.
    """
    if getattr(tokenizer.model, "dropout", None) or not _divides(tokenizer):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    merged = set(tokenizer.get_vocab(with_added_tokens=False)) - {t.content for t in added}
    vocabulary = "\0".join(filterfalse(_BYTE.fullmatch, merged)).translate(_AS_TEXT)
    # Found in what normalization makes of a text, or in nearly every text.
    kept = [t for t in added if (t.normalized and tokenizer.normalizer) or t.content.isspace()]
    probes = _probes()

    def ids(texts: Iterable[str]) -> list[int]:
        encoded = tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
        return [i for encoding in encoded for i in encoding.ids]

    wanted = ids(probes)
    for pattern in map(re.compile, _CUTS):
        if pattern.search(vocabulary) or any(_is_cut(pattern, token.content) for token in kept):
            continue
        if ids(chain.from_iterable(map(pattern.split, probes))) == wanted:
            return pattern
    return None


def _divides(tokenizer: Tokenizer) -> bool:
    """Return whether a text is divided at spaces before it is encoded."""
    text = "a b"
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    divide = tokenizer.pre_tokenizer
    return divide is not None and len(divide.pre_tokenize_str(text)) > 1


def _probes() -> list[str]:
    """Return texts with all pairs of kinds of printable characters, joined and apart, at random."""
    kinds = f"aAst1\n{string.punctuation}"
    pairs = [f"{a}{b}a{a} {b}1{a}  {b}" for a, b in product(kinds, repeat=2)]
    drawn = random.Random(0)
    drawn.shuffle(pairs)
    texts = ["".join(pairs[n::100]) for n in range(100)]
    return [*texts, *("".join(drawn.choices(kinds + " " * 20, k=200)) for _ in range(20))]


def _is_cut(pattern: re.Pattern[str], text: str) -> bool:
    """Return whether a text can have a cut inside, whatever is around it."""
    around = (f"{before}{text}{after}" for before, after in product("a ", repeat=2))
    return any(1 < m.start() <= len(text) for t in around for m in pattern.finditer(t))


def _whole(tokenizer: Tokenizer, cut: re.Pattern[str]) -> re.Pattern[str] | None:
    """Return what a text that must not be cut has: an added token that a cut would destroy.

    That is one with a cut inside, or one for which the white space before it counts.
    """

    def destroyed(token: AddedToken) -> bool:
        behind_space = cut.match(f"  {token.content}", 1)
        return token.lstrip or token.rstrip or bool(behind_space) or _is_cut(cut, token.content)

    added: Iterable[AddedToken] = tokenizer.get_added_tokens_decoder().values()
    found = [re.escape(token.content) for token in added if destroyed(token)]
    return re.compile("|".join(found)) if found else None
