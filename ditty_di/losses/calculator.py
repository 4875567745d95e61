"""Losses computed from a model's output and a context."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditty_di.batch import Batch, Context, MissingKey
from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import contract_of_class, snake_case
from ditty_di.losses.base import Loss
from ditty_di.processors.base import Configured
from ditty_di.processors.outputs import predicted


@dataclass
class LossOutput:
    """A loss and metrics, both means over the valid elements of a batch.

    Args:
        loss: shape `[]`.
        metrics: numbers to report by name. The names `loss` and `grad_norm` are the trainer's.
    """

    loss: Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False, repr=False, kw_only=True)
class LossCalculator(Configured, Loss):
    """Base class of losses that find prediction and target by key.

    A subclass overrides `compute`, a mean over the batch, and `count_valid` unless that mean is
    over rows. Mean times count is a sum; sums divided by the count of the whole optimizer step give
    the loss, and each metric, of one large batch for any number of micro-batches and ranks.

    Args:
        output_index: the prediction in the model's output: a position (0 is also an output that is
            one tensor), or a name such as `"logits"`.
        target_key: context key, or path such as `"forward_kwargs.t"`, of the target.
        mask_key: context key, or path, of the mask; None for no mask.
        name: prefix of its metrics in a composite; None is the class name in snake case.
        contract: what it reads (`ditty_di.contracts.grammar`); None is the class attribute
            `contract`, or what the class method `contract_for` returns.

    Raises:
        ValueError: `output_index` is negative.
    """

    #: Contract as a format string of the arguments; `{mask}` is the mask's entry, or empty.
    contract_template: ClassVar[str | None] = None

    output_index: int | str = 0
    target_key: str = "target"
    mask_key: str | None = None
    name: str | None = None  # type: ignore[assignment]
    contract: str | Contract | None = None

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        if isinstance(self.output_index, int) and self.output_index < 0:
            raise ValueError(f"output_index={self.output_index}: count from the front, from 0")
        self.name = self.name or snake_case(type(self).__name__)
        own = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        given = {**vars(self)["_given"], **own}
        self.contract = as_contract(self.contract) or contract_of_class(type(self), given)

    @classmethod
    def contract_for(
        cls,
        *,
        output_index: int | str = 0,
        target_key: str = "target",
        mask_key: str | None = None,
        **others: Any,
    ) -> str | None:
        """Return the contract of a loss with these arguments, or None for no contract.

        Args:
            output_index: the prediction in the model's output.
            target_key: context key of the target.
            mask_key: context key of the mask.
            others: other arguments of the constructor.
        """
        if cls.contract_template is None or "." in str(output_index):
            return None
        mask = f", ctx.{mask_key}:n" if mask_key else ""
        return cls.contract_template.format(
            output_index=output_index, target_key=target_key, mask=mask
        )

    # ------------------------------------------------------------------------ for subclasses
    def compute(self, model_output: Any, ctx: Context) -> LossOutput:
        """Return loss and metrics as means over the batch's valid elements.

        Args:
            model_output: the model's output after the postprocessors.
            ctx: the batch's context.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compute(model_output, ctx)")

    def count_valid(self, ctx: Context) -> Tensor:
        """Return how many elements the mean of `compute` is over, shape `[]`; here rows.

        It is called before the model runs and again with the loss, so postprocessors must not
        change what it reads.

        Args:
            ctx: the batch's context.
        """
        inputs, _ = ctx.get("original_batch", ({}, None))
        rows = inputs["input"] if "input" in inputs else self.get_target(ctx)
        return torch.tensor(len(rows), dtype=torch.int64)

    def get_prediction(self, model_output: Any, ctx: Context | None = None) -> Any:
        """Return the prediction that `output_index` selects.

        Args:
            model_output: the model's output.
            ctx: the batch's context; not used here.
        """
        return predicted(model_output, self.output_index)

    def get_target(self, ctx: Context) -> Any:
        """Return the target that `target_key` names.

        Args:
            ctx: the batch's context.

        Raises:
            MissingKey: the context does not have it.
        """
        return ctx.at(self.target_key)

    def get_mask(self, ctx: Context) -> Any:
        """Return the mask that `mask_key` names, or None without a key.

        Args:
            ctx: the batch's context.

        Raises:
            MissingKey: the context does not have it.
        """
        return None if self.mask_key is None else ctx.at(self.mask_key)

    # ----------------------------------------------------------------------- for the trainer
    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return `count_valid` of the batch, shape `[]`.

        Raises:
            MissingKey: the count needs a key that only a postprocessor writes.
        """
        try:
            return self.count_valid(batch.full_context()).detach()
        except MissingKey as error:
            raise MissingKey(
                f"{self.name}: {error}; valid elements are counted before the model runs, so it "
                f"has to be a preprocessor, not a postprocessor"
            ) from None

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of `compute`, and of its metrics, times the batch's share."""
        computed = self.compute(output, batch.full_context())
        if not isinstance(computed, LossOutput) or computed.loss.dim():
            found = type(computed).__name__
            if isinstance(computed, LossOutput):
                found = f"a loss of shape {list(computed.loss.shape)}"
            raise TypeError(
                f"{self.name}.compute returned {found}; it must return LossOutput(loss, metrics), "
                f"the loss a mean of shape []"
            )
        share = self.share(batch, num_valid_global)
        return computed.loss * share, {
            name: torch.as_tensor(value, device=share.device).detach() * share
            for name, value in computed.metrics.items()
        }

    def extra_repr(self) -> str:
        """Return name and contract."""
        return f"name={self.name}, contract={str(self.contract) if self.contract else None}"
