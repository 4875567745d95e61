"""Where user code may act while the trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditty_di.protocols import CALLBACK_METHODS

if TYPE_CHECKING:
    from ditty_di.protocols import Stateful, Training


class Callback:
    """Does nothing; subclasses override what they need.

    The trainer calls its callbacks in the order in which they were given, on all ranks at the same
    points, so they may communicate; what it has for them is `ditty_di.protocols.Training`. One
    that also has `state_dict` and `load_state_dict` is saved and resumed with the run.
    """

    def train_start(self, trainer: Training) -> None:
        """Once, when the model has its values and before a checkpoint is loaded."""

    def step_end(self, trainer: Training) -> None:
        """After each step, before validation and saving; `trainer.step` is its number."""

    def validation_end(self, trainer: Training) -> None:
        """After each validation; `trainer.objective` is its loss."""

    def checkpoint_saved(self, trainer: Training) -> None:
        """After a checkpoint was started (asynchronous saves go on in the background)."""

    def train_end(self, trainer: Training) -> None:
        """Once, after the last step, also of a run that was asked to stop."""

    def report(self) -> str:
        """What to tell when training has ended; may be empty."""
        return ""


class Callbacks:
    """A trainer's callbacks by name, in their order; None stands for none.

    Raises:
        TypeError: no mapping; one that lacks a moment's method.
    """

    def __init__(self, named: Mapping[str, Callback | None]) -> None:
        if not isinstance(named, Mapping):
            raise TypeError(
                f"callbacks: give them names, as in {{'ema': EMA()}}; got {named!r:.80}"
            )
        self.named = {name: callback for name, callback in named.items() if callback is not None}
        for name, callback in self.named.items():
            if isinstance(callback, type):
                raise TypeError(f"callbacks.{name}: {callback.__name__} is a class; call it")
            if lacking := [m for m in CALLBACK_METHODS if not callable(getattr(callback, m, None))]:
                raise TypeError(
                    f"callbacks.{name}: {callback!r} has no {', '.join(lacking)}; let it inherit "
                    f"from ditty_di.callbacks.Callback, whose methods do nothing"
                )

    def call(self, moment: str, trainer: Training) -> None:
        """Call a method of all callbacks.

        When one raises, the others are still called before it goes on up: what they keep (such as
        averages) belongs to the step that is saved then.
        """
        failure: Exception | None = None
        for callback in self.named.values():
            try:
                getattr(callback, moment)(trainer)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def reports(self) -> list[str]:
        """What they have to tell, in their order."""
        return [said for callback in self.named.values() if (said := callback.report())]

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds of them, as `callback_<name>`."""
        found: dict[str, Any] = {}
        for name, callback in self.named.items():
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                found[f"callback_{name}"] = callback
        return found
