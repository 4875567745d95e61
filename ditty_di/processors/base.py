"""What stands before and behind the model: one method, and text for people."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditty_di.processors.contracts import Contract

if TYPE_CHECKING:
    from ditty_di.processors.context import Context

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake_case(name: str) -> str:
    """`MSELoss` as `mse_loss`."""
    return _WORD.sub("_", name).lower()


def as_contract(contract: Any) -> Contract | None:
    """A contract of its text, or the contract that it is already.

    Raises:
        ContractError: the text cannot be read.
    """
    if contract is None or isinstance(contract, Contract):
        return contract
    return Contract.parse(contract)


def contract_of_class(cls: type, arguments: Mapping[str, Any]) -> Contract | None:
    """The contract of `cls(**arguments)`: what its `contract_for(**arguments)` makes, or the text
    of its attribute `contract`; of both, the one that is nearer to the class among its bases.

    Raises:
        ContractError: the text cannot be read.
    """
    for base in inspect.getmro(cls):
        if isinstance(vars(base).get("contract"), str | Contract):
            return as_contract(vars(base)["contract"])
        if "contract_for" in vars(base):
            return as_contract(cls.contract_for(**arguments))  # type: ignore[attr-defined]
    return None


class Processor(ABC):
    """Both kinds of processor.

    Args:
        contract: what it takes and gives (`ditty_di.processors.contracts`); a class may have the
            text as its attribute `contract`, or a class method `contract_for`, instead. None
            leaves the stage unchecked.
        name: what messages and pictures call it; None is the class's name in snake case.
    """

    #: The text in a class; in an object, the `Contract` or None.
    contract: Any = None
    name: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Here and not in `__init__`, so that a class which does not call it (a dataclass) has them.
        self = super().__new__(cls)
        given = given_arguments(cls, args, kwargs)
        values = {"name": snake_case(cls.__name__), "contract": contract_of_class(cls, given)}
        for key, value in {**values, "_given": given}.items():
            object.__setattr__(self, key, value)  # a module would want to be initialised first
        return self

    def __init__(self, *, contract: str | Contract | None = None, name: str | None = None) -> None:
        super().__init__()
        if contract is not None:
            self.contract = as_contract(contract)
        if name is not None:
            self.name = name

    def config(self) -> dict[str, Any]:
        """The arguments that it was made with."""
        return dict(vars(self)["_given"])

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={_short(value)}" for key, value in self.config().items())
        return f"{self.name}({arguments})"


class PreProcessor(Processor):
    """Changes a batch before the model gets it, and the context as it likes."""

    @abstractmethod
    def process(self, batch: Any, ctx: Context) -> tuple[Any, Context] | None:
        """The batch for the next stage and the context; None rejects the batch.

        `batch` is `inputs["input"]` of the loader, or what the processor before made of it; the
        model's other arguments are in `ctx["forward_kwargs"]`. Tensors are on `ctx["device"]`.
        """


class PostProcessor(Processor):
    """Changes the model's output before the loss gets it, and the context as it likes."""

    @abstractmethod
    def process(self, output: Any, ctx: Context) -> tuple[Any, Context]:
        """The output for the next stage, and the context."""


def given_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `cls(*args, **kwargs)` is given, by name."""
    try:
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)  # type: ignore[misc]
    except (TypeError, ValueError):  # calling `__init__` will say what is wrong with them
        return dict(kwargs)
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return given


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
