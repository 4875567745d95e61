"""Records that say themselves which of their tokens are learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Keys of a record of token ids; the last may be missing.
TOKENIZED_KEYS = ("input_ids", "labels", "attention_mask")
#: Key of a list of objects with a `text` and a `label`, true where it is learnt (axolotl's).
SEGMENTS_KEY = "segments"
_NOT_LEARNT = -100


def labelled(ids: list[int], record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Return ids and which are learnt `[tokens]`, by the record's `labels` and `attention_mask`.

    Labels are the ids themselves, not shifted, or -100; what the mask holds 0 for is left out.

    Raises `ValueError` for lists of another length, and for other labels.
    """
    labels, mask = record["labels"], record.get("attention_mask")
    for name, values in (("labels", labels), ("attention_mask", ids if mask is None else mask)):
        if not isinstance(values, list) or len(values) != len(ids):
            raise ValueError(f'"{name}" is not a list as long as "input_ids" ({len(ids)})')
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, _NOT_LEARNT):
            raise ValueError(
                f'"labels" holds {label!r} at {i}, where "input_ids" holds {token}: labels are the '
                f"ids themselves, not shifted, or {_NOT_LEARNT} where they are not learnt"
            )
    seen = [i for i in range(len(ids)) if mask is None or mask[i]]
    return [ids[i] for i in seen], [labels[i] != _NOT_LEARNT for i in seen]


def segmented(
    record: Mapping[str, Any], tokenize: Callable[[list[str]], list[list[int]]]
) -> tuple[list[int], list[bool]]:
    """Return ids and which are learnt `[tokens]` of segments, which are tokenized apart.

    Raises `ValueError` for segments without a text or a label.
    """
    segments = record[SEGMENTS_KEY]
    if not isinstance(segments, list) or not all(map(_is_segment, segments)):
        raise ValueError(f'"{SEGMENTS_KEY}" must be a list of objects with a text and a label')
    parts = tokenize([segment["text"] for segment in segments])
    pairs = list(zip(segments, parts, strict=True))
    learnt = [segment["label"] for segment, ids in pairs for _ in ids]
    return [i for ids in parts for i in ids], learnt


def _is_segment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and isinstance(value.get("label"), bool)
    )
