"""What the routers of a mixture of experts decide in a forward pass, recorded by hooks.

The model returns what it always does. Which modules are routers is transformers' own table
(`_can_record_outputs`), by which it collects `router_logits`; the experts that a token goes to are
taken from the router and not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

NO_ROUTERS = """\
loss_fn: {model} has no router that transformers records (router_logits), so there is nothing to \
balance; write loss=causal_lm, or loss=chunked"""
NO_CHOICE = """\
loss: the router {name} does not return the experts of each token (integers [tokens, experts of a \
token]), so its load is not known; write loss=causal_lm"""


class Routing(NamedTuple):
    """What one router decided in a forward pass.

    Attributes:
        layer: number of the router among those of the model.
        logits: `[tokens, experts]`.
        chosen: numbers of the experts that each token goes to, `[tokens, experts of a token]`.
    """

    layer: int
    logits: Tensor
    chosen: Tensor


class RouterRecorder:
    """Records the routing of the newest forward pass of a model, layer by layer.

    Copies of the model share it. Recomputation in the backward pass is not recorded.

    Args:
        model: the model, whose routers get hooks. Those of a pipeline stage are recorded alone.

    Attributes:
        layers: number of routers of the model.

    Raises:
        ValueError: the model has no routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routings: list[Routing] = []
        self._shape: tuple[int, ...] | None = None
        self._running = False
        found = list(routers(model))
        self.layers = len(found)
        if not found:
            raise ValueError(NO_ROUTERS.format(model=type(model).__name__))
        for layer, (name, router, index) in enumerate(found):
            router.register_forward_hook(partial(self._record, layer, name, index))
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterRecorder:
        return self

    def take(self) -> tuple[tuple[int, ...] | None, list[Routing]]:
        """Return rows and length of the newest forward pass, and its routing, once.

        The first is None before a forward pass, and () for one without positional arguments.
        """
        taken = self._shape, self._routings
        self._shape, self._routings = None, []
        return taken

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._shape = tuple(args[0].shape[:2]) if args else ()
        self._routings, self._running = [], True

    def _end(self, *ignored: Any) -> None:
        self._running = False

    def _record(
        self, layer: int, name: str, index: int, router: nn.Module, args: Any, output: Any
    ) -> None:
        if not self._running:
            return
        logits = output[index]
        tensors = (x for x in output if isinstance(x, Tensor) and x.dim() == 2)
        chosen = next((x for x in tensors if not x.is_floating_point()), None)
        if chosen is None:
            raise ValueError(NO_CHOICE.format(name=name))
        self._routings.append(Routing(layer, logits.flatten(0, -2), chosen))


#: Attribute of a model: its `RouterRecorder`.
RECORDER = "_router_recorder"


def record_routers(model: nn.Module) -> RouterRecorder:
    """Return the recorder of a model, which is made once.

    Args:
        model: of transformers, or one with such a model inside, such as peft's.

    Raises:
        ValueError: the model has no routers.
    """
    if RECORDER not in vars(model):
        vars(model)[RECORDER] = RouterRecorder(model)
    return vars(model)[RECORDER]  # type: ignore[no-any-return]


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield path and module of each router, and where its output has the logits.

    Args:
        model: as for `record_routers`.
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for path, owner in model.named_modules():
        recorded = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
        for spec in recorded if isinstance(recorded, list) else [recorded]:
            kind: Any = getattr(spec, "target_class", None)
            within = getattr(spec, "layer_name", None)
            for name, module in owner.named_modules(prefix=path) if kind is not None else ():
                if isinstance(module, kind) and (within is None or f".{within}." in f".{name}."):
                    found.setdefault(name, (module, spec.index))
    for name, (module, index) in found.items():
        # JetMoE's attention is recorded too, around its router.
        if not any(other.startswith(f"{name}.") for other in found):
            yield name, module, index


def router_layers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that choose experts.

    Args:
        model: as for `record_routers`.
    """
    return {
        f"{path}.{name}".strip(".")
        for path, router, _ in routers(model)
        for name, layer in router.named_modules()
        if isinstance(layer, nn.Linear)
    }
