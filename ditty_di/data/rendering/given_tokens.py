"""Records that contain their own loss mask: token ids with labels or masks, and segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ditty_di.data.options import require

#: Keys of the labels and of TRL's masks; all may be missing.
MASK_KEYS = ("labels", "completion_mask", "assistant_masks")
#: Keys of a record of token ids; all but the first may be missing.
TOKENIZED_KEYS = ("input_ids", *MASK_KEYS, "attention_mask")
#: Key of a list of objects with a `text` and a `label`, true where it is in the loss (axolotl's).
SEGMENTS_KEY = "segments"
_IGNORED = -100


def labeled(ids: list[int], record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Return token ids and the loss mask `[tokens]`, by the record's `labels` and masks.

    Without labels all tokens are in the loss. Tokens whose `attention_mask` is 0 are left out,
    those where another mask is 0 are excluded from the loss.

    Args:
        ids: Token ids.
        record: The record.

    Raises:
        ValueError: Lists of another length, other values than 0 and 1 in a mask, or labels that are
            neither the ids themselves, not shifted, nor -100.
    """
    given = {key: record[key] for key in TOKENIZED_KEYS[1:] if record.get(key) is not None}
    for name, values in given.items():
        as_long = isinstance(values, list) and len(values) == len(ids)
        require(as_long, f'"{name}" is not a list as long as "input_ids" ({len(ids)})')
        binary = name == "labels" or all(value in (0, 1) for value in values)
        require(binary, f'"{name}" holds other values than 0 and 1')
    labels = given.pop("labels", ids)
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, _IGNORED):
            raise ValueError(
                f'"labels" holds {label!r} at {i}, where "input_ids" holds {token}: labels are the '
                f"ids themselves, not shifted, or {_IGNORED} where they are excluded from the loss"
            )
    attended = given.pop("attention_mask", [1] * len(ids))
    kept = [i for i in range(len(ids)) if attended[i]]
    mask = [labels[i] != _IGNORED and all(m[i] for m in given.values()) for i in kept]
    return [ids[i] for i in kept], mask


def segmented(
    record: Mapping[str, Any], tokenize: Callable[[list[str]], list[list[int]]]
) -> tuple[list[int], list[bool]]:
    """Return token ids and the loss mask `[tokens]` of segments, which are tokenized apart.

    Args:
        record: The record.
        tokenize: Returns the token ids of each text.

    Raises:
        ValueError: Segments without a text or a label.
    """
    segments = record[SEGMENTS_KEY]
    require(
        isinstance(segments, list) and all(map(_is_segment, segments)),
        f'"{SEGMENTS_KEY}" must be a list of objects with a text and a label',
    )
    parts = tokenize([segment["text"] for segment in segments])
    pairs = list(zip(segments, parts, strict=True))
    mask = [segment["label"] for segment, ids in pairs for _ in ids]
    return [i for ids in parts for i in ids], mask


def _is_segment(value: Any) -> bool:
    has_text = isinstance(value, dict) and isinstance(value.get("text"), str)
    return has_text and isinstance(value.get("label"), bool)
