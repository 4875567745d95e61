"""Check the arguments of a pretrained model before it is built."""

from __future__ import annotations

from typing import Any

from ditty_di.models.files import ModelFiles


def validate_pretrained(
    *,
    path: Any = None,
    revision: str | None = None,
    dtype: str = "float32",
    pad_vocab_to_multiple_of: int | None = None,
) -> None:
    """Raise ValueError for a folder that does not exist, and values that no model is built with."""
    from ditty_di.models._hugging_face import validate

    if isinstance(path, str):
        try:
            ModelFiles(path, revision)
        except FileNotFoundError as error:
            raise ValueError(
                f"path={path}: {error}; write a folder that save_pretrained wrote, or the hub's "
                "user/name"
            ) from error
    validate(dtype=dtype, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)
