"""Base classes for preprocessors and postprocessors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ditty_di.batch import Context
from ditty_di.contracts.grammar import Contract, as_contract
from ditty_di.contracts.stages import contract_of_class, given_arguments, snake_case


class Configured:
    """Record the constructor's arguments; find name and contract from them.

    This happens in `__new__`, so that a class which does not call `super().__init__`, such as a
    dataclass, has them too.
    """

    #: Text in a class; in an object, the `Contract` or None.
    contract: Any = None
    name: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments before `__init__` runs."""
        self = super().__new__(cls)
        given = given_arguments(cls, args, kwargs)
        values = {"name": snake_case(cls.__name__), "contract": contract_of_class(cls, given)}
        for key, value in {**values, "_given": given}.items():
            object.__setattr__(self, key, value)  # nn.Module.__setattr__ needs its __init__
        return self

    def config(self) -> dict[str, Any]:
        """Return the arguments that the object was constructed with."""
        return dict(vars(self)["_given"])


class Processor(Configured, ABC):
    """Base class of preprocessors and postprocessors.

    Args:
        contract: what it reads and writes (`ditty_di.contracts.grammar`); None is the class
            attribute `contract`, or what the class method `contract_for` returns. Without any the
            processor is not checked.
        name: name in messages; None is the class name in snake case.
    """

    def __init__(self, *, contract: str | Contract | None = None, name: str | None = None) -> None:
        super().__init__()
        if contract is not None:
            self.contract = as_contract(contract)
        if name is not None:
            self.name = name

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={_short(value)}" for key, value in self.config().items())
        return f"{self.name}({arguments})"


class PreProcessor(Processor):
    """Change a batch, and the context, before the model is called."""

    @abstractmethod
    def process(self, batch: Any, ctx: Context) -> tuple[Any, Context] | None:
        """Return the batch for the next stage and the context, or None to reject the batch.

        Args:
            batch: `inputs["input"]` of the loader, or what the processor before returned. The
                model's other arguments are in `ctx["forward_kwargs"]`.
            ctx: the batch's context. Tensors are on `ctx["device"]`.
        """


class PostProcessor(Processor):
    """Change the model's output, and the context, before the loss is computed."""

    @abstractmethod
    def process(self, output: Any, ctx: Context) -> tuple[Any, Context]:
        """Return the output for the next stage and the context.

        Args:
            output: the model's output, or what the processor before returned.
            ctx: the batch's context.
        """


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
