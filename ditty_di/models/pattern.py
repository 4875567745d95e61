"""The kinds of a model's layers from a short pattern, such as `DDDA`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ditty_di.protocols import early_checks

#: Letters for the `layer_types` of transformers: A attention, S attention within a sliding window,
#: D delta rule and M Mamba (both linear attention), C short convolution; Nemotron-H also has blocks
#: of E experts and F a feed-forward layer alone.
LAYER_TYPES: Mapping[str, str] = {
    "A": "full_attention",
    "S": "sliding_attention",
    "D": "linear_attention",
    "M": "linear_attention",
    "C": "conv",
    "E": "moe",
    "F": "mlp",
}


def _validate(
    *, pattern: Any = None, num_hidden_layers: Any = None, kinds: Any = LAYER_TYPES
) -> None:
    if isinstance(pattern, str) and isinstance(kinds, Mapping):
        letters = _letters(pattern, kinds)
        if isinstance(num_hidden_layers, int) and num_hidden_layers % len(letters):
            fitting = max(1, num_hidden_layers // len(letters)) * len(letters)
            raise ValueError(
                f"pattern={pattern}: {len(letters)} layers, and num_hidden_layers="
                f"{num_hidden_layers} is not a multiple; write num_hidden_layers={fitting}, or a "
                f"pattern of all {num_hidden_layers}"
            )


@early_checks(validate=_validate)
def layer_kinds(
    pattern: str, *, num_hidden_layers: int, kinds: Mapping[str, str] = LAYER_TYPES
) -> list[str]:
    """Return the kind of each layer; the pattern repeats over the layers.

    Args:
        pattern: a letter for each layer; a number before a letter repeats it. `DDDA` and `3DA` are
            three layers of the delta rule, then one of attention.
        num_hidden_layers: number of layers, a multiple of the pattern's.
        kinds: what each letter stands for; `{K: own, S: shared}` for the `key_value_layers` of
            `ditty_di.models.cross_layer`.

    Raises:
        ValueError: an unknown letter, or a number of layers that is not a multiple.
    """
    _validate(pattern=pattern, num_hidden_layers=num_hidden_layers, kinds=kinds)
    letters = _letters(pattern, kinds)
    return [kinds[letter] for letter in letters] * (num_hidden_layers // len(letters))


def _letters(pattern: str, kinds: Mapping[str, str]) -> str:
    """Return the pattern with numbers written out."""
    known = ", ".join(f"{letter} ({kind})" for letter, kind in kinds.items())
    if not re.fullmatch(r"(\d*[A-Za-z])+", pattern):
        raise ValueError(
            f"pattern={pattern!r}: write letters, each with a number before it or without, such as "
            f"3DA; the letters are {known}"
        )
    found = [(int(n or 1), letter) for n, letter in re.findall(r"(\d*)([A-Za-z])", pattern)]
    if unknown := [letter for _, letter in found if letter not in kinds]:
        raise ValueError(f"pattern={pattern}: unknown letter {unknown[0]}; write {known}")
    letters = "".join(number * letter for number, letter in found)
    if not letters:
        raise ValueError(f"pattern={pattern}: no layers; the letters are {known}")
    return letters
