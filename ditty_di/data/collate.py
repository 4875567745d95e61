"""Collate functions: rows of different lengths to one micro-batch `(inputs, labels)`.

A row is `({"input": ids [length]}, labels [length])`. These are picklable objects, for workers.
They accept None in place of a row (`pads_rows`): the loader completes the last micro-batch of an
epoch with it, and it becomes padding without a label, or nothing at all. The input `source` of a
row of a mixture is kept: `[rows]`, or that of each token where rows become one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditty_di.data.options import require
from ditty_di.protocols import LoadedBatch

_POSITIONS = "-> input:2:i64, position_ids:2:i64{} | ctx.target:2:i64"
_ENCODER = "-> input:2:i64, attention_mask:2:i64 | ctx.target:{}:i64"
_VARLEN = ", cu_seq_lens_q:1:i32, cu_seq_lens_k:1:i32, max_length_q:0:i64, max_length_k:0:i64"


@dataclass(frozen=True)
class PaddedCollate:
    """Pad rows on the right to the longest: `input` and labels `[rows, longest]`.

    There is no attention mask: in a causal model no token attends to the padding after it, and the
    padding's labels are `ignore_index`, by position and not by id.

    Args:
        pad_id: Id of the padding, which may be any id, also EOS; None: 0.
        ignore_index: Label of the padding, excluded from the loss.
        pad_to_multiple_of: Round the length up to a multiple of this, in tokens.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    pads_rows = True
    contract = "-> input:2:i64 | ctx.target:2:i64"

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        number, given = _given(rows)
        length = _padded_length([len(labels) for _, labels in given], self.pad_to_multiple_of)
        inputs = _padded([row["input"] for row, _ in given], number, length, self.pad_id or 0)
        labels = _padded([labels for _, labels in given], number, length, self.ignore_index)
        return {"input": inputs, **_sources(given, number)}, labels


class ByArguments:
    """Base of the collate functions with a contract that depends on their arguments."""

    contract_for: Callable[..., str]

    @property
    def contract(self) -> str:
        """The contract of a micro-batch."""
        return self.contract_for(**vars(self))


class _Documents(ByArguments):
    """Base of the collate functions whose batches separate documents by their positions."""

    #: The model is tested before training: documents of a row must not attend to each other.
    packs_documents = True

    @classmethod
    def contract_for(cls, *, varlen: bool = True, **_: Any) -> str:
        """Return the contract of a collate function with these arguments."""
        return _POSITIONS.format(_VARLEN if varlen else "")


@dataclass(frozen=True)
class PaddingFreeCollate(_Documents):
    """Concatenate rows without any padding: every tensor is `[1, total]`.

    `position_ids` restart at 0 in each row, by which transformers' attention keeps them apart as
    long as there is no attention mask and no cache (`use_cache=False`).

    Args:
        pad_id: Id of the one token of a batch without rows; None: 0.
        ignore_index: Its label, excluded from the loss.
        varlen: Add the arguments of flash attention (`varlen_arguments`); other attentions ignore
            them.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    varlen: bool = True
    pads_rows = True

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        _, given = _given(rows)
        if not given:  # a rank without rows still takes part in the forward pass
            pad, label = torch.tensor([self.pad_id or 0]), torch.tensor([self.ignore_index])
            given = [({"input": pad}, label)]
        inputs = {
            "input": torch.cat([row["input"] for row, _ in given])[None],  # [1, total]
            "position_ids": torch.cat([torch.arange(len(labels)) for _, labels in given])[None],
        }
        if self.varlen:
            inputs |= varlen_arguments(inputs["position_ids"])
        if all("source" in row for row, _ in given):
            of_tokens = [torch.full_like(labels, int(row["source"])) for row, labels in given]
            inputs["source"] = torch.cat(of_tokens)[None]
        return inputs, torch.cat([labels for _, labels in given])[None]


@dataclass(frozen=True)
class CausalCollate:
    """Collate tokenized rows for a causal language model: each token's label is the next token.

    Reads `input_ids`, and if there are such columns: `labels`, a copy of them with `ignore_index`
    where there is no loss, and `attention_mask`, whose zeros (padding by the tokenizer) are left
    out. Rows are padded as by `PaddedCollate`, and masked by position, not by id.

    Args:
        pad_id: Id of the padding; None: 0.
        ignore_index: Label of what is excluded from the loss.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    columns = ("input_ids", "labels", "attention_mask")
    contract = "-> input:2:i64 | ctx.target:2:i64"
    pads_rows = True

    def __call__(self, rows: list[Mapping[str, Any] | None]) -> LoadedBatch:
        """Collate rows.

        Args:
            rows: Of one micro-batch; None is a padding row.
        """
        pad = PaddedCollate(pad_id=self.pad_id, ignore_index=self.ignore_index)
        return pad([None if row is None else _shifted(row) for row in rows])


