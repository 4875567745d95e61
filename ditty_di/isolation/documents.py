"""Run layers that carry a state along the sequence on each document of a packed row alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ditty_di.batch import document_starts

#: Arguments about several documents in a row, which a row of one document has no use for.
_BORDERS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class DocumentRows:
    """Call recurrent layers with a row for each document instead of a row of several.

    Whatever a layer carries from token to token (the last inputs of a convolution, a state) then
    begins at zero in each document, without a kernel that knows of documents. Rows are padded at
    the end by their last token, to less than twice the length of each document: a layer is called
    once for the documents of similar length.

    Recurrent layers are those that hold a convolution: Mamba, gated DeltaNet, Kimi Delta Attention
    and LFM's short convolutions, each one module with its state.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None  # of the packed rows; None: calls are unchanged
        self._groups: list[Tensor] = []  # of tokens in the flat rows, [documents, longest]
        self._back: Tensor | None = None  # [rows * length], into the groups one after another

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Wrap `forward` of the recurrent layers of a model; return what undoes it."""
        layers = list(recurrent_layers(model))
        before = [vars(layer).get("forward") for layer in layers]
        by_document = DocumentRows._by_document
        if "torch._dynamo" in sys.modules:  # numbers and shapes of calls change with each batch
            by_document = torch.compiler.disable(by_document, recursive=False)
        for layer in layers:
            vars(layer)["forward"] = partial(by_document, self, layer.forward)

        def detach() -> None:
            for layer, forward in zip(layers, before, strict=True):
                del vars(layer)["forward"]
                if forward is not None:
                    vars(layer)["forward"] = forward

        return detach

    def follow(self, position_ids: Tensor | None) -> None:
        """Set the documents of the coming call of the model, and of its recomputation.

        How many rows a layer is called with, and how long they are, depends on the positions, so
        they are copied to the host: the one point where a micro-batch waits for the device.

        Args:
            position_ids: `[rows, length]`; None leaves the layers' calls as they are.
        """
        self._shape = None
        if position_ids is None:
            return
        rows, length = position_ids.shape
        device = position_ids.device
        first = document_starts(position_ids.cpu()).flatten()
        starts = first.nonzero().flatten()  # [documents]
        ends = torch.cat([starts[1:], starts.new_tensor([rows * length])])
        lengths = ends - starts
        # Documents of more than half the length of the longest, of more than a quarter, ...
        halvings = torch.floor(torch.log2(lengths.max() / lengths))
        document = first.cumsum(0) - 1  # [rows * length]
        offset = torch.arange(rows * length) - starts[document]
        groups, back, at = [], torch.empty_like(document), 0
        for number in halvings.unique():
            group = (halvings == number).nonzero().flatten()  # [documents]
            longest = int(lengths[group].max())
            last = lengths[group, None] - 1
            groups.append(starts[group, None] + torch.minimum(torch.arange(longest), last))
            row = torch.full_like(starts, -1)
            row[group] = torch.arange(len(group))
            inside = row[document] >= 0
            back[inside] = at + row[document[inside]] * longest + offset[inside]
            at += len(group) * longest
        self._groups = [group.to(device, non_blocking=True) for group in groups]
        self._back = back.to(device, non_blocking=True)
        self._shape = (rows, length)

    def _by_document(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._shape is None:
            return forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _BORDERS}
        outputs = []
        for group in self._groups:
            inputs = tree_map(partial(self._taken, group), (args, kwargs))
            outputs.append(tree_flatten(forward(*inputs[0], **inputs[1])))
        leaves = [self._put_back(list(leaf)) for leaf in zip(*(o for o, _ in outputs), strict=True)]
        return tree_unflatten(leaves, outputs[0][1])

    def _taken(self, group: Tensor, value: Any) -> Any:
        """Return the tokens `[documents, longest, ...]` of a tensor `[rows, length, ...]`."""
        if not isinstance(value, Tensor) or value.shape[:2] != self._shape:
            return value
        return value.flatten(0, 1)[group]

    def _put_back(self, values: list[Any]) -> Any:
        """Return the tensor `[rows, length, ...]` of those of the groups."""
        shapes = [tuple(group.shape) for group in self._groups]
        if [tuple(getattr(value, "shape", ())[:2]) for value in values] != shapes:
            return values[0]
        flat = torch.cat([value.flatten(0, 1) for value in values])
        return flat[self._back].unflatten(0, self._shape)


def recurrent_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold a convolution over several tokens."""
    for module in model.modules():
        if any(
            isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children()
        ):
            yield module
