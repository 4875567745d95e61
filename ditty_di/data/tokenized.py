"""Tokenized datasets of examples to fine-tune on, with their loss masks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.data import options
from ditty_di.data.cache import build_once, cache_folder, chunks, counted, fingerprint
from ditty_di.data.content import array_digest, fingerprint_with
from ditty_di.data.reading.files import folder_of
from ditty_di.data.reading.sources import RecordDataset
from ditty_di.data.rendering.audit import Encoded, Findings
from ditty_di.data.rendering.renderer import Renderer
from ditty_di.data.tokens import id_dtype

log = logging.getLogger(__name__)

# Raise it when the same records would be stored in another way, or others be refused.
_EXAMPLES_FORMAT = 3
_PROMPTS_KEPT = 32
_PROMPT_TOKENS = 16
_RECORDS_AT_ONCE = 1000
_BAD_SHOWN = 10
_REHEARSED = 100

#: Loss masks by option: from the tokens that are output to the tokens in the loss `[tokens]`.
LOSS_MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "output_only": np.copy,
    "no_mask": np.ones_like,
}

# Records that the default formats do not read: keys that all of them have, and what to type.
_SHAPES: list[tuple[set[str], str]] = [
    ({"conversations"}, "data=slim_orca data.path=..."),
    ({"instruction", "output"}, "data=alpaca data.path=..."),
    ({"instruction", "response"}, "data=dolly data.path=..."),
    ({"conversation"}, "data.renderer.messages_key=conversation"),
    ({"dialogue"}, "data.renderer.messages_key=dialogue"),
    ({"text"}, "data=text data.corpus.path=..., for text without an output"),
]
# Names that inputs and outputs have elsewhere, the usual ones first.
_INPUTS = ("prompt", "question", "query", "instruction", "source", "sentence", "text", "input")
_OUTPUTS = ("completion", "response", "answer", "output", "target", "label", "summary", "chosen")


class TokenizedDataset:
    """A tokenized dataset: records as rows of token ids, tokenized once, then memory-mapped.

    `examples[i]` is `({"input": int64 [length]}, labels int64 [length])` with `labels[t]` the token
    after `input[t]` where it is in the loss, else `ignore_index`. `lengths` int64 `[examples]` are
    known without reading the tokens. If any record has images, `images` are the paths of those of
    the row (`ditty_di.data.ImageTextCollate` reads them).

    The first process tokenizes, others wait for its file: no collective is involved. Examples
    without a token in the loss are dropped; a log line counts them and those that were truncated.
    The renderer's audit findings are a warning for each kind.

    Args:
        records: The dataset of records.
        renderer: Makes the token ids.
        loss_mask: `output_only` trains on outputs and the assistant's answers, `no_mask` on every
            token.
        ignore_index: Label of tokens that are excluded from the loss.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: Bad records, all together, the first ten with file, line and reason; no
            records; no example is left.
    """

    @staticmethod
    def validate(*, loss_mask: str = "output_only") -> None:
        """Raise `ValueError` for an unknown `loss_mask`."""
        options.one_of(LOSS_MASKS, loss_mask=loss_mask)

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        """Encode the first hundred records, and return warnings.

        Raises:
            ValueError: Records that cannot be used, or none has a token in the loss.
        """
        records: RecordDataset = build("records")
        reader = _Reader(build("renderer"), LOSS_MASKS[build("loss_mask")])
        for _ in reader.examples(islice(records, _REHEARSED)):
            pass
        reader.check(records, "the first " if reader.total == _REHEARSED else "")
        return reader.findings.lines()

    def __init__(
        self,
        records: RecordDataset,
        renderer: Renderer,
        *,
        loss_mask: str = "output_only",
        ignore_index: int = -100,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.validate(loss_mask=loss_mask)
        self.ignore_index = ignore_index
        key = fingerprint(
            records.fingerprint(),
            renderer.fingerprint(),
            f"{loss_mask} {_EXAMPLES_FORMAT}{renderer.origins(records)}",
        )
        self._folder = build_once(
            cache_folder(cache_dir) / "tokenized" / key[:32],
            lambda aside: _build(aside, records, _Reader(renderer, LOSS_MASKS[loss_mask])),
        )
        self._open()
        log.info("%s", self._about["summary"])
        for warning in self._about["warnings"]:
            log.warning("%s", warning)

    def _open(self) -> None:
        self._tokens, self._mask, self._offsets, self._inputs = (
            np.load(self._folder / f"{name}.npy", mmap_mode="r")
            for name in ("tokens", "loss_mask", "offsets", "inputs")
        )
        self.lengths: np.ndarray = np.diff(self._offsets) - 1
        self._about = json.loads((self._folder / "about.json").read_text(encoding="utf-8"))
        self._images: list[list[str]] = self._about.get("images", [])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Tensor]:
        ids, mask, _ = self.tokens_of(index)
        labels = np.where(mask[1:], ids[1:], self.ignore_index)
        inputs: dict[str, Any] = {"input": torch.from_numpy(ids[:-1].copy())}
        if self._images:
            inputs["images"] = self._images[options.row_index(index, len(self))]
        return inputs, torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """Return a digest of the tokens, where examples begin and the loss masks."""
        arrays = (self._tokens, self._mask, self._offsets)
        return fingerprint(*map(array_digest, map(np.asarray, arrays)))

    def tokens_of(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return an example, unshifted.

        Returns:
            Token ids `[tokens]`, loss mask `[tokens]`, and the number of the first ids that are the
            input, -1 for a conversation.
        """
        row = options.row_index(index, len(self))
        here = slice(*self._offsets[row : row + 2])
        ids = self._tokens[here].astype(np.int64)
        return ids, np.asarray(self._mask[here]), int(self._inputs[row])

    @property
    def conversations(self) -> int:
        """How many of the examples are conversations, rendered by the chat template."""
        return int((np.asarray(self._inputs) < 0).sum())

    def prompts(self, number: int) -> list[str]:
        """Return the texts before the first output of some examples, at most 32."""
        return list(self._about["prompts"][:number])

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked map the files again instead of a copy of all tokens each.
        return {"_folder": self._folder, "ignore_index": self.ignore_index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class TokenizedSeq2SeqDataset:
    """The same examples for an encoder and a decoder.

    Row i is `({"input": int64 [input]}, labels int64 [output])`: the output, not shifted, EOS
    included. `lengths` are those of input and output together, in tokens, `part_lengths`
    `[rows, 2]` each alone.

    Args:
        examples: The examples.

    Raises:
        ValueError: When it is read: a conversation.
    """

    def __init__(self, examples: TokenizedDataset) -> None:
        self.examples = examples
        self.lengths = examples.lengths + 1
        inputs = np.maximum(examples._inputs, 0)
        self.part_lengths = np.stack([inputs, self.lengths - inputs], axis=1)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        ids, mask, inputs = self.examples.tokens_of(index)
        if inputs < 0:
            raise ValueError(
                f"example {index} is a conversation, which has no renderer input: sequence-to-"
                "sequence models need records with an input and an output"
            )
        labels = np.where(mask, ids, self.examples.ignore_index)[inputs:]
        return {"input": torch.from_numpy(ids[:inputs].copy())}, torch.from_numpy(labels)

    def fingerprint(self) -> str | None:
        """Return a digest of the examples and where their outputs begin."""
        inputs = np.ascontiguousarray(self.examples._inputs)
        return fingerprint_with(self.examples, inputs.tobytes())


def label_tokens(examples: TokenizedDataset) -> np.ndarray:
    """Return all tokens in the loss, `[tokens]`; their `unigram_entropy` is a baseline."""
    mask = np.array(examples._mask, bool)
    mask[examples._offsets[:-1]] = False  # first tokens are no labels
    return np.asarray(examples._tokens[mask])


def prompts(
    dataset: Any, number: int = 3, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Return the beginnings of some rows of a dataset, as texts to continue.

    Of `TokenizedDataset`, or a dataset made of them (as `PackedDataset`), that is the text before
    the first output. Of other rows `({"input": ids [seq], ...}, labels [seq])` the tokens before
    the first label in the loss, or the first 16 where all labels are.

    Args:
        dataset: The dataset.
        number: Number of rows.
        tokenizer: Decodes rows that are not `TokenizedDataset`.

    Raises:
        ValueError: Rows without token ids, or without a tokenizer that they need.
    """
    examples = getattr(dataset, "examples", dataset)
    if hasattr(examples, "prompts"):
        return list(examples.prompts(number))
    kind = type(dataset).__name__
    if tokenizer is None:
        raise ValueError(f"prompts: rows of a {kind} need a `tokenizer`")
    found = []
    for index in range(min(number, len(dataset))):
        try:
            inputs, labels = dataset[index]
            in_loss = (labels >= 0).tolist()
            ids = dict(inputs)["input"].tolist()
            start = in_loss.index(True) + 1 if True in in_loss else len(ids)
            found.append(str(tokenizer.decode(ids[: start if start > 1 else _PROMPT_TOKENS])))
        except Exception as error:  # rows of any other kind
            raise ValueError(
                f"prompts: row {index} of the {kind} has no token ids to show ({error}): leave "
                "samples out with validator=loss_only or data.sample_text=null"
            ) from error
    return found


class _Reader:
    """Encode records, and collect errors and audit findings."""

    def __init__(self, renderer: Renderer, loss_mask: Callable[[np.ndarray], np.ndarray]) -> None:
        self.renderer, self.loss_mask = renderer, loss_mask
        self.findings = Findings()
        self.total = self.usable = self.without = self._bad = 0
        self._shown: list[str] = []
        self._keys: list[set[str]] = []

    def examples(self, records: Iterable[tuple[str, Any]]) -> Iterator[tuple[Encoded, np.ndarray]]:
        """Yield the usable examples with their loss masks `[tokens]`."""
        resolved = self.renderer.resolved  # before records come together: images may be in them
        with_paths = ((at, resolved(record, folder_of(at))) for at, record in records)
        for chunk in chunks(with_paths, _RECORDS_AT_ONCE):
            self.total += len(chunk)
            encoded = self.renderer([record for _, record in chunk])
            for (where, record), examples in zip(chunk, encoded, strict=True):
                for example in examples:
                    if isinstance(example, ValueError):
                        self._refuse(where, record, example)
                        continue
                    mask = self.loss_mask(np.array(example.output, bool))
                    mask &= ~np.isin(example.ids, self.renderer.never_learned)
                    if not mask[1:].any():
                        self.without += 1
                        continue
                    self.usable += 1
                    self.findings.add(where, example.notes)
                    yield example, mask

    def _refuse(self, where: str, record: Any, error: ValueError) -> None:
        self._bad += 1
        if len(self._shown) < _BAD_SHOWN:
            self._shown.append(f"{where}: {error}")
            self._keys.append(
                {str(key) for key in record} if isinstance(record, Mapping) else set()
            )

    def check(self, records: RecordDataset, prefix: str = "") -> None:
        """Raise `ValueError` for no records, bad ones, and if no example is left."""
        options.require(self.total > 0, records.if_empty)
        total = prefix + _count(self.total, "record")
        if self._bad:
            first = f"; the first {_BAD_SHOWN}" if self._bad > _BAD_SHOWN else ""
            lines = "\n".join([*self._shown, *self._remedy()])
            raise ValueError(f"{self._bad} of {total} cannot be used{first}:\n{lines}")
        options.require(
            self.usable > 0,
            f"no example is left of {total}: {self.without} without a token to learn. Outputs may "
            "be missing, or the limit of a row (max_tokens, seq_len) may leave no room for them "
            "after the inputs.",
        )

    def _remedy(self) -> list[str]:
        """Return what to type for records of a known shape."""
        keys = set.intersection(*self._keys)
        for shape, what in _SHAPES:
            if shape <= keys:
                return [f"for records with {_listed(shape)}: {what}"]
        inputs, outputs = ([k for k in names if k in keys] for names in (_INPUTS, _OUTPUTS))
        if not inputs or not outputs or (inputs[0], outputs[0]) == ("input", "output"):
            return []
        formats = f"data.input_format=__{inputs[0]}__ data.output_format=__{outputs[0]}__"
        return [f"for records with {_listed({inputs[0], outputs[0]})}: {formats}"]


def _listed(keys: set[str]) -> str:
    return " and ".join(f'"{key}"' for key in sorted(keys))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _build(folder: Path, records: RecordDataset, reader: _Reader) -> None:
    renderer = reader.renderer
    dtype = id_dtype(renderer.tokenizer)
    tokens, masks, inputs, texts, cut = [], [], list[int](), list[str](), 0
    images: list[list[str]] = []
    for example, mask in reader.examples(counted(records, "tokenizing records", "records")):
        cut += example.cut
        if len(texts) < _PROMPTS_KEPT:
            texts.append(renderer.prompt_text(example))
        tokens.append(np.array(example.ids, dtype))
        masks.append(mask)
        inputs.append(example.inputs)
        images.append(list(example.images))
    reader.check(records)
    sizes = [*map(len, tokens)]
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "loss_mask.npy", np.concatenate(masks))
    np.save(folder / "offsets.npy", np.cumsum([0, *sizes], dtype=np.int64))
    np.save(folder / "inputs.npy", np.array(inputs, np.int64))
    summary = (
        f"{_count(len(inputs), 'example')} of {_count(reader.total, 'record')}: {sum(sizes)} "
        f"tokens, the longest {max(sizes)}; {cut} cut to fit, {reader.without} dropped without a "
        "token to learn"
    )
    about: dict[str, Any] = {"summary": summary, "prompts": texts}
    about |= {"warnings": reader.findings.lines(), **({"images": images} if any(images) else {})}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
