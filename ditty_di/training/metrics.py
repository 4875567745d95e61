"""Metrics of a whole validation that are not means over its batches: F1, recall of a search.

A metric is any object with two methods. `rows(output, batch)` returns what is kept of a batch,
tensors by name with one row for each example that counts. `compute(rows)` returns the metrics of
all of them, of all batches and ranks. `ditty_di.training.validation.Validator` takes a list.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ditty_di.batch import Batch
from ditty_di.processors.outputs import predicted
from ditty_di.protocols import Loss
from ditty_di.runtime import Runtime

log = logging.getLogger(__name__)

#: Similarities that are in memory at a time.
_PIECE = 1 << 24
_ALL_FOUND = """\
the validation set has %d pairs, among which %s would always be 1 and is left out: write smaller \
numbers as k of the metric, or hold out more pairs (data.validation_fraction)"""


class ValidationMetric(Protocol):
    """See above."""

    def rows(self, output: Any, batch: Batch, /) -> dict[str, Tensor]:
        """Return what is kept of a batch, `[rows, ...]` by name, without rows of padding.

        Args:
            output: the model's output after the postprocessors.
            batch: the batch it was computed from.
        """

    def compute(self, rows: Mapping[str, Tensor], /) -> dict[str, float]:
        """Return the metrics by name.

        Args:
            rows: those of all batches and ranks, on the CPU.
        """


class ClassificationScores:
    """Accuracy, and F1 as the mean over the classes, by scikit-learn (extra `[examples]`).

    Classes that neither a label nor a prediction has do not count; a class that is never predicted,
    or has no label, has an F1 of 0.

    Args:
        output_index: the logits `[..., classes]` in the model's output: a position, or a name.
        ignore_index: label value that does not count.
    """

    def __init__(self, *, output_index: int | str = 0, ignore_index: int = -100) -> None:
        try:
            import sklearn.metrics  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "validator.metrics: accuracy and F1 are scikit-learn's: "
                "pip install 'ditty_di[examples]'"
            ) from error
        self.output_index, self.ignore_index = output_index, ignore_index

    def rows(self, output: Any, batch: Batch, /) -> dict[str, Tensor]:
        """Return labels and predicted classes, int64 `[valid labels]`."""
        labels = batch.target
        valid = labels != self.ignore_index
        classes = predicted(output, self.output_index).argmax(-1)  # in the shape of the labels
        return {"label": labels[valid], "predicted": classes[valid]}

    def compute(self, rows: Mapping[str, Tensor], /) -> dict[str, float]:
        """Return `accuracy` and `f1`."""
        from sklearn.metrics import accuracy_score, f1_score

        labels, classes = rows["label"].numpy(), rows["predicted"].numpy()
        f1 = f1_score(labels, classes, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(labels, classes)), "f1": float(f1)}


class EntityScores:
    """Precision, recall and F1 of entities in BIO labels, by nervaluate (extra `[examples]`).

    An entity is found if its type, its first and its last word are right, as in CoNLL-2003 (Tjong
    Kim Sang and De Meulder 2003, arXiv:cs/0306050). An `I-` without the `B-` of its type before it
    begins an entity. There are no scores of labels in another scheme.

    Args:
        labels: names of the classes, in the order of their numbers.
        output_index: the logits `[rows, seq, classes]` in the output: a position, or a name.
        ignore_index: label value that does not count.
    """

    def __init__(
        self, labels: Sequence[str], *, output_index: int | str = 0, ignore_index: int = -100
    ) -> None:
        self.labels, self.output_index, self.ignore_index = list(labels), output_index, ignore_index
        parts = [label.partition("-") for label in self.labels if label != "O"]
        self._types = sorted({kind for _, _, kind in parts})
        self.are_bio = all(prefix in ("B", "I") and kind for prefix, _, kind in parts) and any(
            prefix == "B" for prefix, _, _ in parts
        )
        if not self.are_bio:
            return
        try:
            import nervaluate  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "validator.metrics: F1 of entities is nervaluate's: pip install "
                "'ditty_di[examples]', or leave EntityScores out of data.validate.metrics"
            ) from error

    def rows(self, output: Any, batch: Batch, /) -> dict[str, Tensor]:
        """Return labels and predicted classes, and which of them begin a row, `[valid labels]`."""
        valid = batch.target != self.ignore_index  # [rows, seq]
        classes = predicted(output, self.output_index).argmax(-1)
        first = valid & (valid.cumsum(1) == 1)
        found = {"label": batch.target, "predicted": classes, "first": first}
        return {name: tensor[valid] for name, tensor in found.items()}

    def compute(self, rows: Mapping[str, Tensor], /) -> dict[str, float]:
        """Return `entity_precision`, `entity_recall` and `entity_f1`; {} unless labels are BIO."""
        if not self.are_bio:
            return {}
        from nervaluate.evaluator import Evaluator

        ends = rows["first"].nonzero().flatten()[1:]

        def tags(name: str) -> list[list[str]]:
            parts = torch.tensor_split(rows[name], ends)
            return [[self.labels[number] for number in part.tolist()] for part in parts]

        found = Evaluator(tags("label"), tags("predicted"), self._types, loader="list").evaluate()
        scores = found["overall"]["strict"]
        return {
            f"entity_{name}": float(getattr(scores, name)) for name in ("precision", "recall", "f1")
        }


class Recall:
    """How often the positive of an anchor is among the k most similar of the whole validation set.

    A k above the number of candidates, with which it would always be found, is left out with a
    warning. The output is that of `ditty_di.losses.InfoNCELoss`: anchors, then their positives,
    which are the candidates.

    Args:
        k: numbers of candidates that are looked at.
        cosine: similarity is the cosine; otherwise the dot product.
        ignore_index: label of rows that do not count.

    Raises:
        ValueError: a number below 1.
    """

    @staticmethod
    def validate(*, k: Sequence[int] = (1, 5, 10)) -> None:
        """Raise ValueError for a number below 1."""
        if not k or min(k) < 1:
            raise ValueError(f"k={list(k)}: write numbers of candidates, at least 1 each")

    def __init__(
        self, *, k: Sequence[int] = (1, 5, 10), cosine: bool = True, ignore_index: int = -100
    ) -> None:
        self.validate(k=k)
        self.k, self.cosine, self.ignore_index = tuple(k), cosine, ignore_index
        self._told = False

    def rows(self, output: Tensor, batch: Batch, /) -> dict[str, Tensor]:
        """Return the embeddings of anchors and positives, float32 `[rows, features]`."""
        valid = batch.target != self.ignore_index
        anchors, positives = output.float().split(len(valid))[:2]
        return {"anchor": anchors[valid], "positive": positives[valid]}

    def compute(self, rows: Mapping[str, Tensor], /) -> dict[str, float]:
        """Return `recall@k` of each k."""
        anchors, positives = rows["anchor"], rows["positive"]
        if self.cosine:
            anchors, positives = (
                torch.nn.functional.normalize(x, dim=-1) for x in (anchors, positives)
            )
        own = (anchors * positives).sum(-1, keepdim=True)  # [rows, 1]
        piece = max(1, _PIECE // max(1, len(positives)))
        # Its own similarity by another kernel differs in the last bit: it does not outrank itself.
        better = [
            (some @ positives.T > least + 1e-6 * least.abs()).sum(1)
            for some, least in zip(anchors.split(piece), own.split(piece), strict=True)
        ]
        rank = torch.cat(better)  # candidates that are more similar than the positive, [rows]
        if (all_found := [k for k in self.k if k > len(rank)]) and not self._told:
            self._told = True  # not at each validation
            log.warning(_ALL_FOUND, len(rank), ", ".join(f"recall@{k}" for k in all_found))
        return {f"recall@{k}": float((rank < k).double().mean()) for k in self.k if k <= len(rank)}


class Collected:
    """A loss that also keeps the rows of metrics, of the batches that count.

    Args:
        loss_fn: called in its place, with the same value.
        metrics: by whom rows are kept.
    """

    def __init__(self, loss_fn: Loss, metrics: Sequence[ValidationMetric]) -> None:
        self.loss_fn, self.metrics = loss_fn, metrics
        self._kept: list[list[dict[str, Tensor]]] = [[] for _ in metrics]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loss_fn"], name)

    def __call__(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with its metrics."""
        # A batch that a rank repeats, for the others' sake, was not counted.
        for metric, kept in zip(self.metrics, self._kept, strict=True):
            if batch.num_valid is not None:
                rows = metric.rows(output, batch)
                kept.append({name: tensor.detach().cpu() for name, tensor in rows.items()})
        return self.loss_fn(output, batch, num_valid_global)

    def compute(self, runtime: Runtime) -> dict[str, float]:
        """Return the metrics of the rows of all ranks, on every rank; collective.

        Args:
            runtime: the ranks.
        """
        found: dict[str, float] = {}
        for metric, kept in zip(self.metrics, self._kept, strict=True):
            names = kept[0] if kept else ()
            own = {name: torch.cat([rows[name] for rows in kept]) for name in names}
            of_ranks = [rows for rows in runtime.gather(own) if rows]
            names = of_ranks[0] if of_ranks else ()
            rows = {name: torch.cat([rows[name] for rows in of_ranks]) for name in names}
            found |= metric.compute(rows) if rows else {}
        return found
