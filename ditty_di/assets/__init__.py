"""Files in the package, so that fine-tuning works without a network."""

from __future__ import annotations

from pathlib import Path


def base() -> str:
    """Return the folder of a small pretrained Llama with its tokenizer (see its README)."""
    return str(Path(__file__).parent / "base")
