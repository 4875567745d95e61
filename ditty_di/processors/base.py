"""What stands before and behind the model: one method, and text for people."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import contract_of_class, given_arguments, snake_case

if TYPE_CHECKING:
    from ditty_di.processors.context import Context


class Processor(ABC):
    """Both kinds of processor.

    Args:
        contract: what it takes and gives (`ditty_di.contracts.grammar`); a class may have the
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


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
