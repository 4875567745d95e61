"""A tokenizer that is read when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerFactory:
    """Builds one tokenizer, once: everybody who asks gets the same object.

    A tokenizer without a pad token stays so. Batches are padded and masked by place, and EOS in the
    place of a pad token would be masked by collators that go by its id.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load = load
        self._built: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> TokenizerFactory:
        """Of a folder or the hub. `options`, as of `ditty_di.models.tokenizer.from_pretrained`:
        `revision`, `special_tokens`, `chat_template`, `model_max_length`."""
        from ditty_di.models.tokenizer import from_pretrained

        return cls(partial(from_pretrained, path, **options))

    @classmethod
    def from_instance(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFactory:
        return cls(lambda: tokenizer)

    def build(self) -> PreTrainedTokenizerBase:
        """
        Raises:
            ValueError: there is no such tokenizer, or it has no end-of-sequence token.
        """
        if self._built is None:
            self._built = self._load()
        return self._built
