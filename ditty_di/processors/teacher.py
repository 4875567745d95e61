"""A frozen teacher model beside the trained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditty_di.batch import Context
from ditty_di.contracts.grammar import Contract
from ditty_di.models.weights import materialize
from ditty_di.processors.base import PreProcessor
from ditty_di.processors.outputs import predicted
from ditty_di.protocols import WeightsFn

SHARED_PARAMETERS = """\
{name}: teacher and student share parameters; pass a separate model (in a configuration: a node of \
its own)"""


class Teacher(PreProcessor):
    """Write the output of a frozen model into the context, for a distillation loss.

    The model is called as the trained one will be (batch and `ctx["forward_kwargs"]`), so this is
    the last preprocessor. It is in evaluation mode, without gradients, in no optimizer and in no
    checkpoint; every rank has all of it on its device.

    Args:
        model: a model other than the trained one; its parameters are frozen.
        output: position or name of the logits in its output, such as `logits` for Hugging Face
            models.
        key: context key to write.
        weights: fills a model that is on the meta device.
        contract: what it reads and writes; None is a tensor written as `key`.
        name: name in messages; None is the class name in snake case.

    Raises:
        ValueError: the model is on the meta device without `weights`, or (in `process`) it shares
            parameters with the student.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: int | str = 0,
        key: str = "teacher_logits",
        weights: WeightsFn | None = None,
        contract: str | Contract | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(contract=contract, name=name)
        on_meta = any(tensor.is_meta for tensor in model.parameters())
        if on_meta and weights is None:
            raise ValueError(
                f"{self.name}: its model is on the meta device; give it weights=, such as "
                f"ditty_di.models.pretrained.Pretrained(path=...), or a model with values"
            )
        self.model = model.requires_grad_(False).eval()
        self.output, self.key = output, key
        self._weights = weights if on_meta else None
        self._is_set_up = False

    @classmethod
    def contract_for(cls, *, key: str = "teacher_logits", **others: Any) -> str:
        """Return the contract of a teacher with these arguments."""
        return f"-> | ctx.{key}:*:f"

    def process(self, batch: Any, ctx: Context) -> tuple[Any, Context]:
        """Write the teacher's output; the batch goes on unchanged."""
        if not self._is_set_up:
            self._set_up(ctx)
        self.model.eval()  # a module around it may have been set to training mode
        with torch.no_grad():
            output = self.model(batch, **ctx["forward_kwargs"])
        ctx[self.key] = predicted(output, self.output)
        return batch, ctx

    def _set_up(self, ctx: Context) -> None:
        student: Any = ctx["model"]
        own = {id(parameter) for parameter in self.model.parameters()}
        if student is not None and any(id(p) in own for p in student.parameters()):
            raise ValueError(SHARED_PARAMETERS.format(name=self.name))
        if self._weights is not None:
            materialize(self.model, ctx["device"])
            self._weights(self.model, device=ctx["device"])
        self.model.to(ctx["device"])
        self._is_set_up = True
