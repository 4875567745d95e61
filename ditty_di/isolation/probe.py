"""Probe whether a model keeps the documents of a packed row apart, on a tiny row.

The model's class does not tell: it depends on layers, attention kernel and cache.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditty_di.batch import document_index
from ditty_di.data.collate import varlen_arguments
from ditty_di.data.rendering.images import Images
from ditty_di.isolation.forms import FORMS, DocumentInputs
from ditty_di.isolation.positions import position_limit, positions_of
from ditty_di.models.evaluation import evaluating
from ditty_di.replaced import replaced
from ditty_di.seed import preserved_rng

log = logging.getLogger(__name__)

#: Tokens of a probed document: longer than the convolutions of hybrid models (4), and a multiple
#: of 16 for float8 kernels.
LENGTH = 16
_TINY = {"input", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_PLAIN = next(iter(FORMS))


class NotIsolated(ValueError):
    """A model lets the documents of a packed row see each other in every form of input."""


@dataclass
class Isolation:
    """Probe a model in the form in which it is trained, and make it keep documents apart.

    Args:
        module: what is called in training; the hook that adds inputs is registered on it.
        config: the model's configuration, if it has one.
        forward: takes inputs on the CPU and returns the model's output, or a mapping of several.
        device: of the model.
        agree: returns whether a flag is set on any rank; all ranks probe together.
        name: of the model, for messages.
        modules: further modules that take part, put in evaluation mode for the probe.
        form: the chosen one of `FORMS`, once it is known.
    """

    module: nn.Module
    config: Any
    forward: Callable[[dict[str, Any]], Any]
    device: torch.device
    agree: Callable[[bool], bool]
    name: str
    modules: Iterable[Any] = ()
    form: str | None = None
    _eps: float = 0.0  # of the outputs' dtype
    _runs: bool = True
    _coupling: float = 0.0  # how far outputs move with another row's tokens
    _rounding: float = 0.0  # and with the row's length

    @property
    def added(self) -> str | None:
        """Argument that batches get beside `position_ids`, one of `FORMS`, or None."""
        return None if self.form == _PLAIN else self.form

    def ensure(self, sample: Mapping[str, Any]) -> None:
        """Probe with batches like `sample`, the inputs of a micro-batch, and choose a form.

        Raises:
            NotIsolated: no added input keeps the model's documents apart.
        """
        if self.form is not None:
            return
        batch = _Probe.like(sample, limit=position_limit(self.module, self.config))
        if batch is None:
            log.warning("%s: packed rows are not probed, for the data has one token", self.name)
            return
        with self._probing(), ExitStack() as stack:
            self._measure(batch)
            if self.agree(self._coupling > 0):
                # Quantization by the scale of a whole tensor (float8) couples all tokens, which
                # would hide documents that see each other.
                stack.enter_context(_high_precision_linears(self.module))
                self._measure(batch)
            self.form = self._choose(batch)
        if self.added is not None:
            log.info(
                "%s does not keep the documents of a row apart by position_ids alone: each batch "
                "gets %s as well (probed: no document sees another)",
                self.name,
                self.added,
            )

    def ensure_images(self, images: Images) -> None:
        """Compare documents with an image each in one row with each alone.

        That tells more than other tokens do: some models attend within an image in both directions,
        by a mask that need not know about documents.

        Args:
            images: the processor; called after `ensure`.

        Raises:
            NotIsolated: an image's tokens are not seen as they are alone.
        """
        documents = images.blank_documents()
        with self._probing():
            alone = [self._outputs(_with_images(images, [ids])) for ids in documents]
            together = self._outputs(_with_images(images, documents))
        error, scale = 0.0, max((float(t.abs().max()) for t in together), default=0.0)
        for n, row in enumerate(together):
            at = 0
            for ids, own in zip(documents, alone, strict=True):
                here = (row[0, at : at + len(ids)] - own[n][0]).abs().nan_to_num(torch.inf)
                error, at = max(error, float(here.max())), at + len(ids)
        if self.agree(error > max(1e-5, 4 * self._eps) * scale + 8 * self._rounding):
            raise NotIsolated(
                f"{self.name}: documents with images differ in a packed row from each alone (by "
                f"{error:.2g}); use batching=padded or length_grouped"
            )

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Leave the state of the training as it is, and compile nothing for the probe's shapes."""
        compiles = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        modules = [self.module, *self.modules]
        with torch.no_grad(), evaluating(modules), preserved_rng(self.device), eager:
            yield

    def _choose(self, batch: _Probe) -> str | None:
        """Return the first form that works, with its hook registered; None if nothing is seen."""
        reason, cause = "", None
        for name, form in FORMS.items():
            if form.inputs(torch.zeros(1, 2, dtype=torch.long), self.config) is None:
                continue
            remove = DocumentInputs(form, self.config).attach(self.module)
            plain = name == _PLAIN
            try:
                found = self._fault(batch, plain)
            except Exception as error:  # a kernel or signature that does not take this form
                if plain and not self._runs:
                    raise
                found = f"{type(error).__name__}: {error}".splitlines()[0]
                cause = error if plain else cause
            if plain or found != "":
                remove()
            if not self.agree(bool(found)):
                return None if found is None else name
            remove()
            reason = reason or found or "another rank cannot keep documents apart"
        raise NotIsolated(
            f"{self.name}: {reason}; use batching=padded or length_grouped"
        ) from cause

    def _fault(self, batch: _Probe, plain: bool) -> str | None:
        """Return what goes wrong in packed rows, "" for nothing, None where nothing is seen."""
        first = self._outputs(batch.inputs())
        if not first:
            log.warning("%s: packed rows are not probed, for no output is a token's", self.name)
            return None
        scale = max(1e-12, *(float(tensor.abs().max().nan_to_num(1.0)) for tensor in first))
        # A correct model gives the same bits: other documents' scores are masked to exactly 0, and
        # each row of a product is computed alone.
        exact, depends_on_tokens = 1e-6 * scale + 8 * self._coupling, False
        for changed in range(2):
            leak = 0.0
            second = self._outputs(batch.inputs(changed))
            inside = batch.slots == changed
            for before, after in zip(first, second, strict=True):
                delta = (after - before).abs().flatten(2).amax(-1)  # [rows, length]
                depends_on_tokens |= bool((delta[inside] > 0).any())
                # NaN is not evidence of isolation, and max() would drop it
                leak = max(leak, float(delta[~inside].nan_to_num(torch.inf).max()))
            if self.agree(leak > exact):
                return (
                    f"state crosses documents (tokens of one document change the outputs of "
                    f"another in its row by {leak:.2g})"
                )
        # Copies of a document at other offsets, or under another mask, differ by the rounding of
        # other kernels: some units of the outputs' precision, and the difference between rows of
        # other lengths.
        rounded = max(1e-5, 4 * self._eps) * scale + 8 * self._rounding
        moved = batch.restart_error(first)
        if self.agree(moved > rounded):
            return (
                f"positions do not restart with each document of a row (a document's outputs "
                f"differ by {moved:.2g} from its own at the row's beginning)"
            )
        if not plain and (lost := self._context_error(batch)) > rounded:
            return f"the mask changes what one document sees of itself (by {lost:.2g})"
        if not depends_on_tokens:
            log.warning("%s: packed rows are not probed: no output depends on tokens", self.name)
            return None
        return ""

    def _measure(self, batch: _Probe) -> None:
        """Measure how far outputs move with another row's tokens, and with the row's length.

        Rows are of one document each, as when they are padded.
        """
        self._coupling = self._rounding = 0.0
        tokens = batch.tokens[:, : 3 * batch.length]
        try:
            alone = self._outputs({"input": torch.stack([tokens[0], tokens[0]])})
            beside = self._outputs({"input": torch.stack([tokens[0], tokens[1]])})
            short = self._outputs({"input": tokens[:1, : batch.length]})
        except Exception:  # a model that needs more inputs than tokens, or cannot run at all
            self._runs = False
            return
        for a, b, s in zip(alone, beside, short, strict=True):
            self._coupling = max(self._coupling, float((a[0] - b[0]).abs().max()))
            by_length = float((b[0, : s.shape[1]] - s[0]).abs().max())
            self._rounding = max(self._rounding, by_length + self._coupling)

    def _context_error(self, batch: _Probe) -> float:
        """Return how far the added inputs change a row of one document, as long as rows get.

        A mask that is added replaces the model's own, and with it a sliding window, for example.
        """
        row = batch.tokens[:1, : batch.row]
        plain = self._outputs({"input": row})
        positions = torch.arange(row.shape[1])[None]
        masked = self._outputs({"input": row, "position_ids": positions})
        return max(float((a - b).abs().max()) for a, b in zip(plain, masked, strict=True))

    def _outputs(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Return the floating outputs `[rows, length, ...]` of the model, float32 on the CPU."""
        torch.manual_seed(0)  # noise (of a preprocessor) is the same in each pass
        shape = inputs["input"].shape[:2]
        found = [
            tensor.detach()
            for tensor in _tensors(self.forward(inputs))
            if tensor.is_floating_point() and tensor.dim() > 2 and tensor.shape[:2] == shape
        ]
        self._eps = max((torch.finfo(tensor.dtype).eps for tensor in found), default=0.0)
        return [tensor.float().cpu() for tensor in found]


@dataclass
class _Probe:
    """Packed rows whose documents all are beginnings of one sequence of tokens.

    Args:
        extra: inputs beside the tokens.
        position_ids: `[rows, length]`.
        slots: the number of each token's document in the batch, `[rows, length]`.
        tokens: two sequences `[2, n, ...]` that differ everywhere.
        length: of the longest document.
        row: length of a real row.
    """

    extra: dict[str, Any]
    position_ids: Tensor
    slots: Tensor
    tokens: Tensor
    length: int
    row: int

    @classmethod
    def like(cls, sample: Mapping[str, Any], *, limit: int | None) -> _Probe | None:
        """Return tiny rows with the keys of `sample`, or its own rows where a key is unknown.

        Args:
            sample: the inputs of a micro-batch.
            limit: number of positions that the model has.
        """
        given = sample["input"]
        rows, row = given.shape[:2]
        row = row if limit is None else min(row, limit)
        if tiny := sample.keys() <= _TINY:
            length = LENGTH if limit is None else min(LENGTH, limit)
            positions = torch.arange(length).repeat(3).expand(min(rows, 2), -1).contiguous()
        else:
            positions = positions_of(sample)
            length = int(positions.max()) + 1
        index = document_index(positions)
        counts = index[:, -1] + 1
        slots = index + (counts.cumsum(0) - counts)[:, None]
        pool = given.flatten(0, 1).unique(dim=0)
        if len(pool) < 2:
            return None
        longest = max(3 * length, row)
        at = torch.randint(len(pool), (longest,), generator=torch.Generator().manual_seed(0))
        tokens = torch.stack([pool[at], pool[(at + 1) % len(pool)]])
        extra = {k: v for k, v in sample.items() if k != "input"}
        if tiny:
            extra = {"position_ids": positions} if "position_ids" in sample else {}
            if "cu_seq_lens_q" in sample:
                extra |= varlen_arguments(positions)
        return cls(extra, positions, slots, tokens, length, row)

    def inputs(self, changed: int | None = None) -> dict[str, Any]:
        """Return the batch; document number `changed` has other tokens."""
        tokens = self.tokens[0][self.position_ids]
        if changed is not None:
            inside = self.slots == changed
            tokens[inside] = self.tokens[1][self.position_ids[inside]]
        return {"input": tokens, **self.extra}

    def restart_error(self, outputs: list[Tensor]) -> float:
        """Return how far documents are from their beginning in the first one of its row."""
        common = self.position_ids < int((self.slots == 0).sum())
        errors = (
            (output[common] - output[self.slots == 0][self.position_ids[common]]).abs()
            for output in outputs
        )
        return max(float(error.nan_to_num(torch.inf).max()) for error in errors)


def _with_images(images: Images, documents: list[Tensor]) -> dict[str, Any]:
    """Return one row of documents with an image each."""
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    inputs = {"input": ids, "position_ids": positions[None]}
    blank = [images.blank] * len(documents)
    return inputs | varlen_arguments(positions[None]) | images.inputs(ids, blank)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, which may be nested."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # a kind that is not registered with pytree
            yield from _tensors(list(leaf.values()))


@contextmanager
def _high_precision_linears(module: nn.Module) -> Iterator[None]:
    """Let linear layers that quantize a floating weight multiply by the weight as it is."""
    changed = [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear)
        and type(part).forward is not nn.Linear.forward
        and part.weight.is_floating_point()
        and "forward" not in vars(part)
    ]
    with ExitStack() as stack:
        for part in changed:
            stack.enter_context(replaced(vars(part), "forward", partial(_multiply, part)))
        yield


def _multiply(part: nn.Linear, x: Tensor) -> Tensor:
    bias = None if part.bias is None else part.bias.to(x.dtype)
    return nn.functional.linear(x, part.weight.to(x.dtype), bias)
