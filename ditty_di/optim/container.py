"""The trainer's optimizer over all model parts, and its learning-rate scheduler."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ditty_di.compat import low_bit_views_keep_their_dtype
from ditty_di.fqn import canonical_fqn
from ditty_di.protocols import OptimizerFactory, SchedulerFactory


def trainable_parameters(
    model_parts: Sequence[nn.Module], extra_named: Iterable[tuple[str, nn.Parameter]] = ()
) -> list[tuple[str, nn.Parameter]]:
    """Return (fully qualified name, parameter) of all that requires a gradient.

    Args:
        model_parts: in the order in which parameters are returned.
        extra_named: parameters outside the model, such as a loss's; one that is also the model's
            (tied) stays under the model's name.

    Raises:
        ValueError: two parameters of one name; one parameter in two parts; none at all.
    """
    named: dict[str, nn.Parameter] = {}
    owner: dict[int, str] = {}
    frozen = 0

    def add(name: str, parameter: nn.Parameter) -> None:
        if name in named:
            raise ValueError(
                f"optimizer: two parameters are called {name!r}; every model part (and loss) must "
                f"keep the names of the whole model, or checkpoints could not tell them apart"
            )
        named[name], owner[id(parameter)] = parameter, name

    for part in model_parts:
        for raw, parameter in part.named_parameters():
            name = canonical_fqn(raw)
            frozen += not parameter.requires_grad
            if id(parameter) in owner:
                raise ValueError(
                    f"optimizer: {name!r} of one model part is also {owner[id(parameter)]!r} of "
                    f"another; tie weights within one part only"
                )
            if parameter.requires_grad:
                add(name, parameter)
    for raw, parameter in extra_named:
        if parameter.requires_grad and id(parameter) not in owner:
            add(canonical_fqn(raw), parameter)
    if not named:
        raise ValueError(
            f"optimizer: at least one parameter must be trainable, but all {frozen} are frozen "
            f"(requires_grad=False); unfreeze some, or add an adapter"
        )
    return list(named.items())


def build_optimizer(
    factory: OptimizerFactory,
    model_parts: Sequence[nn.Module],
    extra_named: Iterable[tuple[str, nn.Parameter]] = (),
) -> Optimizer:
    """Build and verify the optimizer over all parts; every group gets its `param_names`.

    Args:
        factory: called once with `trainable_parameters(model_parts, extra_named)`.
        model_parts: already sharded.
        extra_named: parameters outside the model.

    Raises:
        TypeError: an optimizer that is already built; a factory that returns none.
        ValueError: see `trainable_parameters`; plain tensors beside sharded ones, whose gradients
            would not be summed over the ranks; an optimizer with parameters that are not the
            model's (stale ones, from before sharding), or without some that are.
    """
    if not callable(factory):
        raise TypeError(
            f"optimizer: pass a partial, such as functools.partial(torch.optim.AdamW, lr=3e-4) or "
            f"`_partial_: true` in YAML, not a built {type(factory).__name__}: sharding replaces "
            f"the parameters that it holds"
        )
    named = trainable_parameters(model_parts, extra_named)
    own = {id(parameter) for part in model_parts for parameter in part.parameters()}
    _require_all_sharded_or_none([(name, p) for name, p in named if id(p) in own])
    optimizer = factory(named)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer: the factory returned a {type(optimizer).__name__} without param_groups; "
            f"pass one that returns a torch.optim.Optimizer"
        )
    names = {id(parameter): name for name, parameter in named}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if stale := [tuple(p.shape) for key, p in held.items() if key not in names]:
        raise ValueError(
            f"optimizer: {len(stale)} of its parameters (of shapes {stale[:3]}) are not trainable "
            f"parameters of the model; build it from the (name, parameter) list that the factory "
            f"receives, not from a model of before"
        )
    if missing := [name for key, name in names.items() if key not in held]:
        raise ValueError(
            f"optimizer: it leaves out {len(missing)} trainable parameters: {missing[:3]}; pass "
            f"all on, and freeze (requires_grad=False) what should not be trained"
        )
    _require_even_shards(optimizer, names)
    for group in optimizer.param_groups:
        # Checkpoints find an optimizer's state by these names, also where a factory dropped them.
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer


def _require_even_shards(optimizer: Any, names: dict[int, str]) -> None:
    """Raise ValueError for uneven shards and torchao's optimizers, which fail on some ranks.

    They compile a step for shards of one size.
    """
    if "torchao.optim" not in sys.modules:
        return  # importing it takes a third of a second
    from torchao.optim.adam import _AdamBase

    low_bit_views_keep_their_dtype()
    for one in (optimizer, *getattr(optimizer, "optimizers", ())):
        held = [p for group in one.param_groups for p in group["params"]]
        for parameter in held if isinstance(one, _AdamBase) else ():
            if not isinstance(parameter, DTensor):
                continue
            placed = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
            for size, placement in placed:
                if isinstance(placement, Shard) and parameter.shape[placement.dim] % size:
                    raise ValueError(
                        f"optimizer: {type(one).__name__} cannot step on "
                        f"{names[id(parameter)]!r} {list(parameter.shape)}, whose rows {size} "
                        f"ranks do not share evenly; use optimizer=bnb_adamw_8bit or adamw (a "
                        f"vocabulary grows by model.pad_vocab_to_multiple_of={size})"
                    )


def _require_all_sharded_or_none(named: list[tuple[str, nn.Parameter]]) -> None:
    plain = [name for name, parameter in named if not isinstance(parameter, DTensor)]
    if plain and len(plain) < len(named):
        sharded = next(name for name, parameter in named if isinstance(parameter, DTensor))
        raise ValueError(
            f"optimizer: {len(plain)} trainable parameters are plain tensors ({plain[:3]}), while "
            f"{sharded!r} and others are sharded: gradients of plain ones are not summed over the "
            f"ranks, and cannot be clipped together; parallelize the whole model (fully_shard the "
            f"outermost module last), or freeze them"
        )


class Optimizers:
    """The trainer's optimizer, built by `build_optimizer`.

    Args:
        factory: see `build_optimizer`.
        model_parts: see `build_optimizer`.
        extra_named: see `build_optimizer`.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        model_parts: Sequence[nn.Module],
        extra_named: Iterable[tuple[str, nn.Parameter]] = (),
    ) -> None:
        self.optimizer = build_optimizer(factory, model_parts, extra_named)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Step the optimizer.

        Raises:
            ValueError: it cannot step on sharded parameters.
        """
        try:
            self.optimizer.step(closure)  # type: ignore[arg-type]
        except RuntimeError as error:
            if "require placement changes" not in str(error):
                raise
            raise ValueError(
                f"optimizer: {type(self.optimizer).__name__} cannot step on sharded parameters "
                f"({str(error).splitlines()[0]}); use another, such as optimizer=adamw, or one rank"
            ) from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)


def _constant(step: int) -> float:
    return 1.0


class Schedulers:
    """The trainer's learning-rate scheduler, stepped once after every optimizer step.

    Args:
        factory: makes the scheduler of an optimizer; None keeps the rate constant.
        optimizer: the trainer's.

    Raises:
        TypeError: a scheduler that is already built, or one whose `step()` needs an argument.
        ValueError: a scheduler of another optimizer.
    """

    def __init__(self, factory: SchedulerFactory | None, optimizer: Optimizer) -> None:
        factory = factory or partial(LambdaLR, lr_lambda=_constant)
        if not callable(factory):
            raise TypeError(
                f"lr_scheduler: pass a partial, such as functools.partial(cosine, max_steps=100) "
                f"or `_partial_: true` in YAML, not a built {type(factory).__name__}: the "
                f"optimizer does not exist before the model is set up"
            )
        self.scheduler: LRScheduler = factory(optimizer)
        if self.scheduler.optimizer is not optimizer:
            raise ValueError(
                "lr_scheduler: it drives another optimizer; pass a partial that takes the "
                "optimizer as its argument"
            )
        try:
            inspect.signature(self.scheduler.step).bind()
        except TypeError as error:
            raise TypeError(
                f"lr_scheduler: {type(self.scheduler).__name__}.step() is called after every "
                f"update with no argument ({error}); pass a scheduler that needs none"
            ) from None

    def step(self) -> None:
        """Step the scheduler."""
        self.scheduler.step()

    def get_metrics(self) -> dict[str, float]:
        """Return the rates of the next step: `lr` of the first group, `lr/group{i}` of several."""
        rates = [float(group["lr"]) for group in self.scheduler.optimizer.param_groups]
        groups = {f"lr/group{i}": rate for i, rate in enumerate(rates)} if len(rates) > 1 else {}
        return {"lr": rates[0], **groups}