def _shifted(row: Mapping[str, Any]) -> Any:
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)  # [seq]
    labels = torch.as_tensor(row.get("labels", ids), dtype=torch.int64)
    if "attention_mask" in row:
        kept = torch.as_tensor(row["attention_mask"]).bool()
        ids, labels = ids[kept], labels[kept]
    return {"input": ids[:-1]}, labels[1:]


@dataclass(frozen=True)
class PackedCollate(_Documents):
    """Stack rows of `PackedDataset`, which are equally long: every tensor is `[rows, seq_len]`.

    Args:
        varlen: Add the arguments of flash attention (`varlen_arguments`) over all rows of the
            micro-batch: without them it would take each row for one document.
    """

    varlen: bool = True

    def __call__(self, rows: Sequence[LoadedBatch]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        inputs = {key: torch.stack([row[key] for row, _ in rows]) for key in rows[0][0]}
        if self.varlen:
            inputs |= varlen_arguments(inputs["position_ids"])
        return inputs, torch.stack([labels for _, labels in rows])


@dataclass(frozen=True)
class Seq2SeqCollate:
    """Pad rows of `TokenizedSeq2SeqDataset` on the right.

    `input` and `attention_mask` are int64 `[rows, longest input]`; labels and `decoder_input_ids`
    `[rows, longest output]`, the latter the labels shifted by one.

    Args:
        decoder_start_token_id: First token of `decoder_input_ids`.
        pad_id: Id of the padding; None: 0.
        ignore_index: Label of the padding, excluded from the loss.
        pad_to_multiple_of: Round the lengths up to a multiple of this, in tokens.
    """

    decoder_start_token_id: int
    pad_id: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    pads_rows = True
    contract = "-> input:2:i64, attention_mask:2:i64, decoder_input_ids:2:i64 | ctx.target:2:i64"

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        (number, given), pad = _given(rows), self.pad_id or 0
        sources = [row["input"] for row, _ in given]
        encoder = _masked(sources, number, pad, self.pad_to_multiple_of)
        targets = [labels for _, labels in given]
        length = _padded_length([len(labels) for labels in targets], self.pad_to_multiple_of)
        labels = _padded(targets, number, length, self.ignore_index)
        start = labels.new_full((number, 1), self.decoder_start_token_id)
        decoder = torch.cat([start, labels[:, :-1]], dim=1)
        decoder = decoder.masked_fill(decoder == self.ignore_index, pad)
        return {**encoder, "decoder_input_ids": decoder, **_sources(given, number)}, labels


@dataclass(frozen=True)
class EncoderCollate(ByArguments):
    """Pad rows for a bidirectional model, or a classifier, on the right, with an attention mask.

    `input` and `attention_mask` are int64 `[rows, longest]`, and so are `token_type_ids` if the
    rows have them. Labels are `[rows]`, the only one of each row, or `[rows, longest]`.

    Args:
        pad_id: Id of the padding; None: 0. A classifier with a causal body finds the last token of
            a row by it: see `model_pad_id`.
        label_per_token: Each token has a label.
        ignore_index: Label of the padding, excluded from the loss.
        pad_to_multiple_of: Round the length up to a multiple of this, in tokens.
    """

    pad_id: int | None = None
    label_per_token: bool = False
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    pads_rows = True

    @classmethod
    def contract_for(cls, *, label_per_token: bool = False, **_: Any) -> str:
        """Return the contract of a collate function with these arguments."""
        return _ENCODER.format(2 if label_per_token else 1)

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        number, given = _given(rows)
        texts = [row["input"] for row, _ in given]
        inputs = _masked(texts, number, self.pad_id or 0, self.pad_to_multiple_of)
        length = inputs["input"].shape[1]
        if given and all("token_type_ids" in row for row, _ in given):
            types = [row["token_type_ids"] for row, _ in given]
            inputs["token_type_ids"] = _padded(types, number, length, 0)
        size = length if self.label_per_token else 1
        labels = _padded([labels for _, labels in given], number, size, self.ignore_index)
        inputs |= _sources(given, number)
        return inputs, labels if self.label_per_token else labels[:, 0]


@dataclass(frozen=True)
class PairsCollate:
    """Pad pairs of texts on the right, all anchors first: `input` is `[2 * rows, longest]`.

    Behind the anchors are the positives in the same order, and with `negatives` the negatives.
    Labels are `[rows]`: 0, or `ignore_index` for a row of padding.

    Args:
        pad_id: Id of the padding; None: 0.
        negatives: Rows have a negative too: `input` is `[3 * rows, longest]`.
        ignore_index: Label of a row of padding, excluded from the loss.
        pad_to_multiple_of: Round the length up to a multiple of this, in tokens.
    """

    pad_id: int | None = None
    negatives: bool = False
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    pads_rows = True
    contract = _ENCODER.format(1)

    def __call__(self, rows: Sequence[LoadedBatch | None]) -> LoadedBatch:
        """Return the micro-batch of the rows."""
        (number, given), empty = _given(rows), torch.zeros(0, dtype=torch.int64)
        texts = [
            part
            for name in ("anchor", "positive", "negative")[: 3 if self.negatives else 2]
            for part in [*(row[name] for row, _ in given), *[empty] * (number - len(given))]
        ]
        labels = torch.full((number,), self.ignore_index)
        labels[: len(given)] = 0
        return _masked(texts, len(texts), self.pad_id or 0, self.pad_to_multiple_of), labels


def model_pad_id(model: Any) -> int:
    """Return the id that a model of transformers takes for padding.

    A classifier with a causal body makes its logits from the last token that is not this id.

    Raises:
        ValueError: The model's configuration does not have it.
    """
    config: Any = model.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is None:
        raise ValueError(
            "the model's configuration has no pad_token_id, by which a classifier finds the last "
            "token of a padded row: set one, such as +model.pad_token_id=0"
        )
    return int(pad)


def decoder_start_token_id(model: Any) -> int:
    """Return the first token of the decoder of a Hugging Face sequence-to-sequence model.

    Raises:
        ValueError: The model's configuration does not have it.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            "the model's configuration has no decoder_start_token_id: if it is not a sequence-to-"
            "sequence model use batching=padded, else set it in the model's configuration"
        )
    return int(start)


def varlen_arguments(position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments of transformers' flash attention for documents in rows.

    Args:
        position_ids: `[rows, length]`; a document begins at position 0, and each row with one.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k` int32 `[documents + 1]`, `max_length_q`, `max_length_k`.
    """
    flat = position_ids.flatten()  # [rows * length]
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])])
    ends, longest = bounds.to(torch.int32), int(bounds.diff().max())
    return {f"cu_seq_lens_{of}": ends for of in "qk"} | {f"max_length_{of}": longest for of in "qk"}


