"""Examples to fine-tune on: records as token ids, and which of them are learnt."""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ditty_di.data.audit import Findings
from ditty_di.data.cache import build_once, cache_folder, counted, fingerprint
from ditty_di.data.content import array_digest, fingerprint_with
from ditty_di.data.encoding import Encoded, Encoder
from ditty_di.data.sources import Records

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Raise it when the same records would be stored in another way, or others be refused.
_EXAMPLES_FORMAT = 2
_PROMPTS = 32
_RECORDS_AT_ONCE = 1000
_BAD_SHOWN = 10
_REHEARSED = 100

#: From the tokens that are output to the tokens that are learnt.
LOSS_MASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "output_only": np.copy,
    "no_mask": np.ones_like,
}

BAD_RECORDS = """\
{count} of {total} cannot be used{first}:
{lines}"""
NOTHING_LEFT = """\
no example is left of {total}: {without} without a token to learn. Outputs may be missing, or the \
limit of a row (max_tokens, seq_len) may leave no room for them after the inputs."""

# Shapes of records that the default formats do not read: keys that all of them have, what to type.
_SHAPES: list[tuple[set[str], str]] = [
    ({"conversations"}, "data=slim_orca data.path=..."),
    ({"instruction", "output"}, "data=alpaca data.path=..."),
    ({"instruction", "response"}, "data=dolly data.path=..."),
    ({"conversation"}, "data.encoder.messages_key=conversation"),
    ({"dialogue"}, "data.encoder.messages_key=dialogue"),
    ({"text"}, "data=text data.corpus.path=..., for text without an output"),
]
# Names that inputs and outputs have elsewhere, the usual ones first.
_INPUTS = ("prompt", "question", "query", "instruction", "source", "sentence", "text", "input")
_OUTPUTS = ("completion", "response", "answer", "output", "target", "label", "summary", "chosen")


