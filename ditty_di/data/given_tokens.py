"""Records that say themselves which of their tokens are learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Keys that say which ids are learnt: the labels, and TRL's masks; all may be missing.
LEARNT_KEYS = ("labels", "completion_mask", "assistant_masks")
#: Keys of a record of token ids; all but the first may be missing.
TOKENIZED_KEYS = ("input_ids", *LEARNT_KEYS, "attention_mask")
#: Key of a list of objects with a `text` and a `label`, true where it is learnt (axolotl's).
SEGMENTS_KEY = "segments"
_NOT_LEARNT = -100


def labelled(ids: list[int], record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Return ids and which are learnt `[tokens]`, by the record's `labels` and masks.

    Labels are the ids themselves, not shifted, or -100; without them all ids are. What the
    `attention_mask` holds 0 for is left out, what another mask does is not learnt.

    Raises `ValueError` for lists of another length, and for other labels.
    """
    given = {key: record[key] for key in TOKENIZED_KEYS[1:] if record.get(key) is not None}
    for name, values in given.items():
        if not isinstance(values, list) or len(values) != len(ids):
            raise ValueError(f'"{name}" is not a list as long as "input_ids" ({len(ids)})')
        if name != "labels" and any(value not in (0, 1) for value in values):
            raise ValueError(f'"{name}" holds other values than 0 and 1')
    labels = given.pop("labels", ids)
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, _NOT_LEARNT):
            raise ValueError(
                f'"labels" holds {label!r} at {i}, where "input_ids" holds {token}: labels are the '
                f"ids themselves, not shifted, or {_NOT_LEARNT} where they are not learnt"
            )
    mask = given.pop("attention_mask", None)
    seen = [i for i in range(len(ids)) if mask is None or mask[i]]
    learnt = [labels[i] != _NOT_LEARNT and all(m[i] for m in given.values()) for i in seen]
    return [ids[i] for i in seen], learnt


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
