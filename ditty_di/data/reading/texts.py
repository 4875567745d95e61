"""Text for a tokenizer that is trained on examples, and what rows take from a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any


class RecordTexts(Sequence[str]):
    """Every text in the fields of records, in order; read when it is first needed.

    Args:
        records: pairs of a record's origin and the record, such as `ditty_di.data.RecordDataset`.
    """

    def __init__(self, records: Iterable[tuple[str, Any]]) -> None:
        self._records = records

    @cached_property
    def _texts(self) -> list[str]:
        return [text for _, record in self._records for text in _texts(record)]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index]


def record_texts(records: Iterable[tuple[str, Any]]) -> RecordTexts:
    """Return every text in the fields of records, as documents to train a tokenizer on."""
    return RecordTexts(records)


def pad_id(tokenizer: Any) -> int | None:
    """Return the id of the tokenizer's padding token; None when it has none."""
    found: int | None = tokenizer.pad_token_id
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