class Examples:
    """Records as rows of token ids, each as long as it is; tokenized once, then memory-mapped.

    `examples[i]` is `({"input": int64 [length]}, labels int64 [length])` with `labels[t]` the token
    after `input[t]` where it is learnt, else `ignore_index`. `lengths` int64 `[examples]` are known
    without reading the tokens.

    `loss_mask`: `output_only` learns outputs and the assistant's answers, `no_mask` every token.

    The first process to come tokenizes, others wait for its file: no collective is involved.
    Examples without a token to learn are dropped; a log line counts them and what was cut. What the
    encoder noted about examples (`Encoder`, `audit`) is a warning for each kind.

    Raises `ValueError` for bad records, all together, the first ten with file, line and reason; for
    no records, and when no example is left.
    """

    @staticmethod
    def validate(*, loss_mask: str = "output_only") -> None:
        """Raise `ValueError` for an unknown `loss_mask`."""
        if loss_mask not in LOSS_MASKS:
            raise ValueError(f"loss_mask={loss_mask!r} must be one of {', '.join(LOSS_MASKS)}")

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        """Encode the first hundred records.

        Raises `ValueError` for those that cannot be used, and if none has a token to learn.
        """
        records: Records = build("records")
        loss_mask = LOSS_MASKS[build("loss_mask")]
        tally, findings, learns = _Tally(), Findings(), False
        for where, example in _encoded(islice(records, _REHEARSED), build("encoder")):
            if tally.add(where, example) and isinstance(example, Encoded):
                findings.add(where.place if where else "the same record", example.notes)
                learns = learns or bool(loss_mask(np.array(example.output, bool))[1:].any())
        total = _count(tally.total, "record")
        total = f"the first {total}" if tally.total == _REHEARSED else total
        tally.check(records, total)
        if not learns:
            raise ValueError(NOTHING_LEFT.format(total=total, without=tally.total))
        return findings.lines()

    def __init__(
        self,
        records: Records,
        encoder: Encoder,
        *,
        loss_mask: str = "output_only",
        ignore_index: int = -100,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.validate(loss_mask=loss_mask)
        self.ignore_index = ignore_index
        key = fingerprint(
            records.fingerprint(), encoder.fingerprint(), f"{loss_mask} {_EXAMPLES_FORMAT}"
        )
        self._folder = build_once(
            cache_folder(cache_dir) / "tokenized" / key[:32],
            lambda aside: _build(aside, records, encoder, LOSS_MASKS[loss_mask]),
        )
        self._open()
        log.info("%s", self._about["summary"])
        for warning in self._about["warnings"]:
            log.warning("%s", warning)

    def _open(self) -> None:
        def load(name: str) -> np.ndarray:
            found: np.ndarray = np.load(self._folder / f"{name}.npy", mmap_mode="r")
            return found

        self._tokens, self._learnt = load("tokens"), load("learnt")
        self._offsets, self._inputs = load("offsets"), load("inputs")
        self.lengths: np.ndarray = np.diff(self._offsets) - 1
        self._about = json.loads((self._folder / "about.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        ids, learnt, _ = self.tokens_of(index)
        labels = np.where(learnt[1:], ids[1:], self.ignore_index)
        return {"input": torch.from_numpy(ids[:-1].copy())}, torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """Of the tokens, where examples begin and what is learnt."""
        arrays = (self._tokens, self._learnt, self._offsets)
        return fingerprint(*map(array_digest, map(np.asarray, arrays)))

    def tokens_of(self, index: int) -> Example:
        """The whole example, unshifted."""
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"example {row} of {len(self)}")
        row %= len(self)
        start, stop = self._offsets[row : row + 2]
        return Example(
            self._tokens[start:stop].astype(np.int64),
            np.asarray(self._learnt[start:stop]),
            int(self._inputs[row]),
        )

    @property
    def conversations(self) -> int:
        """How many of the examples are conversations, rendered by the chat template."""
        return int((np.asarray(self._inputs) < 0).sum())

    def prompts(self, number: int) -> list[str]:
        """Texts that stand before the first output of some examples, at most 32."""
        return list(self._about["prompts"][:number])

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked map the files again instead of a copy of all tokens each.
        return {"_folder": self._folder, "ignore_index": self.ignore_index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class Example(NamedTuple):
    """One example as ids and learnt `[tokens]`; the first `inputs` ids are the input, -1 if it
    is a conversation."""

    ids: np.ndarray
    learnt: np.ndarray
    inputs: int


class Seq2SeqExamples:
    """The same examples for an encoder and a decoder.

    Row i is `({"input": int64 [input]}, labels int64 [output])`: what the decoder is to say, not
    shifted and EOS included. `lengths` are those of input and output together.

    Raises `ValueError` for conversations.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.lengths = examples.lengths + 1

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        ids, learnt, inputs = self.examples.tokens_of(index)
        if inputs < 0:
            raise ValueError(
                f"example {index} is a conversation, which has no encoder input: sequence-to-"
                "sequence models need records with an input and an output"
            )
        labels = np.where(learnt, ids, self.examples.ignore_index)[inputs:]
        return {"input": torch.from_numpy(ids[:inputs].copy())}, torch.from_numpy(labels)

    def fingerprint(self) -> str | None:
        """Of the examples, and where their outputs begin."""
        inputs = np.ascontiguousarray(self.examples._inputs)
        return fingerprint_with(self.examples, inputs.tobytes())


def label_tokens(examples: Examples) -> np.ndarray:
    """All tokens that are learnt, `[tokens]`; their `unigram_entropy` is a loss to get below."""
    learnt = np.array(examples._learnt, bool)
    learnt[examples._offsets[:-1]] = False  # nothing precedes them
    return np.asarray(examples._tokens[learnt])


def prompts(
    dataset: Any, number: int = 3, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Return the beginnings of some rows of a data set, as texts to continue.

    Of `Examples`, or what is made of them (as `Packed`), what stands before the first output. Of
    other rows `({"input": ids [seq], ...}, labels [seq])` the tokens before the first label that
    counts, or the first 16 where that is the first one, decoded by `tokenizer`.

    Raises `ValueError` for rows without token ids, or without a tokenizer that they need.
    """
    examples = getattr(dataset, "examples", dataset)
    if hasattr(examples, "prompts"):
        return list(examples.prompts(number))
    if tokenizer is None:
        raise ValueError(f"prompts: rows of a {type(dataset).__name__} need a `tokenizer`")
    found = []
    for index in range(min(number, len(dataset))):
        try:
            inputs, labels = dataset[index]
            learnt = (labels >= 0).tolist()
            ids = dict(inputs)["input"].tolist()
            start = learnt.index(True) + 1 if True in learnt else len(ids)
            found.append(str(tokenizer.decode(ids[: start if start > 1 else _PROMPT_TOKENS])))
        except Exception as error:  # of rows of any other kind
            raise ValueError(
                f"prompts: row {index} of the {type(dataset).__name__} has no token ids to show "
                f"({error}): leave samples out with callbacks.sample_text=null"
            ) from error
    return found


_PROMPT_TOKENS = 16


class _Tally:
    """Count records, and tell what is wrong with those that cannot be used."""

    def __init__(self) -> None:
        self.total = self.bad = 0
        self._shown: list[str] = []
        self._keys: list[set[str]] = []

    def add(self, where: Where | None, example: Encoded | ValueError) -> bool:
        """Count an example; return whether it can be used."""
        self.total += where is not None
        if not isinstance(example, ValueError):
            return True
        self.bad += 1
        if len(self._shown) < _BAD_SHOWN:
            self._shown.append(f"{where.place if where else 'the same record'}: {example}")
            self._keys.append(where.keys if where else set())
        return False

    def check(self, records: Records, total: str) -> None:
        """Raise `ValueError` for no records, and for those that cannot be used."""
        if not self.total:
            raise ValueError(records.if_empty)
        if self.bad:
            first = f"; the first {_BAD_SHOWN}" if self.bad > _BAD_SHOWN else ""
            lines = "\n".join([*self._shown, *self._remedy()])
            raise ValueError(
                BAD_RECORDS.format(count=self.bad, total=total, first=first, lines=lines)
            )

    def _remedy(self) -> list[str]:
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


def _build(
    folder: Path,
    records: Records,
    encoder: Encoder,
    loss_mask: Callable[[np.ndarray], np.ndarray],
) -> None:
    dtype = np.dtype("<u2" if len(encoder.tokenizer) <= 1 << 16 else "<u4")
    tokens: list[np.ndarray] = [np.empty(0, dtype)]
    learnt: list[np.ndarray] = [np.empty(0, bool)]
    inputs: list[int] = []
    tally = _Tally()
    without = cut = 0
    texts: list[str] = []
    findings = Findings()
    taken = counted(records, "tokenizing records", "records")
    for where, example in _encoded(taken, encoder):
        if not tally.add(where, example):
            continue
        assert not isinstance(example, ValueError)
        mask = loss_mask(np.array(example.output, bool))
        if not mask[1:].any():
            without += 1
            continue
        cut += example.cut
        findings.add(where.place if where else "the same record", example.notes)
        if len(texts) < _PROMPTS:
            texts.append(encoder.prompt_text(example))
        tokens.append(np.array(example.ids, dtype))
        learnt.append(mask)
        inputs.append(example.inputs)
    total = _count(tally.total, "record")
    tally.check(records, total)
    if not inputs:
        raise ValueError(NOTHING_LEFT.format(total=total, without=without))
    sizes = [len(part) for part in tokens[1:]]
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(tokens))
    np.save(folder / "learnt.npy", np.concatenate(learnt))
    np.save(folder / "offsets.npy", np.cumsum([0, *sizes], dtype=np.int64))
    np.save(folder / "inputs.npy", np.array(inputs, np.int64))
    summary = (
        f"{_count(len(inputs), 'example')} of {total}: {sum(sizes)} tokens, the longest "
        f"{max(sizes)}; {cut} cut to fit, {without} dropped without a token to learn"
    )
    about = {"summary": summary, "prompts": texts, "warnings": findings.lines()}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


class Where(NamedTuple):
    """Where a record stands, and its keys."""

    place: str
    keys: set[str]


def _encoded(
    records: Iterable[tuple[str, Any]], encoder: Encoder
) -> Iterator[tuple[Where | None, Encoded | ValueError]]:
    """Yield examples with where they come from; None for further ones of the same record."""
    for chunk in _chunks(records, _RECORDS_AT_ONCE):
        for (place, record), examples in zip(chunk, encoder([r for _, r in chunk]), strict=True):
            keys = {str(key) for key in record} if isinstance(record, Mapping) else set()
            where: Where | None = Where(place, keys)
            for example in examples:
                yield where, example
                where = None


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
