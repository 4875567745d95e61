"""Data: corpora, datasets of records, tokenization, packing, collate functions and the loader."""

from ditty_di.data.collate import (
    PackedCollate,
    PaddedCollate,
    PaddingFreeCollate,
    Seq2SeqCollate,
    decoder_start_token_id,
)
from ditty_di.data.corpus import Corpus, text_files, train_documents, validation_documents
from ditty_di.data.encoding import Encoder
from ditty_di.data.examples import Examples, Seq2SeqExamples, label_tokens, prompts
from ditty_di.data.loader import Loader, horizon
from ditty_di.data.order import LengthGrouped, Order
from ditty_di.data.packing import Packed
from ditty_di.data.python_code import docstring_pairs, held_out_module, python_docs
from ditty_di.data.rows import held_out_rows, training_rows
from ditty_di.data.sources import Records, in_memory, records, synthetic
from ditty_di.data.texts import pad_id, record_texts
from ditty_di.data.tokenizer import train_bpe
from ditty_di.data.tokens import TokenDataset, tokenize, unigram_entropy

__all__ = [
    "Corpus",
    "Encoder",
    "Examples",
    "LengthGrouped",
    "Loader",
    "Order",
    "Packed",
    "PackedCollate",
    "PaddedCollate",
    "PaddingFreeCollate",
    "Records",
    "Seq2SeqCollate",
    "Seq2SeqExamples",
    "TokenDataset",
    "decoder_start_token_id",
    "docstring_pairs",
    "held_out_module",
    "held_out_rows",
    "horizon",
    "in_memory",
    "label_tokens",
    "pad_id",
    "prompts",
    "python_docs",
    "record_texts",
    "records",
    "synthetic",
    "text_files",
    "tokenize",
    "train_bpe",
    "train_documents",
    "training_rows",
    "unigram_entropy",
    "validation_documents",
]
