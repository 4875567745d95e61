"""Encode records for classifiers, taggers, embeddings and masked language models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.data import options
from ditty_di.data.cache import fingerprint
from ditty_di.data.encoded import Columns
from ditty_di.data.tokenizer import tokenizer_fingerprint

_SHOWN = 10  # labels in a message


def label_names(
    records: Iterable[tuple[str, Any]], label_key: str = "label", *, limit: int = 10_000
) -> list[str]:
    """Return the labels of the training records, sorted: numbers by their value, names as text.

    Bad records are left to the dataset, which reports them all.

    Args:
        records: Pairs of a record's origin and the record, such as `ditty_di.data.RecordDataset`.
        label_key: Field of the label, or of a list of labels.
        limit: Largest number of labels.

    Raises:
        ValueError: No record has a label, all have the same, or there are too many different ones.
    """
    names: set[str] = set()
    bad = False
    for where, record in records:
        value = record.get(label_key) if isinstance(record, Mapping) else None
        found = {_label_name(label) for label in (value if isinstance(value, list) else [value])}
        bad = bad or None in found
        names |= {name for name in found if name is not None}
        options.require(
            len(names) <= limit,
            f'{where}: more than {limit} different labels in "{label_key}"; is it the right field?',
        )
    options.require(bool(names), f'no record has a label in "{label_key}"')
    options.require(
        len(names) > 1 or bad,
        f'all training records have the label "{min(names)}" in "{label_key}": a classifier needs '
        f"records of two or more; is it the right field?",
    )
    return sorted(names, key=int) if all(map(_is_number, names)) else sorted(names)


def _label_name(label: Any) -> str | None:
    """Return the name of a label; None if it is neither text nor an integer."""
    if isinstance(label, str) and label.strip():
        return label
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else None


@dataclass(eq=False)
class _Encoder:
    """Base of the encoders: a tokenizer with a limit, and the fields of a record.

    Args:
        tokenizer: The tokenizer; its special tokens are added.
        max_tokens: Largest number of tokens of a text, special ones included; longer ones lose
            their end. None: no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    max_tokens: int | None = None

    @staticmethod
    def validate(*, max_tokens: int | None = None) -> None:
        """Raise `ValueError` for a limit below 1."""
        options.at_least(1, max_tokens=max_tokens)

    def __post_init__(self) -> None:
        self.validate(max_tokens=self.max_tokens)

    def fingerprint(self) -> str:
        """Return a digest of everything that decides about the columns."""
        # 1: raise it when the same records would be encoded in another way.
        kind = f"{type(self).__qualname__} 1"
        identity = json.dumps({"max_tokens": self.max_tokens, **self._identity()}, sort_keys=True)
        return fingerprint(kind, identity, tokenizer_fingerprint(self.tokenizer))

    def _identity(self) -> dict[str, Any]:
        """Return what decides about the columns beside the tokenizer and its limit."""
        raise NotImplementedError

    def __call__(self, records: Sequence[Any]) -> list[Columns | ValueError]:
        """Return the columns of each record; for a bad record the error in their place."""
        found = [self._or_error(record) for record in records]
        made = iter(self._encoded([one for one in found if not isinstance(one, ValueError)]))
        return [one if isinstance(one, ValueError) else next(made) for one in found]

    def _or_error(self, record: Any) -> Any:
        if isinstance(record, ValueError):
            return record
        try:
            return self._checked(record)
        except ValueError as error:
            return error

    def _checked(self, record: Mapping[str, Any]) -> Any:
        """Return what `_encoded` needs of a record; raise ValueError for a bad one."""
        raise NotImplementedError

    def _encoded(self, good: list[Any]) -> list[Columns]:
        """Return the columns of good records."""
        raise NotImplementedError

    def _tokenized(self, texts: Sequence[Any], **kwargs: Any) -> Any:
        if not texts:
            return {"input_ids": []}
        return self.tokenizer(
            texts,
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
            return_attention_mask=False,
            verbose=False,
            **kwargs,
        )


