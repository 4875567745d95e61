"""Different options or optimizers for different parameters, by name and number of dimensions.

A rule's condition has up to four parts, all of which must hold: `match`, a regular expression
found in the fully qualified name (`re.search`); `exclude`, one that is not found; `min_ndim` and
`max_ndim`. A rule without a condition holds for every parameter. The first rule that holds takes
the parameter.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ditty_di.messages import first_of, refuse
from ditty_di.optim import trial
from ditty_di.protocols import early_checks
from ditty_di.runtime import gathered

NamedParameters = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Rule:
    """One rule as written; `where` names it in messages."""

    where: str
    options: dict[str, Any]
    match: re.Pattern[str] | None
    exclude: re.Pattern[str] | None
    min_ndim: int
    max_ndim: float

    def takes(self, name: str, parameter: Tensor) -> bool:
        return (
            self.min_ndim <= parameter.ndim <= self.max_ndim
            and (self.match is None or self.match.search(name) is not None)
            and (self.exclude is None or self.exclude.search(name) is None)
        )


def _rule(
    where: str,
    /,
    *,
    match: str | None = None,
    exclude: str | None = None,
    min_ndim: int = 0,
    max_ndim: float = float("inf"),
    **options: Any,
) -> _Rule:
    def pattern(key: str, text: str | None) -> re.Pattern[str] | None:
        try:
            return None if text is None else re.compile(text)
        except re.error as error:
            raise ValueError(
                f"optimizer: {where}.{key}={text!r} is not a regular expression ({error}); write "
                f"one that Python's re.search takes, such as 'norm|bias'"
            ) from None

    return _Rule(
        where, options, pattern("match", match), pattern("exclude", exclude), min_ndim, max_ndim
    )


def _split(
    named: list[tuple[str, Tensor]], rules: list[_Rule]
) -> tuple[list[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]]:
    """Return what each rule takes, and what is left over.

    Raises:
        ValueError: a rule with a `match` takes nothing on any rank.
    """
    taken: list[list[tuple[str, Tensor]]] = [[] for _ in rules]
    left: list[tuple[str, Tensor]] = []
    for name, parameter in named:
        first = (own for rule, own in zip(rules, taken, strict=True) if rule.takes(name, parameter))
        next(first, left).append((name, parameter))
    for rule, used in zip(rules, _on_any_rank([bool(own) for own in taken]), strict=True):
        # Without a `match` nothing can be misspelt: a model may well have no vectors at all.
        if rule.match is not None and not used:
            raise ValueError(_nothing_taken(rule, rule.match, [name for name, _ in named]))
    return taken, left


def _on_any_rank(flags: list[bool]) -> list[bool]:
    """Combine flags over ranks: a rule may be for parameters of another pipeline stage."""
    if not (dist.is_available() and dist.is_initialized()):
        return flags
    return [any(rank) for rank in zip(*gathered(flags), strict=True)]


def _nothing_taken(rule: _Rule, match: re.Pattern[str], names: list[str]) -> str:
    text = f"optimizer: {rule.where} (match={match.pattern!r}) takes no trainable parameter"
    if found := [name for name in names if match.search(name)]:
        return (
            f"{text}: {first_of(found)} match, but an earlier rule takes them or another condition "
            f"of this one fails; write it before the others, or remove it"
        )
    segments = list(dict.fromkeys(part for name in names for part in name.split(".")))
    words = re.findall(r"[A-Za-z_]\w+", match.pattern)
    near = [part for word in words for part in difflib.get_close_matches(word, segments, n=2)]
    if near:
        return f"{text}; did you mean {' or '.join(repr(part) for part in dict.fromkeys(near))}?"
    return f"{text}; write a part of names like {first_of(names)}"


def _rate(lr: float | None) -> dict[str, float]:
    return {} if lr is None else {"lr": lr}


def _validate_grouped(*, optimizer: Any = None, lr: Any = None) -> None:
    refuse(trial.complaints(optimizer, "optimizer.", **_rate(lr)))


@early_checks(validate=_validate_grouped)
def grouped(
    named_parameters: NamedParameters,
    /,
    *,
    optimizer: Callable[..., Optimizer],
    groups: Sequence[Mapping[str, Any]],
    lr: float | None = None,
) -> Optimizer:
    """Build one optimizer whose parameter groups have options of their own.

        groups:
          - {max_ndim: 1, weight_decay: 0.0}        # norm weights and biases, whatever their name
          - {match: "embed", lr: 1.0e-4}

    Args:
        named_parameters: (name, parameter) of all that is trained.
        optimizer: a partial of any torch optimizer class; its arguments are the defaults, also
            for parameters that no rule takes.
        groups: each a condition (see the module) and the options that differ for its parameters.
        lr: the optimizer's learning rate, as an argument here; None keeps the partial's own.

    Raises:
        ValueError: a rule whose `match` takes nothing, a bad regular expression, or an option
            that this optimizer does not have per group.
    """
    rules = [_rule(f"groups[{i}]", **group) for i, group in enumerate(groups)]
    taken, left = _split(list(named_parameters), rules)
    parts = [{"params": own, **rule.options} for own, rule in zip(taken, rules, strict=True) if own]
    if left:
        parts.insert(0, {"params": left})
    built = optimizer(parts, **_rate(lr))
    for rule in rules:
        # torch accepts any key in a group and ignores unknown ones, such as weight_deacy.
        for key in rule.options.keys() - built.defaults.keys():
            near = difflib.get_close_matches(key, built.defaults, n=1)
            known = f"write one of {first_of(built.defaults, 12)}"
            raise ValueError(
                f"optimizer: {rule.where}.{key}: {type(built).__name__} has no such option per "
                f"group; {f'did you mean {near[0]!r}?' if near else known}"
            )
    return built


class ClosureOptimizer(Optimizer):
    """Base of optimizers that update by `update`, after the closure that `step` may be given."""

    def update(self) -> None:
        """Update the parameters from their gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure, with gradients enabled, and update.

        Args:
            closure: evaluates the model again and sets the gradients; None leaves them.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