def _given(rows: Sequence[LoadedBatch | None]) -> tuple[int, list[LoadedBatch]]:
    """Return the number of rows, and those that are not padding."""
    rows = one_by_one(rows)
    return len(rows), [row for row in rows if row is not None]


def one_by_one(rows: Sequence[Any]) -> Sequence[LoadedBatch | None]:
    """Return the rows of a micro-batch of `TokenBudgetDataset`, or those given."""
    if not any(isinstance(row, list) for row in rows):
        return rows
    text = "each row is a whole micro-batch of a number of tokens: micro_batch_size must be 1"
    require(len(rows) == 1, f"{text}, not {len(rows)} (data.loader.micro_batch_size=1)")
    found: Sequence[LoadedBatch | None] = rows[0]
    return found


def _sources(given: list[LoadedBatch], rows: int) -> dict[str, Tensor]:
    """Return the `source` of each row `[rows]`, 0 for padding; nothing if the rows have none."""
    if not all("source" in row for row, _ in given) or not given:
        return {}
    sources = torch.zeros(rows, dtype=torch.int64)
    sources[: len(given)] = torch.stack([row["source"] for row, _ in given])
    return {"source": sources}


def _padded_length(lengths: list[int], multiple: int | None) -> int:
    longest = max([1, *lengths])
    return -(-longest // multiple) * multiple if multiple else longest


def _masked(texts: list[Tensor], rows: int, pad: int, multiple: int | None) -> dict[str, Tensor]:
    """Return the texts as `input` `[rows, length]`, padded on the right, and `attention_mask`."""
    length = _padded_length([len(text) for text in texts], multiple)
    mask = _padded([torch.ones_like(text) for text in texts], rows, length, 0)
    mask[:, 0] = 1  # of a row of padding, or an empty input: attention to nothing is NaN
    return {"input": _padded(texts, rows, length, pad), "attention_mask": mask}


def _padded(parts: list[Tensor], rows: int, length: int, fill: int) -> Tensor:
    """Return `[rows, length]`, each part at the beginning of its row, the rest `fill`."""
    out = torch.full((rows, length), fill, dtype=torch.int64)
    for row, part in zip(out, parts, strict=False):
        row[: len(part)] = part
    return out
