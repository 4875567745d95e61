"""Losses of a model's output and a context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import contract_of_class, given_arguments, snake_case
from ditty_di.losses.cross_entropy import CrossEntropyLoss
from ditty_di.processors.context import Context, MissingKey
from ditty_di.processors.outputs import predicted

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, Loss

BEFORE_THE_MODEL = """\
what a batch weighs is counted before the model runs, so it has to be a preprocessor and no \
postprocessor"""


@dataclass
class LossOutput:
    """A loss, shape `[]`, and numbers to report: both means over what the batch weighs.

    `loss` and `grad_norm` are what the trainer reports; a metric of that name is not seen.
    """

    loss: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


class LossCalculator(nn.Module):
    """A loss that finds its prediction in the model's output and its target in the context.

    A subclass overrides `compute`, a mean, and `weight` when that is not a mean over rows: how much
    the batch counts, from its target and mask alone. The mean times the weight is a sum, and sums
    over the window's total weight are what training needs: so N micro-batches equal one, and many
    ranks equal one, for the loss and for each metric.

    Fits the trainer's `loss_fn` slot. Labels without a context (no processors) are the target.

    Args:
        output_index: the prediction in the model's output: a position (0 is also an output that is
            one tensor), or a name such as `"logits"`.
        target_key: the context's key, or path (`"forward_kwargs.t"`), of the target.
        mask_key: the same of the mask; None for no mask.
        name: what its metrics are called in a composite; None is the class's in snake case.
        contract: what it takes (`ditty_di.contracts.grammar`); a class may have the text as its
            attribute `contract`, or a class method `contract_for`, instead.
    """

    #: Where labels are, this loss takes the context.
    takes_context = True
    #: The text in a class; in an object, the `Contract` or None.
    contract: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        object.__setattr__(self, "_given", given_arguments(cls, args, kwargs))
        return self

    def __init__(
        self,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__()
        if isinstance(output_index, int) and output_index < 0:
            raise ValueError(f"output_index={output_index}: count from the front, from 0")
        self.output_index = output_index
        self.target_key, self.mask_key = target_key, mask_key
        self.name = name or snake_case(type(self).__name__)
        keys = {"output_index": output_index, "target_key": target_key, "mask_key": mask_key}
        given = {**vars(self)["_given"], **keys}
        self.contract = as_contract(contract) or contract_of_class(type(self), given)

    @classmethod
    def contract_for(
        cls,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        **others: Any,
    ) -> str | None:
        """The contract of a loss with these arguments; None to have none, or the attribute's."""
        return None

    # ------------------------------------------------------------------------ for subclasses
    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """The mean over what the batch weighs, as `weight` tells it. Metrics likewise."""
        raise NotImplementedError(f"{type(self).__name__} has no compute(model_output, ctx)")

    def weight(self, ctx: Context) -> Tensor:
        """How much the batch counts, shape `[]`; here its rows, as the loader gave them.

        Called before the model runs and again with the loss: what it reads must not be changed
        behind the model.
        """
        inputs, _ = ctx.get("original_batch", ({}, None))
        rows = inputs["input"] if "input" in inputs else ctx.at(self.target_key)
        return torch.tensor(len(rows), dtype=torch.int64)

    def get_prediction(self, model_output: Any, ctx: Context | None = None) -> Any:
        """What `output_index` means; a postprocessor's output counts as the model's."""
        return predicted(model_output, self.output_index)

    def get_target(self, ctx: Context) -> Any:
        """What `target_key` means.

        Raises:
            KeyError: nobody has written it.
        """
        return ctx.at(self.target_key)

    def get_mask(self, ctx: Context) -> Any:
        """What `mask_key` means; None without one.

        Raises:
            KeyError: nobody has written it.
        """
        return None if self.mask_key is None else ctx.at(self.mask_key)

    # ----------------------------------------------------------------------- for the trainer
    def count(self, batch: Batch, /) -> Tensor:
        """`weight` of a batch or of `(inputs, ctx)`, on the CPU; shape `[]`.

        Raises:
            MissingKey: `weight` needs what only a postprocessor writes.
        """
        inputs, labels = batch
        ctx = as_context(labels)
        if "original_batch" not in ctx:
            ctx = Context({**ctx, "original_batch": (inputs, labels)})
        try:
            return self.weight(ctx).detach().cpu()
        except MissingKey as error:
            raise MissingKey(f"{self.name}: {error}; {BEFORE_THE_MODEL}") from None

    def forward(
        self, output: Any, labels: Any, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the mean over `global_count`, and of each metric; shapes `[]`."""
        ctx = as_context(labels)
        computed = self.compute(output, ctx)
        if not isinstance(computed, LossOutput) or computed.loss.dim():
            found = type(computed).__name__
            if isinstance(computed, LossOutput):
                found = f"a loss of shape {list(computed.loss.shape)}"
            raise TypeError(
                f"{self.name}.compute returned {found}; it must return LossOutput(loss, metrics), "
                f"the loss a mean of shape []"
            )
        share = self.share(ctx, global_count)
        return computed.loss * share, {
            name: torch.as_tensor(value, device=share.device).detach() * share
            for name, value in computed.metrics.items()
        }

    def share(self, ctx: Context, global_count: Tensor) -> Tensor:
        """Which part of `global_count` the batch is, on its device; shape `[]`."""
        return (self.weight(ctx).to(global_count.device) / global_count).float()

    def extra_repr(self) -> str:
        return f"name={self.name}, contract={str(self.contract) if self.contract else None}"


class CrossEntropyCalculator(LossCalculator):
    """Cross-entropy in nats a valid label, of logits and a target anywhere.

    `CrossEntropyLoss` as a `LossCalculator`: for outputs of several tensors, for targets that
    processors write, and in composites.

    Args:
        shift: compare position t with label t + 1, for labels that are a copy of the input.
        ignore_index: labels with this value weigh nothing.

    Shapes: logits `[batch, ..., classes]`; labels, and the mask if there is one, `[batch, ...]`.
    Labels weigh nothing where the mask is 0.
    """

    def __init__(
        self,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        shift: bool = False,
        ignore_index: int = -100,
        name: str | None = None,
        contract: str | Contract | None = None,
    ) -> None:
        super().__init__(
            output_index=output_index,
            target_key=target_key,
            mask_key=mask_key,
            name=name,
            contract=contract,
        )
        self.ignore_index = ignore_index
        self.cross_entropy = CrossEntropyLoss(shift=shift, ignore_index=ignore_index)

    @classmethod
    def contract_for(
        cls,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        **others: Any,
    ) -> str | None:
        mask = f", ctx.{mask_key}:n" if mask_key else ""
        return f"{output_index}:n+1:f | ctx.{target_key}:n:i64{mask} -> loss:0:f"

    def weight(self, ctx: Context) -> Tensor:
        """Valid labels."""
        return self.cross_entropy.count(({}, self._labels(ctx)))

    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        labels = self._labels(ctx)
        count = self.cross_entropy.count(({}, labels)).clamp(min=1)
        loss, _ = self.cross_entropy(self.get_prediction(model_output, ctx), labels, count)
        return LossOutput(loss, {"ce": loss})

    def _labels(self, ctx: Context) -> Tensor:
        labels, mask = self.get_target(ctx), self.get_mask(ctx)
        if mask is None:
            return labels  # type: ignore[no-any-return]
        if mask.shape != labels.shape:
            raise ValueError(
                f"{self.name}: ctx.{self.mask_key} has shape {list(mask.shape)}, but the labels "
                f"that it masks have {list(labels.shape)}"
            )
        return labels.masked_fill(mask == 0, self.ignore_index)


def as_context(labels: Any) -> Context:
    """The context that stands in place of labels; a new one around plain labels."""
    return labels if isinstance(labels, Context) else Context(target=labels)


def labels_for(loss: Loss, labels: Any) -> Any:
    """What a loss is called with: the context, or the target in it when it takes labels alone."""
    if getattr(loss, "takes_context", False) or not isinstance(labels, Context):
        return labels
    return labels["target"]
