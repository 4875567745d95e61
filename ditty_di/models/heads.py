"""Several heads on one body; and which modules of a pretrained model are its head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ditty_di.fqn import base_fqn
from ditty_di.models.weights import initialize, transformers_model

#: What transformers calls the module that makes one vector of a text.
_POOLER = "pooler"


class Heads(nn.Module):
    """Apply several heads to the output of one body, and return a tuple of their outputs.

    Args:
        body: called with the input.
        heads: each called with the body's output.
        contract: inputs and outputs (`ditty_di.contracts.grammar`); None leaves them unchecked.
    """

    default_weights = staticmethod(initialize)

    def __init__(
        self, body: nn.Module, heads: Sequence[nn.Module], *, contract: str | None = None
    ) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(heads)
        self.contract = contract

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each head for the input `x`."""
        features = self.body(x)
        return tuple(head(features) for head in self.heads)


def head_of(model: nn.Module, name: str) -> str:
    """Return the path of the head that a tensor belongs to, if the model's files may lack it.

    Such a head is what a classifier of transformers has around its body, and the pooler of a body,
    which masked language models are saved without. Only models with an attribute `head_task` have
    one (`ditty_di.models.hugging_face.builders`).

    Args:
        model: may be adapted, sharded, and inside others.
        name: of a parameter or persistent buffer.

    Returns:
        The path within the model of transformers; empty for any other tensor.
    """
    prefix, base = transformers_model(model)
    if getattr(base, "head_task", None) is None:
        return ""
    parts = base_fqn(name.removeprefix(prefix).removeprefix(".")).split(".")
    if _POOLER in parts:
        return ".".join(parts[: parts.index(_POOLER) + 1])
    has_body = base.base_model is not base and parts[0] != base.base_model_prefix
    return parts[0] if has_body else ""
