"""A frozen model beside the one that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditty_di.processors.base import PreProcessor
from ditty_di.processors.outputs import predicted

if TYPE_CHECKING:
    from torch import nn

    from ditty_di.contracts.grammar import Contract
    from ditty_di.processors.context import Context
    from ditty_di.protocols import WeightsFn

SAME = """\
{name}: its model shares parameters with the model that is trained, so it would teach itself and \
freeze its pupil; give it a model of its own (in a configuration: a node of its own)"""


class Teacher(PreProcessor):
    """Writes what a frozen model makes of the batch, for a distillation loss.

    The model gets what the trained one will get (batch and `ctx["forward_kwargs"]`), so this is the
    last preprocessor. It is in evaluation mode, has no gradients, is in no optimizer and no
    checkpoint, and every rank has the whole of it, on its device.

    Args:
        model: another module than the one that is trained; its parameters are frozen.
        output: where its logits are: an index, or a name such as `logits` for Hugging Face models.
        key: the context key to write.
        weights: fills a model that is on the meta device.

    Raises:
        ValueError: the model has parameters without values, or (in `process`) ones of the student.
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
        self._placed = False

    @classmethod
    def contract_for(cls, *, key: str = "teacher_logits", **others: Any) -> str:
        return f"-> | ctx.{key}:*:f"

    def process(self, batch: Any, ctx: Context) -> tuple[Any, Context]:
        import torch

        if not self._placed:
            self._place(ctx)
        self.model.eval()  # somebody may have set a module around it to training
        with torch.no_grad():
            output = self.model(batch, **ctx["forward_kwargs"])
        ctx[self.key] = predicted(output, self.output)
        return batch, ctx

    def _place(self, ctx: Context) -> None:
        pupil: Any = ctx["model"]
        own = {id(parameter) for parameter in self.model.parameters()}
        if pupil is not None and any(id(p) in own for p in pupil.parameters()):
            raise ValueError(SAME.format(name=self.name))
        if self._weights is not None:
            from ditty_di.models.weights import materialize

            materialize(self.model, ctx["device"])
            self._weights(self.model, device=ctx["device"])
        self.model.to(ctx["device"])
        self._placed = True
