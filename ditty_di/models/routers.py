"""What the routers of a mixture of experts decide in a forward pass, recorded by hooks.

The model returns what it always does. Which modules are routers is transformers' own table
(`_can_record_outputs`), by which it collects `router_logits`; the experts that a token goes to are
those that the router has chosen, whatever its rule is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditty_di.models.stacked import fused_weights
from ditty_di.models.weights import is_meta, on_meta

NO_ROUTERS = """\
loss_fn: {model} has no router that transformers records (router_logits), so there is nothing to \
balance; write loss=causal_lm, or loss=chunked"""
NO_CHOICE = """\
loss_fn: the router {name} does not choose the experts of each token (what does is outside of it), \
so their load is not known; write loss=causal_lm, or loss=chunked"""
TOO_MANY = """\
model: num_experts_per_tok={wanted} is not possible with {experts} experts; write 1 to {experts}"""


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
            record = partial(self._record, layer, name, index)
            router.register_forward_hook(record, with_kwargs=True)
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

    def _record(self, layer: int, name: str, index: int, router: nn.Module, *call: Any) -> None:
        # Also while a block is recomputed: then it has to call the same operations again.
        chosen = chosen_experts(router, *call)
        if not self._running:
            return
        if chosen is None:
            raise ValueError(NO_CHOICE.format(name=name))
        logits = call[-1][index].flatten(0, -2)
        self._routings.append(Routing(layer, logits, chosen))


class _TopK(TorchFunctionMode):
    """Keeps the indices of the last `topk` within the context."""

    indices: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, Tensor.topk):
            self.indices = result.indices
        return result


def chosen_experts(router: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
    """Return the experts of each token, `[tokens, experts of a token]`, or None if unknown.

    A router that keeps its choice to itself (JetMoE's, Llama 4's) is run again to see it.

    Args:
        router: called with `args` and `kwargs`.
        args: of the call.
        kwargs: of the call.
        output: what it has returned.
    """
    if isinstance(output, Tensor):  # logits alone
        return None
    tensors = [value for value in output if isinstance(value, Tensor) and value.dim() == 2]
    returned = next((value for value in tensors if not value.is_floating_point()), None)
    if returned is not None:
        return returned
    with torch.no_grad(), _TopK() as last:
        router.forward(*args, **kwargs)
    return last.indices


class _Reached(Exception):
    """The first router has run; `args[0]` are the experts that it chose."""


def router_without_choice(model: nn.Module) -> str | None:
    """Return the path of the first router of a model if the experts that it chooses are not known.

    The layers before it run on meta, where these and the router can.

    Args:
        model: as for `record_routers`.
    """
    model = model if is_meta(model) else on_meta(model)
    name, router, _ = next(routers(model))

    def stop(*call: Any) -> None:
        raise _Reached(chosen_experts(*call))

    hook = router.register_forward_hook(stop, with_kwargs=True, prepend=True)
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    # With one of their own, transformers' models do not look at values to make the mask.
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="meta")
    try:
        with torch.no_grad():
            model(ids, attention_mask=mask)
    except _Reached as reached:
        return name if reached.args[0] is None else None
    except Exception:  # it needs values, or other inputs: the first step tells
        return None
    finally:
        hook.remove()
    return None


def require_enough_experts(model: nn.Module) -> None:
    """Raise ValueError if a token goes to more experts than a model of transformers has."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    wanted = getattr(config, "num_experts_per_tok", None)
    counts: Any = {owner.num_experts for _, owner, _ in fused_weights(model)}
    if isinstance(wanted, int) and counts and not 1 <= wanted <= min(counts):
        raise ValueError(TOO_MANY.format(wanted=wanted, experts=min(counts)))


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
