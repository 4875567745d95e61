"""Base class of callbacks, and the trainer's collection of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ditty_di.protocols import CALLBACK_METHODS, Stateful, Training

log = logging.getLogger(__name__)


class Callback:
    """Hooks that the trainer calls; subclasses override the ones they need.

    Callbacks are called in the order in which they were given, on all ranks at the same points, so
    they may communicate. What they may use of the trainer is `ditty_di.protocols.Training`. A
    callback with `state_dict` and `load_state_dict` is saved and resumed with the run.
    """

    #: Whether it calls `trainer.forward`. It is left out where the model is split into pipeline
    #: stages, which have no output of the whole model.
    needs_forward: bool = False

    def on_train_start(self, trainer: Training) -> None:
        """Act once, after the model is initialized and before a checkpoint is loaded.

        Args:
            trainer: the trainer that calls it, as in every hook.
        """

    def on_step_end(self, trainer: Training) -> None:
        """Act after each optimizer step, before validation and saving.

        Args:
            trainer: its `step` is the number of this step.
        """

    def on_validation_end(self, trainer: Training) -> None:
        """Act after each validation.

        Args:
            trainer: its `objective` is the validation loss.
        """

    def on_save(self, trainer: Training) -> None:
        """Act after a checkpoint was started (asynchronous saves go on in the background).

        Args:
            trainer: the trainer.
        """

    def on_train_end(self, trainer: Training) -> None:
        """Act once after the last step, also of a run that was asked to stop.

        Args:
            trainer: the trainer.
        """

    def get_metrics(self) -> dict[str, float]:
        """Return metrics to log with those of a step that is reported.

        It is called on all ranks, before `on_step_end`.
        """
        return {}

    def report(self) -> str:
        """Return text to print when training has ended; may be empty."""
        return ""


class Observer(Callback):
    """Base of callbacks that observe the training by hooks on modules and the optimizer."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_train_end(self, trainer: Training) -> None:
        """Stop observing.

        Args:
            trainer: the trainer.
        """
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class Callbacks:
    """A trainer's callbacks by name, in their order.

    Args:
        named: the callbacks; a value of None is left out.

    Raises:
        TypeError: not a mapping, or a callback without one of the hooks.
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

    def without_forward(self) -> Callbacks:
        """Return those that do not call `trainer.forward`; log which are left out."""
        kept = {n: c for n, c in self.named.items() if not getattr(c, "needs_forward", False)}
        for name in self.named.keys() - kept.keys():
            log.warning(
                "callbacks.%s (%s) is left out: it needs the output of the whole model, which is "
                "split into pipeline stages (runtime.pp > 1)",
                *(name, type(self.named[name]).__name__),
            )
        return Callbacks(kept)

    def call(self, hook: str, trainer: Training) -> None:
        """Call a hook of all callbacks.

        When one raises, the others are still called before its error is raised: what they keep
        (such as averages) belongs to the step that is saved then.

        Args:
            hook: name of the method.
            trainer: the trainer.
        """
        failure: Exception | None = None
        for callback in self.named.values():
            try:
                getattr(callback, hook)(trainer)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def get_metrics(self) -> dict[str, float]:
        """Return the metrics of all callbacks."""
        found: dict[str, float] = {}
        for callback in self.named.values():
            found |= getattr(callback, "get_metrics", dict)()
        return found

    def reports(self) -> list[str]:
        """Return the reports that are not empty, in order."""
        return [text for callback in self.named.values() if (text := callback.report())]

    def states(self) -> dict[str, Stateful]:
        """Return the callbacks that a checkpoint includes, as `callback_<name>`."""
        found: dict[str, Any] = {
            f"callback_{name}": callback
            for name, callback in self.named.items()
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
        }
        return found
