"""Which checkpoints remain: the newest, every n-th step, the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ditty_di.checkpoint.manifest import CheckpointError

#: Name behind a folder of checkpoints that stands for the one with the lowest objective.
BEST = "best"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a folder remain; one that any of the rules keeps remains.

    Args:
        latest: number of the newest that remain; None keeps all.
        every: those whose step is a multiple of it remain for ever; None: none.
        best: number of those with the lowest objective that remain; None: none.
    """

    latest: int | None = None
    every: int | None = None
    best: int | None = None

    def kept(
        self, objectives: Mapping[int, float | None], relied_on: int | None = None
    ) -> set[int]:
        """Return the steps that remain.

        Args:
            objectives: of each whole checkpoint, by step; None where the step was not validated.
            relied_on: counts as the newest, whatever its step is.
        """
        if self.latest is None:
            return set(objectives)
        newest = sorted(step for step in objectives if step != relied_on)
        if relied_on is not None and relied_on in objectives:
            newest.append(relied_on)
        kept = set(newest[-self.latest :]) | set(self._best(objectives))
        return kept | {step for step in objectives if self.every and step % self.every == 0}

    def is_due(self, step: int, objective: float | None, saved: Mapping[int, float | None]) -> bool:
        """Return whether a step has to be saved for a rule: `every`, or `best`.

        Args:
            step: optimizer steps done.
            objective: the loss of a validation at this very step; None without one.
            saved: the objectives of whole checkpoints, by step.
        """
        if self.every and step % self.every == 0:
            return True
        return objective is not None and step in self._best({**saved, step: objective})

    def _best(self, objectives: Mapping[int, float | None]) -> list[int]:
        return _ranked(objectives)[: self.best or 0]


def best_step(objectives: Mapping[int, float | None], where: object) -> int:
    """Return the step with the lowest objective; of equal ones the earliest.

    Args:
        objectives: of each whole checkpoint, by step.
        where: the folder, for the message.

    Raises:
        CheckpointError: none has an objective.
    """
    if ranked := _ranked(objectives):
        return ranked[0]
    raise CheckpointError(
        f"{where} holds no checkpoint that was saved at a validated step: train with "
        f"checkpoint.keep_best=1, which saves and keeps the best, or give another checkpoint"
    )


def _ranked(objectives: Mapping[int, float | None]) -> list[int]:
    """Return the steps that have an objective, the best first."""
    known = [(value, step) for step, value in objectives.items() if value is not None]
    return [step for _, step in sorted(known)]
