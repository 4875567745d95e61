"""Tiny models, whole and with adapters, and their tokenizer."""

import pytest

from tests.export import cases
from tests.tasks.conftest import build, checkpoint, initial, tokenizer

__all__ = ["build", "checkpoint", "initial", "tokenizer"]


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory):
    """The folder of a published base."""
    return cases.llama(tmp_path_factory.mktemp("llama") / "base", tokenizer)


@pytest.fixture(scope="session")
def t5(tokenizer, tmp_path_factory):
    return cases.t5(tmp_path_factory.mktemp("t5") / "base", tokenizer)
