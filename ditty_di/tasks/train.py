"""The task that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.launch.rundir import RunDirectory

if TYPE_CHECKING:
    from torch import nn

    from ditty_di.trainer import Trainer


def train(
    trainer: Trainer,
    export: Callable[[list[nn.Module]], dict[str, Any] | None] | None = None,
    about: str | None = None,
    run: str | None = None,
) -> dict[str, Any]:
    """Trains to the end, or until asked to stop; then `export(model_parts)` if it got to the end.

    `about` is a JSON file for what later tasks cannot tell from the configuration: `conversations`,
    how many of the examples are conversations. It is there from the start, and a run that goes on
    changes it at its end alone.

    Returns what the trainer does: `status` ("finished" or "preempted"), `step`, `objective`, ...,
    and what the export returned. The configuration of a resumed `run` (a run directory) becomes
    the run's own once the checkpoint is loaded.
    """
    if prepare := getattr(export, "prepare", None):
        prepare(trainer.model_parts)  # what it needs is tried before the training, not after
    file = Path(about) if about is not None and trainer.runtime.rank == 0 else None
    if file is not None and not file.exists():
        _write_about(file, trainer.dataloader)

    def restored() -> None:
        if run is not None and trainer.runtime.rank == 0:
            RunDirectory(run).adopt()

    result = trainer.train(restored=restored)
    if file is not None:
        _write_about(file, trainer.dataloader)
    if trainer.runtime.rank == 0:
        reports = [trainer.validator.report()] if trainer.validator else []
        for report in filter(None, reports + trainer.callbacks.reports()):
            print(report)
    if export is not None and result["status"] == "finished":
        result |= export(trainer.model_parts) or {}
    # Only when all went well: after an error, another rank may never come to what close waits for.
    trainer.close()
    trainer.runtime.close()
    return result


def _write_about(file: Path, dataloader: Any) -> None:
    dataset = getattr(dataloader, "dataset", None)
    examples = getattr(dataset, "examples", dataset)
    about = {"conversations": getattr(examples, "conversations", 0)}
    file.write_text(json.dumps(about) + "\n", encoding="utf-8")
