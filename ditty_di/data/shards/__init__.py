"""Shards: tokenized text in files that many machines write and read."""

from ditty_di.data.shards.manifest import Manifest, Shard
from ditty_di.data.shards.megatron import IndexWriter, MegatronIndex, token_dtype, write_index

__all__ = ["IndexWriter", "Manifest", "MegatronIndex", "Shard", "token_dtype", "write_index"]