def _text(record: Mapping[str, Any], key: str) -> str:
    text = record.get(key)
    options.require(key in record, f'no "{key}"')
    options.require(isinstance(text, str), f'"{key}" is not text')
    options.require(bool(text.strip()), f'"{key}" is empty')  # type: ignore[union-attr]
    return options.check_text(text, f'"{key}"')  # type: ignore[arg-type]


class _Labels:
    """The numbers of labels.

    Args:
        names: In the order of their numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._text = [name for name in self.names if not _is_number(name)]

    def number(self, label: Any, key: str) -> int:
        """Return the number of a label; raise ValueError if it is not a known one."""
        name = _label_name(label)
        options.require(name is not None, f'"{key}" is {label!r}, neither text nor an integer')
        if isinstance(label, int) and self._text:
            known = _listed(self._text)
            raise ValueError(f'"{key}" is {label!r}, a number, and other labels are text: {known}')
        if name not in self._numbers:
            known = _listed(self.names)
            raise ValueError(f'"{key}" is {label!r}, which no training record has: {known}')
        return self._numbers[name]


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@dataclass(eq=False)
class LabeledTexts(_Encoder):
    """Encode `{"text": ..., "label": ...}`, or pairs with a `text_pair` beside the text.

    Columns are `input`, `token_type_ids` if the tokenizer makes them, and `labels` with one number.

    Args:
        tokenizer: The tokenizer; its special tokens are added.
        labels: Names of the labels, such as of `label_names`.
        max_tokens: Largest number of tokens; longer texts lose their end, of a pair the longer one
            first. None: no limit.
        text_key: Field of the text.
        pair_key: Field of the second text of a pair.
        label_key: Field of the label, a name or an integer.
    """

    labels: Sequence[str]
    _: KW_ONLY
    text_key: str = "text"
    pair_key: str = "text_pair"
    label_key: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._labels = _Labels(self.labels)

    def _identity(self) -> dict[str, Any]:
        keys = (self.text_key, self.pair_key, self.label_key)
        return {"labels": self._labels.names, "keys": keys}

    def _checked(self, record: Mapping[str, Any]) -> tuple[str, str | None, int]:
        options.require(self.label_key in record, f'no "{self.label_key}"')
        pair = None if record.get(self.pair_key) is None else _text(record, self.pair_key)
        number = self._labels.number(record[self.label_key], self.label_key)
        return _text(record, self.text_key), pair, number

    def _encoded(self, good: list[tuple[str, str | None, int]]) -> list[Columns]:
        rows: dict[int, Columns] = {}
        for paired in (False, True):
            chosen = [n for n, (_, pair, _) in enumerate(good) if (pair is not None) == paired]
            texts = [good[n][0] for n in chosen]
            pairs = {"text_pair": [good[n][1] for n in chosen]} if paired and chosen else {}
            made = self._tokenized(texts, **pairs)
            types = made.get("token_type_ids")
            for i, n in enumerate(chosen):
                rows[n] = {"input": made["input_ids"][i], "labels": [good[n][2]]}
                if types is not None:
                    rows[n]["token_type_ids"] = types[i]
        return [rows[n] for n in range(len(good))]


@dataclass(eq=False)
class LabeledTokens(_Encoder):
    """Encode `{"tokens": [...], "tags": [...]}`: a text in words, and a label for each of them.

    The first token that the tokenizer makes of a word has the word's label; its other tokens, and
    special ones, have `ignore_index`. Columns are `input` and `labels`, equally long.

    Args:
        tokenizer: A fast tokenizer; its special tokens are added.
        labels: Names of the labels, such as of `label_names`.
        max_tokens: Largest number of tokens; longer texts lose their end. None: no limit.
        tokens_key: Field of the words.
        tags_key: Field of their labels.
        ignore_index: Label of what is excluded from the loss.
    """

    labels: Sequence[str]
    _: KW_ONLY
    tokens_key: str = "tokens"
    tags_key: str = "tags"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: a {type(self.tokenizer).__name__} does not tell which word a token is "
                f"of; use a fast tokenizer, one with a tokenizer.json"
            )
        super().__post_init__()
        self._labels = _Labels(self.labels)

    def _identity(self) -> dict[str, Any]:
        keys = (self.tokens_key, self.tags_key)
        return {"labels": self._labels.names, "keys": keys, "ignored": self.ignore_index}

    def _checked(self, record: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        for key in (self.tokens_key, self.tags_key):
            options.require(key in record, f'no "{key}"')
            options.require(isinstance(record[key], list), f'"{key}" is not a list')
        words, tags = record[self.tokens_key], record[self.tags_key]
        are_words = bool(words) and all(isinstance(word, str) for word in words)
        options.require(are_words, f'"{self.tokens_key}" is not a list of words')
        options.require(len(words) == len(tags), f"{len(tags)} tags for {len(words)} tokens")
        return words, [self._labels.number(tag, self.tags_key) for tag in tags]

    def _encoded(self, good: list[tuple[list[str], list[int]]]) -> list[Columns]:
        made = self._tokenized([words for words, _ in good], is_split_into_words=True)
        found = []
        for row, (_, numbers) in enumerate(good):
            labels, before = [], None
            for word in made.word_ids(row):
                first = word is not None and word != before
                labels.append(numbers[word] if first else self.ignore_index)
                before = word
            found.append({"input": made["input_ids"][row], "labels": labels})
        return found


@dataclass(eq=False)
class TextPairs(_Encoder):
    """Encode pairs of texts that belong together, `{"anchor": ..., "positive": ...}`.

    Columns are `anchor`, `positive`, with `negatives` also `negative`, and `labels`, a 0.

    Args:
        tokenizer: The tokenizer; its special tokens are added.
        max_tokens: Largest number of tokens of each text; longer ones lose their end. None: no
            limit.
        anchor_key: Field of the text that is searched with; None: `anchor`, or `query`.
        positive_key: Field of the text that it should find.
        negative_key: Field of a text that it should not find.
        negatives: Whether records have a `negative_key`: all of them, or none.
    """

    _: KW_ONLY
    anchor_key: str | None = None
    positive_key: str = "positive"
    negative_key: str = "negative"
    negatives: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._others = [self.positive_key, *([self.negative_key] if self.negatives else [])]

    def _identity(self) -> dict[str, Any]:
        return {"anchor": self.anchor_key, "others": self._others}

    def _checked(self, record: Mapping[str, Any]) -> list[str]:
        key = self.anchor_key or ("anchor" if "anchor" in record else "query")
        if self.anchor_key is None:
            options.require(key in record, 'no "anchor" or "query"')
        text = (
            f'there is a "{self.negative_key}": write data.negatives=true if all records have one'
        )
        options.require(self.negatives or record.get(self.negative_key) is None, text)
        return [_text(record, name) for name in (key, *self._others)]

    def _encoded(self, good: list[list[str]]) -> list[Columns]:
        found: list[Columns] = [{"labels": [0]} for _ in good]
        for n, name in enumerate(("anchor", "positive", "negative")[: 1 + len(self._others)]):
            made = self._tokenized([texts[n] for texts in good])["input_ids"]
            for columns, ids in zip(found, made, strict=True):
                columns[name] = ids
        return found


@dataclass(eq=False)
class PlainTexts(_Encoder):
    """Encode `{"text": ...}` for `MaskedTokens`: columns `input`, and `labels` that are the same.

    Args:
        tokenizer: The tokenizer; its special tokens are added.
        max_tokens: Largest number of tokens; longer texts lose their end. None: no limit.
        text_key: Field of the text.
    """

    _: KW_ONLY
    text_key: str = "text"

    def _identity(self) -> dict[str, Any]:
        return {"key": self.text_key}

    def _checked(self, record: Mapping[str, Any]) -> str:
        return _text(record, self.text_key)

    def _encoded(self, good: list[str]) -> list[Columns]:
        made = self._tokenized(good)["input_ids"]
        return [{"input": ids, "labels": list(ids)} for ids in made]
