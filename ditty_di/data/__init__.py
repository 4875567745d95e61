"""Data: corpora, datasets of records, tokenization, packing, collate functions and the loader."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the types of the lazy exports below
    from ditty_di.data.collate import (
        CausalCollate,
        PackedCollate,
        PaddedCollate,
        PaddingFreeCollate,
        Seq2SeqCollate,
        decoder_start_token_id,
    )
    from ditty_di.data.corpus import Corpus, text_files, train_documents, validation_documents
    from ditty_di.data.file_cache import FileCache
    from ditty_di.data.keyed import KeyedSampler
    from ditty_di.data.loader import Loader, training_steps
    from ditty_di.data.mixture import Mixture, MixtureSampler
    from ditty_di.data.operations import prepare
    from ditty_di.data.packing import PackedDataset
    from ditty_di.data.pooled import PooledSampler
    from ditty_di.data.python_code import docstring_pairs, held_out_module, python_docs
    from ditty_di.data.renderer import Renderer
    from ditty_di.data.rows import held_out_rows, training_rows
    from ditty_di.data.sampler import LengthGroupedSampler, Sampler
    from ditty_di.data.shards.blends import megatron_blend
    from ditty_di.data.shards.dataset import Shards, ShardsCollate
    from ditty_di.data.shards.fim import FillInTheMiddle
    from ditty_di.data.sources import RecordDataset, in_memory, records, synthetic
    from ditty_di.data.stream import Streamed
    from ditty_di.data.stream_loader import StreamLoader
    from ditty_di.data.stream_mixture import StreamMixture
    from ditty_di.data.stream_source import iterable_dataset
    from ditty_di.data.stream_text import StreamedText, StreamSample, first_rows
    from ditty_di.data.texts import pad_id, record_texts
    from ditty_di.data.token_budget import TokenBudgetDataset
    from ditty_di.data.tokenized import (
        TokenizedDataset,
        TokenizedSeq2SeqDataset,
        label_tokens,
        prompts,
    )
    from ditty_di.data.tokenizer import train_bpe, train_unigram
    from ditty_di.data.tokens import TokenDataset, tokenize, unigram_entropy
    from ditty_di.data.weighted import WeightedSampler

# Imported on first use: a process that tokenizes needs no torch.
_EXPORTS = {
    "CausalCollate": "collate",
    "Corpus": "corpus",
    "FileCache": "file_cache",
    "FillInTheMiddle": "shards.fim",
    "KeyedSampler": "keyed",
    "LengthGroupedSampler": "sampler",
    "Loader": "loader",
    "Mixture": "mixture",
    "MixtureSampler": "mixture",
    "PackedCollate": "collate",
    "PackedDataset": "packing",
    "PaddedCollate": "collate",
    "PaddingFreeCollate": "collate",
    "PooledSampler": "pooled",
    "RecordDataset": "sources",
    "Renderer": "renderer",
    "Sampler": "sampler",
    "Seq2SeqCollate": "collate",
    "Shards": "shards.dataset",
    "ShardsCollate": "shards.dataset",
    "StreamLoader": "stream_loader",
    "StreamMixture": "stream_mixture",
    "StreamSample": "stream_text",
    "Streamed": "stream",
    "StreamedText": "stream_text",
    "TokenBudgetDataset": "token_budget",
    "TokenDataset": "tokens",
    "TokenizedDataset": "tokenized",
    "TokenizedSeq2SeqDataset": "tokenized",
    "WeightedSampler": "weighted",
    "decoder_start_token_id": "collate",
    "docstring_pairs": "python_code",
    "first_rows": "stream_text",
    "held_out_module": "python_code",
    "held_out_rows": "rows",
    "in_memory": "sources",
    "iterable_dataset": "stream_source",
    "label_tokens": "tokenized",
    "megatron_blend": "shards.blends",
    "pad_id": "texts",
    "prepare": "operations",
    "prompts": "tokenized",
    "python_docs": "python_code",
    "record_texts": "texts",
    "records": "sources",
    "synthetic": "sources",
    "text_files": "corpus",
    "tokenize": "tokens",
    "train_bpe": "tokenizer",
    "train_documents": "corpus",
    "train_unigram": "tokenizer",
    "training_rows": "rows",
    "training_steps": "loader",
    "unigram_entropy": "tokens",
    "validation_documents": "corpus",
}

__all__ = [
    "CausalCollate",
    "Corpus",
    "FileCache",
    "FillInTheMiddle",
    "KeyedSampler",
    "LengthGroupedSampler",
    "Loader",
    "Mixture",
    "MixtureSampler",
    "PackedCollate",
    "PackedDataset",
    "PaddedCollate",
    "PaddingFreeCollate",
    "PooledSampler",
    "RecordDataset",
    "Renderer",
    "Sampler",
    "Seq2SeqCollate",
    "Shards",
    "ShardsCollate",
    "StreamLoader",
    "StreamMixture",
    "StreamSample",
    "Streamed",
    "StreamedText",
    "TokenBudgetDataset",
    "TokenDataset",
    "TokenizedDataset",
    "TokenizedSeq2SeqDataset",
    "WeightedSampler",
    "decoder_start_token_id",
    "docstring_pairs",
    "first_rows",
    "held_out_module",
    "held_out_rows",
    "in_memory",
    "iterable_dataset",
    "label_tokens",
    "megatron_blend",
    "pad_id",
    "prepare",
    "prompts",
    "python_docs",
    "record_texts",
    "records",
    "synthetic",
    "text_files",
    "tokenize",
    "train_bpe",
    "train_documents",
    "train_unigram",
    "training_rows",
    "training_steps",
    "unigram_entropy",
    "validation_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