class Combined(ClosureOptimizer):
    """Several optimizers, each for parameters of its own, as one `torch.optim.Optimizer`.

    `param_groups` are the optimizers' own group objects in a row and `state` is one mapping that
    all of them write to, so that schedulers, gradient scalers, clipping and checkpoints see a
    single optimizer.

    Args:
        optimizers: at least one; no parameter in two of them.
    """

    optimizers: tuple[Optimizer, ...] = ()

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        optimizers = tuple(optimizers)
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self.optimizers = optimizers
        self._share()

    def _share(self) -> None:
        """Make groups and state the optimizers' own again; loading replaces theirs."""
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]
        self.state = defaultdict(dict)
        for one in self.optimizers:
            self.state.update(one.state)
        for one in self.optimizers:
            one.state = self.state

    def update(self) -> None:
        """Step each optimizer."""
        for one in self.optimizers:
            one.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let each optimizer load its own part, in its own way (some keep integers as they are).

        Raises:
            ValueError: other parameter groups than this optimizer's.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"optimizer: the state to load has {len(groups)} parameter groups, this optimizer "
                f"{len(self.param_groups)}; build it with the rules that the state was saved with"
            )
        for one in self.optimizers:
            own = [groups.pop(0) for _ in one.param_groups]
            ids = {index for group in own for index in group["params"]}
            state = {index: value for index, value in state_dict["state"].items() if index in ids}
            one.load_state_dict({"state": state, "param_groups": own})
        self._share()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group during construction; raise ValueError later, for no optimizer would step it.

        Args:
            param_group: as for any optimizer.
        """
        if self.optimizers:
            raise ValueError("optimizer: add the parameters to a rule before `combined` is called")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}


def combined(
    named_parameters: NamedParameters,
    /,
    *,
    rules: Sequence[Mapping[str, Any]],
    lr: float | None = None,
) -> Optimizer:
    """Build different optimizers for different parameters, as one.

        rules:
          - {min_ndim: 2, max_ndim: 2, exclude: "embed|lm_head", optimizer: <partial of Muon>}
          - {optimizer: <partial of AdamW>}             # everything else

    Args:
        named_parameters: (name, parameter) of all that is trained.
        rules: each a condition (see the module) and `optimizer`, a factory that is called with the
            list of (name, parameter) that the rule takes; it may be a partial of `grouped`. A rule
            that takes nothing on this rank builds no optimizer.
        lr: one learning rate for all of them; None leaves each its own.

    Raises:
        ValueError: a parameter that no rule takes, a rule whose `match` takes nothing, a bad
            regular expression, or a rule with other keys.
    """
    parsed = [_rule(f"rules[{i}]", **rule) for i, rule in enumerate(rules)]
    for rule in parsed:
        if rule.options.keys() != {"optimizer"}:
            raise ValueError(
                f"optimizer: {rule.where} has the keys {sorted(rule.options)} beside its "
                f"condition; write `optimizer` alone, and options such as lr inside it"
            )
    taken, left = _split(list(named_parameters), parsed)
    if left:
        raise ValueError(
            f"optimizer: no rule takes {first_of(name for name, _ in left)}; end the rules with "
            f"one without a condition, {{optimizer: ...}}, for everything else"
        )
    return Combined(
        rule.options["optimizer"](own, **_rate(lr))
        for own, rule in zip(taken, parsed, strict=True)
        if own
    )
