"""Megatron's ways to name a blend of data: as a mixture of shards with the same documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ditty_di.data import options
from ditty_di.data.reading.remote import is_url
from ditty_di.data.sampling.mixture import Mixture
from ditty_di.data.shards.dataset import Shards
from ditty_di.data.shards.find import shard_file

SPLITS = ("train", "validation", "test")


class _Part(NamedTuple):
    path: str
    weight: float | str | None  # None: by its number of rows
    documents: tuple[float, float]  # from and to, as fractions


def megatron_blend(
    blend: Any, seq_len: int, split: str = "train", *, ranges: str = "969,30,1", **options_: Any
) -> Mixture:
    """Return a mixture of Megatron's `.bin`/`.idx`, named as Megatron or dolomite-engine do.

    | blend | documents |
    | --- | --- |
    | `prefix` | one path; `ranges` cuts its documents into the splits |
    | `[prefix, prefix]` | several, each row once an epoch; cut likewise |
    | `[0.3, prefix, 0.7, prefix]` | weighted; cut likewise |
    | `{train: ..., validation: ...}` | each split is one of the above, uncut |
    | `[{name: [{path, split: 0:0.9, weight}, ...]}]` | a weighted split group: parts of documents |

    Args:
        blend: One of the above.
        seq_len: Length of a row, in tokens.
        split: `train`, `validation` or `test`.
        ranges: Relative numbers of documents of the three splits.
        options_: Further arguments of `Shards`.

    Raises:
        FileNotFoundError: A prefix without `.bin` and `.idx`.
        ValueError: A blend of another form, or one without the split.
    """
    options.one_of(SPLITS, split=split)
    sources: dict[str, Shards] = {}
    ratios: dict[str, float | str] = {}
    parts = _parts(blend, split, _cut(ranges, split))
    for part in parts:
        path = Path(part.path).expanduser()
        name = path.name
        while name in sources:
            name += "'"
        sources[name] = Shards([shard_file(path, between=part.documents)], seq_len, **options_)
        if part.weight is not None:
            ratios[name] = part.weight
    return Mixture(sources, ratios if len(parts) > 1 and ratios else None)


def _cut(ranges: str, split: str) -> tuple[float, float]:
    """Return the first and last document of a split, as fractions."""
    numbers = [float(number) for number in ranges.split(",")]
    whole = sum(numbers)
    fine = 0 < len(numbers) <= len(SPLITS) and min(numbers) >= 0 < whole
    options.require(fine, f"ranges={ranges!r} must be up to three numbers, such as 969,30,1")
    ends = [0.0, *accumulate(number / whole for number in numbers), *[1.0] * len(SPLITS)]
    at = SPLITS.index(split)
    options.require(ends[at] < ends[at + 1], f"ranges={ranges!r} leave no {split} documents")
    return ends[at], ends[at + 1]


def _parts(blend: Any, split: str, cut: tuple[float, float]) -> list[_Part]:
    if isinstance(blend, str | Path):
        text = f"{blend}: a blend is of files on this machine; data=mixed mixes folders of shards"
        options.require(not is_url(blend), text)
        return [_Part(str(blend), None, cut)]
    if isinstance(blend, Mapping):
        named = {
            {"valid": "validation", "val": "validation"}.get(k, k): v for k, v in blend.items()
        }
        if named.get(split) is None:
            raise ValueError(f"the blend has no split {split!r}: it has {[*blend]}")
        return _parts(named[split], split, (0.0, 1.0))
    if not isinstance(blend, Sequence) or not blend:
        raise ValueError(f"not a blend: {blend!r:.80}; see ditty_di.data.megatron_blend")
    if isinstance(blend[0], Mapping):
        groups = [group for named in blend for group in named.values()]
        options.require(len(groups) == 1, f"{len(groups)} groups: pass each as a blend of its own")
        return [_Part(d["path"], d["weight"], _range(d.get("split", "0:1"))) for d in groups[0]]
    weights = [_number(weight) for weight in blend[::2]]
    if len(blend) % 2 == 0 and all(weight is not None for weight in weights):
        pairs = zip(weights, blend[1::2], strict=True)
        return [_Part(str(path), weight, cut) for weight, path in pairs]
    return [_Part(str(path), None, cut) for path in blend]


def _range(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    return float(first), float(last)


def _number(value: Any) -> float | str | None:
    """Return a weight as it is written; None for what is a path."""
    try:
        float(value)
    except (TypeError, ValueError):
        return None
    return value
