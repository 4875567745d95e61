"""Documents, tokenizer, token rows and the loader: everything between text and micro-batches.

Importing this package imports neither torch nor transformers.
"""

from ditty_di.data.corpus import (
    Corpus,
    python_docs,
    text_files,
    train_documents,
    validation_documents,
)
from ditty_di.data.loader import Loader, horizon
from ditty_di.data.tokenizer import train_bpe
from ditty_di.data.tokens import TokenDataset, tokenize, unigram_entropy

__all__ = [
    "Corpus",
    "Loader",
    "TokenDataset",
    "horizon",
    "python_docs",
    "text_files",
    "tokenize",
    "train_bpe",
    "train_documents",
    "unigram_entropy",
    "validation_documents",
]
