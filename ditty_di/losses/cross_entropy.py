"""Cross-entropy over tokens or classes, normalised by the whole window's valid labels."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ditty_di.processors.base import contract_of_class
from ditty_di.processors.outputs import predicted

if TYPE_CHECKING:
    from ditty_di.protocols import Batch


class CrossEntropyLoss(nn.Module):
    """Cross-entropy in nats a valid label.

    Args:
        output: the logits in the model's output: an attribute (`logits` for Hugging Face models),
            or a position (0 is also an output that is one tensor); None when the output is the
            logits.
        shift: compare position t with label t + 1, for labels that are a copy of the input.
        ignore_index: labels with this value weigh nothing.

    Shapes: logits `[batch, seq, vocab]` or `[batch, classes]`; labels `[batch, seq]` or `[batch]`.
    """

    contract: Any = None

    def __init__(
        self, *, output: str | int | None = None, shift: bool = False, ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.shift, self.ignore_index = shift, ignore_index
        if isinstance(output, int):
            self._logits: Any = partial(predicted, index=output)
        else:
            self._logits = attrgetter(output) if output else _itself
        self.contract = contract_of_class(type(self), {"output": output})

    @classmethod
    def contract_for(cls, *, output: str | int | None = None, **others: Any) -> str | None:
        """See `ditty_di.processors.contracts`; an `output` further inside has no name there."""
        if isinstance(output, str) and "." in output:
            return None
        return f"{output or 0}:n+1:f | ctx.target:n:i64 -> loss:0:f"

    def count(self, batch: Batch, /) -> Tensor:
        """Valid labels of the batch, shape `[]`, int64."""
        labels = batch[1]
        labels = labels[:, 1:] if self.shift else labels
        return (labels != self.ignore_index).sum()

    def forward(
        self, output: Any, labels: Tensor, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy over `global_count`, shape `[]`, in float32."""
        try:
            logits = self._logits(output)
        except AttributeError as error:
            raise LookupError(
                f"loss: the model returned {type(output).__name__}, and {error}; write in `output` "
                f"what it calls its logits, or null where it returns them"
            ) from None
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
        )
        return loss / global_count, {}


def _itself(output: Any) -> Any:
    return output
