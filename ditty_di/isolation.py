"""Keep the documents of a packed row apart: probe the model, add inputs where it needs them.

Whether a model isolates documents that share a row cannot be read off its class: it depends on
its layers, its attention kernel and its cache. So the model itself is asked, on a tiny row.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.data.collate import varlen_arguments
from ditty_di.metrics.validation import evaluating, preserved_rng

if TYPE_CHECKING:
    Forward = Callable[[dict[str, Any]], Any]
    Form = Callable[[Tensor, Any], dict[str, Any] | None]

log = logging.getLogger(__name__)

#: Tokens of a probed document: longer than the convolutions of hybrid models (4), and a multiple
#: of 16 for float8 kernels.
LENGTH = 16
_TINY = {"input", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_INSTEAD = "use batching=padded or length_grouped"


def document_index(position_ids: Tensor) -> Tensor:
    """Return the number of each token's document within its row; both `[rows, length]`.

    A document begins wherever a position is not the one before plus 1.
    """
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts.cumsum(1)


# -- inputs that can keep documents apart ----------------------------------------------------------


def _block_mask(position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return the causal block-diagonal mask, bool `[rows, 1, length, length]`; True is visible."""
    document = document_index(position_ids)
    at = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = at[:, None] - at
    visible = (document[:, :, None] == document[:, None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return visible[:, None]


def _additive(mask: Tensor) -> Tensor:
    """Return 0 where the mask is True and -inf elsewhere, in torch's default dtype.

    Each row sees itself, so softmax never gets -inf alone.
    """
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _additive_by_layer(position_ids: Tensor, config: Any) -> dict[str, Any] | None:
    """One additive mask for each kind of layer, for models whose windows differ by layer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    if window is None or not kinds <= windows.keys():
        return None
    masks = {kind: _additive(_block_mask(position_ids, windows[kind])) for kind in sorted(kinds)}
    return {"attention_mask": masks}


def _sequence_index(position_ids: Tensor) -> Tensor:
    return document_index(position_ids).to(torch.int32)


#: What each batch gets beside `position_ids`, in the order in which it is tried; None: not for
#: this configuration.
FORMS: dict[str, Form] = {
    "position_ids alone": lambda positions, config: {},
    "use_cache=False": lambda positions, config: {"use_cache": False},
    "a 4-D boolean attention_mask": lambda positions, config: {
        "attention_mask": _block_mask(positions)
    },
    "a 4-D additive attention_mask": lambda positions, config: {
        "attention_mask": _additive(_block_mask(positions))
    },
    "a 4-D attention_mask for each kind of layer": _additive_by_layer,
    "seq_idx": lambda positions, config: {"seq_idx": _sequence_index(positions)},
    "seq_idx and a 4-D boolean attention_mask": lambda positions, config: {
        "seq_idx": _sequence_index(positions),
        "attention_mask": _block_mask(positions),
    },
    "seq_idx and a 4-D additive attention_mask": lambda positions, config: {
        "seq_idx": _sequence_index(positions),
        "attention_mask": _additive(_block_mask(positions)),
    },
}


class DocumentInputs:
    """A forward pre-hook that adds what keeps documents apart to each call with `position_ids`.

    Calls with an `attention_mask` or a key-value cache, as in generation, are left alone.
    """

    def __init__(self, form: Form, config: Any) -> None:
        self.form, self.config = form, config

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        taken = (kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if positions is None or positions.dim() != 2 or any(taken):
            return None
        return args, {**kwargs, **(self.form(positions, self.config) or {})}


# -- the probe -------------------------------------------------------------------------------------


class NotIsolated(ValueError):
    """A model lets the documents of a packed row see each other, whatever it is given."""


@dataclass
class Isolation:
    """Probe a model in the form in which it is trained, and make it keep documents apart.

    Args:
        module: what is called in training; the hook that adds inputs is registered on it.
        config: the model's configuration, if it has one.
        forward: takes inputs on the CPU and returns the model's output, or a mapping of several.
        agree: whether a flag is set on any rank; all ranks probe together.
        name: what the model is called in messages.
        modules: further modules that take part, put in evaluation mode for the probe.
    """

    module: nn.Module
    config: Any
    forward: Forward
    device: torch.device
    agree: Callable[[bool], bool]
    name: str
    modules: Iterable[Any] = ()
    form: str | None = None
    _eps: float = 0.0
    _runs: bool = True
    _coupling: float = 0.0
    _rounding: float = 0.0

    def ensure(self, sample: Mapping[str, Any]) -> None:
        """Probe with batches like `sample`, the inputs of a micro-batch, and choose a form.

        Raises:
            NotIsolated: nothing that could be added keeps the model's documents apart.
        """
        if self.form is not None:
            return
        batch = _Probe.like(sample, limit=position_limit(self.module, self.config))
        if batch is None:
            log.warning("%s: packed rows are not probed, for the data has one token", self.name)
            return
        with (
            torch.no_grad(),
            evaluating([self.module, *self.modules]),
            preserved_rng(self.device),
            _eager(),
            ExitStack() as stack,
        ):
            self._measure(batch)
            if self.agree(self._coupling > 0):
                # Quantisation by the scale of a whole tensor (float8) couples all tokens, which
                # would hide documents that see each other.
                stack.enter_context(_high_precision_linears(self.module))
                self._measure(batch)
            self.form = self._choose(batch)
        if self.form is not None and self.form != next(iter(FORMS)):
            log.info(
                "%s does not keep the documents of a row apart by position_ids alone: each batch "
                "gets %s as well (probed: no document sees another)",
                self.name,
                self.form,
            )

    def _choose(self, batch: _Probe) -> str | None:
        reason, cause = "", None
        for name, form in FORMS.items():
            if form(torch.zeros(1, 2, dtype=torch.long), self.config) is None:
                continue
            hook = self.module.register_forward_pre_hook(
                DocumentInputs(form, self.config), with_kwargs=True, prepend=True
            )
            plain = name == next(iter(FORMS))
            try:
                found = self._fault(batch, plain)
            except Exception as error:  # a kernel or signature that does not take this form
                if plain and not self._runs:
                    raise
                found = f"{type(error).__name__}: {error}".splitlines()[0]
                cause = error if plain else cause
            if plain or found != "":
                hook.remove()
            if not self.agree(bool(found)):
                return None if found is None else name
            hook.remove()
            reason = reason or found or "another rank cannot keep documents apart"
        raise NotIsolated(f"{self.name}: {reason}; {_INSTEAD}") from cause

    def _fault(self, batch: _Probe, plain: bool) -> str | None:
        """Return what goes wrong in packed rows, "" for nothing, None where nothing is seen."""
        first = self._outputs(batch.inputs())
        if not first:
            log.warning("%s: packed rows are not probed, for no output is a token's", self.name)
            return None
        scale = max(1e-12, *(float(tensor.abs().max().nan_to_num(1.0)) for tensor in first))
        # A correct model gives the same bits: other documents' scores are masked to exactly 0, and
        # each row of a product is computed alone.
        exact, power = 1e-6 * scale + 8 * self._coupling, False
        for changed in range(2):
            leak = 0.0
            second = self._outputs(batch.inputs(changed))
            inside = batch.slots == changed
            for before, after in zip(first, second, strict=True):
                delta = (after - before).abs().flatten(2).amax(-1)
                power |= bool((delta[inside] > 0).any())
                # NaN is not evidence of isolation, and max() would drop it
                leak = max(leak, float(delta[~inside].nan_to_num(torch.inf).max()))
            if self.agree(leak > exact):
                return (
                    f"state crosses documents (tokens of one document change the outputs of "
                    f"another in its row by {leak:.2g})"
                )
        # Copies of a document at other offsets, or under another mask, differ by the rounding of
        # other kernels: some units of the outputs' precision, and what rows of other lengths
        # differ by.
        rounded = max(1e-5, 4 * self._eps) * scale + 8 * self._rounding
        moved = batch.restart_error(first)
        if self.agree(moved > rounded):
            return (
                f"positions do not restart with each document of a row (a document's outputs "
                f"differ by {moved:.2g} from its own at the row's beginning)"
            )
        if not plain and (lost := self._context_error(batch)) > rounded:
            return f"the mask changes what one document sees of itself (by {lost:.2g})"
        if not power:
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
            self._rounding = max(
                self._rounding, float((b[0, : s.shape[1]] - s[0]).abs().max()) + self._coupling
            )

    def _context_error(self, batch: _Probe) -> float:
        """How far a row of one document, as long as rows get, is from the model without additions.

        A mask that is added replaces the model's own, and with it a sliding window, say.
        """
        row = batch.long_row()
        plain = self._outputs({"input": row})
        positions = torch.arange(row.shape[1])[None]
        masked = self._outputs({"input": row, "position_ids": positions})
        return max(float((a - b).abs().max()) for a, b in zip(plain, masked, strict=True))

    def _outputs(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The floating outputs `[rows, length, ...]` of the model, in float32 on the CPU."""
        torch.manual_seed(0)  # what noise there is (a preprocessor's) is the same in each pass
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

    `position_ids` and `slots` (the number of a token's document in the batch) `[rows, length]`;
    `tokens` two sequences `[2, n, ...]` that differ everywhere; `row` is the length of a real row.
    """

    extra: dict[str, Any]
    position_ids: Tensor
    slots: Tensor
    tokens: Tensor
    length: int
    row: int

    @classmethod
    def like(cls, sample: Mapping[str, Any], *, limit: int | None) -> _Probe | None:
        """Tiny rows with the keys of `sample`, or its own rows where a key is unknown."""
        given = sample["input"]
        rows, row = given.shape[:2]
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
        longest = max(3 * length, row if limit is None else min(row, limit))
        at = torch.randint(len(pool), (longest,), generator=torch.Generator().manual_seed(0))
        tokens = torch.stack([pool[at], pool[(at + 1) % len(pool)]])
        extra = {k: v for k, v in sample.items() if k != "input"}
        if tiny:
            extra = {"position_ids": positions} if "position_ids" in sample else {}
            if "cu_seq_lens_q" in sample:
                extra |= varlen_arguments(positions)
        return cls(
            extra, positions, slots, tokens, length, row if limit is None else min(row, limit)
        )

    def inputs(self, changed: int | None = None) -> dict[str, Any]:
        """The batch; document number `changed` has other tokens."""
        tokens = self.tokens[0][self.position_ids]
        if changed is not None:
            inside = self.slots == changed
            tokens[inside] = self.tokens[1][self.position_ids[inside]]
        return {"input": tokens, **self.extra}

    def restart_error(self, outputs: list[Tensor]) -> float:
        """How far documents are from their beginning in the first one, which nothing precedes."""
        reference = self.position_ids[self.slots == 0]
        common = self.position_ids < len(reference)
        return max(
            float(
                (output[common] - output[self.slots == 0][self.position_ids[common]])
                .abs()
                .nan_to_num(torch.inf)
                .max()
            )
            for output in outputs
        )

    def long_row(self) -> Tensor:
        return self.tokens[:1, : self.row]


def positions_of(sample: Mapping[str, Any]) -> Tensor:
    """Return the position of each token in its document, `[rows, length]`, from what is there.

    `position_ids`, else the borders `cu_seq_lens_q`, else the numbers `seq_idx`; without any of
    them each row is one document.
    """
    rows, length = sample["input"].shape[:2]
    given, borders, index = (sample.get(k) for k in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.expand(rows, length).contiguous()
    at = torch.arange(rows * length)
    if isinstance(borders, Tensor):
        starts = borders.cpu().long()
        return (at - starts[torch.searchsorted(starts, at, right=True) - 1]).view(rows, length)
    at = at[:length].expand(rows, length)
    if isinstance(index, Tensor) and index.shape == (rows, length):
        new = torch.ones_like(index, dtype=torch.bool)
        new[:, 1:] = index.diff(dim=1) != 0
        return at - torch.where(new, at, 0).cummax(1).values
    return at.contiguous()


def holds_several(sample: Mapping[str, Any]) -> bool:
    """Whether some row of a micro-batch's inputs holds more than one document."""
    given = sample.get("input")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return False
    return bool((positions_of(sample).diff(dim=1) != 1).any())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _eager() -> AbstractContextManager[Any]:
    """Compiled layers run eagerly: the probe's shapes are none to compile for."""
    return (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else nullcontext()
    )


@contextmanager
def _high_precision_linears(module: nn.Module) -> Iterator[None]:
    """Let linear layers that keep a floating weight multiply by it as it is, without quantising."""
    changed = [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear)
        and type(part).forward is not nn.Linear.forward
        and part.weight.is_floating_point()
        and "forward" not in vars(part)
    ]
    try:
        for part in changed:
            vars(part)["forward"] = partial(_multiplied, part)
        yield
    finally:
        for part in changed:
            del vars(part)["forward"]


def _multiplied(part: nn.Linear, x: Tensor) -> Tensor:
    bias = None if part.bias is None else part.bias.to(x.dtype)
    return nn.functional.linear(x, part.weight.to(x.dtype), bias)


# -- position tables -------------------------------------------------------------------------------


def position_limit(module: nn.Module, config: Any) -> int | None:
    """Return how many positions the model has a table for; None where it has none, as with RoPE.

    A table is an embedding that is not that of tokens, or a buffer made anew with each model, of as
    many rows as the configuration has positions (up to 8 more: OPT and its kin keep an offset).
    """
    positions = configured_positions(config)
    if positions is None:
        return None
    tokens = {id(embedding) for embedding in _token_embeddings(module)}
    for part in module.modules():
        more = part.num_embeddings - positions if isinstance(part, nn.Embedding) else -1
        if 0 <= more <= 8 and id(part) not in tokens:
            return positions
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if (
                buffer is not None
                and buffer.dim() >= 2
                and positions
                in (
                    buffer.shape[0] if buffer.dim() == 2 else None,
                    buffer.shape[-1] if buffer.shape[-1] == buffer.shape[-2] else None,
                )
            ):
                return positions
    return None


def configured_positions(config: Any) -> int | None:
    """Return the positions that a configuration of transformers names; None without."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _token_embeddings(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                yield getattr(part, getter)()
            except (AttributeError, NotImplementedError, TypeError):
                continue


def check_positions(
    module: nn.Module, config: Any, dataset: Any, sample: Mapping[str, Any], *, name: str
) -> None:
    """Compare the longest row of a data set with the positions that the model has.

    Raises:
        ValueError: the model has a table of positions, and rows are longer.
    """
    positions = configured_positions(config)
    longest = _longest(config, dataset, sample)
    if positions is None or longest <= positions:
        return
    if position_limit(module, config) is not None:
        raise ValueError(
            f"{name}: rows of up to {longest} tokens, the model has {positions} positions: cut "
            f"them with data.seq_len={positions}, or take a model with more positions"
        )
    log.warning(
        "%s: rows of up to %d tokens, beyond the %d that its configuration names "
        "(max_position_embeddings); positions are computed, so it runs",
        *(name, longest, positions),
    )


def _longest(config: Any, dataset: Any, sample: Mapping[str, Any]) -> int:
    """The largest number of positions in a row: as the data set knows it, or as in the sample."""
    if not getattr(config, "is_encoder_decoder", False):
        for name in ("longest", "lengths", "seq_len"):
            found: Any = getattr(dataset, name, None)
            if isinstance(found, int):
                return found
            if getattr(found, "ndim", 0) == 1 and len(found):
                return int(max(found))
    return int(positions_of(sample).max()) + 1
