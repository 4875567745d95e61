"""A tokenizer that is loaded when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ditty_di.models.tokenizer import from_pretrained


class TokenizerFactory:
    """Load one tokenizer, once: every caller of `build` gets the same object.

    A tokenizer without a pad token stays so. Batches are padded and masked by position; EOS in
    place of a pad token would be masked by collators that mask by its id.

    Args:
        load: returns the tokenizer.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load = cache(load)

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> TokenizerFactory:
        """Return a factory for the tokenizer of a folder or of the hub.

        Args:
            path: a folder, or the id of a repository.
            **options: of `ditty_di.models.tokenizer.from_pretrained`: `revision`,
                `special_tokens`, `chat_template`, `model_max_length`.
        """
        return cls(partial(from_pretrained, path, **options))

    @classmethod
    def from_instance(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFactory:
        """Return a factory for a tokenizer that is loaded.

        Args:
            tokenizer: the tokenizer.
        """
        return cls(lambda: tokenizer)

    def build(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ValueError: there is no such tokenizer, or it has no end-of-sequence token.
        """
        return self._load()
