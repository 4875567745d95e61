"""What the package carries so that fine-tuning works at once, without network."""

from __future__ import annotations

from pathlib import Path


def base() -> str:
    """The folder of a small pretrained Llama with its tokenizer; its README says how it is made."""
    return str(Path(__file__).parent / "base")
