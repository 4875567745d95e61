"""From rows of different lengths to one micro-batch `(inputs, labels)`.

A row is `({"input": ids [length]}, labels [length])`. These collates are objects, so that workers
can take them by pickle, and they take None in place of a row (`fills`): the loader fills up the
last micro-batch of an epoch with it, and it becomes padding without a label, or nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ditty_di.protocols import LoadedBatch

    Row = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class PaddedCollate:
    """Rows padded on the right to the longest of them: `input` and labels `[rows, longest]`.

    There is no attention mask: in a causal model no token sees the padding after it, and the
    padding's labels are `ignore_index`, decided by place, never by id. So `pad_id` may be any id,
    also EOS, and None is 0. `pad_to_multiple_of` rounds the length up, for kernels that like it.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    fills = True
    contract = "-> input:2:i64 | ctx.target:2:i64"

    def __call__(self, rows: Sequence[Row | None]) -> LoadedBatch:
        given = _given(rows)
        length = _padded_length([len(labels) for _, labels in given], self.pad_to_multiple_of)
        inputs = _stacked([row["input"] for row, _ in given], len(rows), length, self.pad_id or 0)
        labels = _stacked([labels for _, labels in given], len(rows), length, self.ignore_index)
        return {"input": inputs}, labels


class _Documents:
    """Batches that tell documents apart by their positions: their contract."""

    varlen: bool
    #: The model is probed before training: no document of a row may see another.
    packs_documents = True

    @classmethod
    def contract_for(cls, *, varlen: bool = True, **others: Any) -> str:
        more = ", ".join(
            f"{name}_{of}:{form}"
            for name, form in (("cu_seq_lens", "1:i32"), ("max_length", "0:i64"))
            for of in "qk"
        )
        return f"-> input:2:i64, position_ids:2:i64{f', {more}' * varlen} | ctx.target:2:i64"

    @property
    def contract(self) -> str:
        return self.contract_for(varlen=self.varlen)


@dataclass(frozen=True)
class PaddingFreeCollate(_Documents):
    """Rows one after another without any padding: everything is `[1, total]`.

    `position_ids` begin at 0 in each row, by which transformers' attention keeps them apart as long
    as there is no attention mask and no cache (`use_cache=False`). With `varlen` come the
    `cu_seq_lens_q`, `cu_seq_lens_k` int32 `[rows + 1]` and `max_length_q`, `max_length_k` that its
    flash attention takes; other attentions pass over them.
    """

    pad_id: int | None = None
    ignore_index: int = -100
    varlen: bool = True
    fills = True

    def __call__(self, rows: Sequence[Row | None]) -> LoadedBatch:
        import torch

        given = _given(rows)
        if not given:  # a rank that is filled up entirely still takes part in the forward pass
            pad, label = torch.tensor([self.pad_id or 0]), torch.tensor([self.ignore_index])
            given = [({"input": pad}, label)]
        positions = [torch.arange(len(labels)) for _, labels in given]
        inputs = {
            "input": torch.cat([row["input"] for row, _ in given])[None],
            "position_ids": torch.cat(positions)[None],
        }
        if self.varlen:
            inputs |= varlen_arguments(inputs["position_ids"])
        return inputs, torch.cat([labels for _, labels in given])[None]


@dataclass(frozen=True)
class PackedCollate(_Documents):
    """Rows of `Packed`, which are equally long: everything is `[rows, seq_len]`.

    `varlen` as in `PaddingFreeCollate`, over all rows of the micro-batch: without it, transformers'
    flash attention would see one document in each row.
    """

    varlen: bool = True

    def __call__(self, rows: Sequence[Row]) -> LoadedBatch:
        import torch

        inputs = {key: torch.stack([row[key] for row, _ in rows]) for key in rows[0][0]}
        if self.varlen:
            inputs |= varlen_arguments(inputs["position_ids"])
        return inputs, torch.stack([labels for _, labels in rows])


@dataclass(frozen=True)
class Seq2SeqCollate:
    """Rows of `Seq2SeqExamples`, both sides padded on the right.

    `input` and `attention_mask` int64 `[rows, longest input]`; labels and `decoder_input_ids`
    `[rows, longest output]`, the labels moved one to the right behind `decoder_start_token_id`.
    """

    decoder_start_token_id: int
    pad_id: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    fills = True
    contract = "-> input:2:i64, attention_mask:2:i64, decoder_input_ids:2:i64 | ctx.target:2:i64"

    def __call__(self, rows: Sequence[Row | None]) -> LoadedBatch:
        import torch

        given, pad = _given(rows), self.pad_id or 0
        sources = [row["input"] for row, _ in given]
        length = _padded_length([len(source) for source in sources], self.pad_to_multiple_of)
        inputs = _stacked(sources, len(rows), length, pad)
        mask = _stacked([torch.ones_like(source) for source in sources], len(rows), length, 0)
        mask[:, 0] = 1  # of a row that fills up, or an empty input: attention to nothing is NaN
        targets = [labels for _, labels in given]
        length = _padded_length([len(labels) for labels in targets], self.pad_to_multiple_of)
        labels = _stacked(targets, len(rows), length, self.ignore_index)
        before = labels.new_full((len(rows), 1), self.decoder_start_token_id)
        decoder = torch.cat([before, labels[:, :-1]], dim=1)
        decoder = decoder.masked_fill(decoder == self.ignore_index, pad)
        return {"input": inputs, "attention_mask": mask, "decoder_input_ids": decoder}, labels


def decoder_start_token_id(model: Any) -> int:
    """What the decoder of a Hugging Face sequence-to-sequence model begins with.

    Raises `ValueError` for a model whose configuration does not say.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            "the model's configuration has no decoder_start_token_id: it may be no sequence-to-"
            "sequence model (batching=padded is for decoders), or set it in its configuration"
        )
    return int(start)


def varlen_arguments(position_ids: Tensor) -> dict[str, Any]:
    """What transformers' flash attention takes for documents that begin at position 0.

    `position_ids` `[rows, length]`; documents do not cross rows, each of which begins with one.
    """
    import torch

    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])])
    longest = int(bounds.diff().max())
    ends = bounds.to(torch.int32)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _given(rows: Sequence[Row | None]) -> list[Row]:
    return [row for row in rows if row is not None]


def _padded_length(lengths: list[int], multiple: int | None) -> int:
    longest = max([1, *lengths])
    return -(-longest // multiple) * multiple if multiple else longest


def _stacked(parts: list[Tensor], rows: int, length: int, fill: int) -> Tensor:
    """`[rows, length]`, each part at the beginning of its row; rows without a part are `fill`."""
    import torch

    out = torch.full((rows, length), fill, dtype=torch.int64)
    for row, part in zip(out, parts, strict=False):
        row[: len(part)] = part
    return out
