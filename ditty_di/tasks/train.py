"""The training task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ditty_di.export.gather import whole_models
from ditty_di.generation.decoding import textless
from ditty_di.launch.rundir import RunDirectory
from ditty_di.training.trainer import Trainer


def train(
    trainer: Trainer,
    export: Callable[[list[nn.Module]], dict[str, Any] | None] | None = None,
    about: str | None = None,
    run: str | None = None,
) -> dict[str, Any]:
    """Train to the end, or until a stop is requested; then export if the end was reached.

    Args:
        trainer: The trainer.
        export: Called with the model parts at the end; its result is added to the task's.
        about: JSON file for what later tasks cannot read from the configuration: `conversations`,
            the number of examples that are conversations. It is written at the start, by a resumed
            run at its end alone.
        run: Run directory; the configuration of a resumed run becomes its own once the checkpoint
            is loaded.

    Returns:
        The trainer's `status` ("finished" or "preempted"), `step`, `objective`, ..., and the
        export's result; `gives_text` false where `task=generate` has nothing to do.
    """
    if prepare := getattr(export, "prepare", None):
        # Fail before the training, not after it.
        prepare(trainer.model_parts if trainer.parts.whole is None else [trainer.parts.whole])
    file = Path(about) if about is not None and trainer.runtime.rank == 0 else None
    if file is not None and not file.exists():
        _write_about(file, trainer.dataloader)

    def restored() -> None:
        if run is not None and trainer.runtime.rank == 0:
            RunDirectory(run).adopt()

    result = trainer.train(restored=restored)
    if textless(trainer.model_parts[0]):
        result["gives_text"] = False
    if file is not None:
        _write_about(file, trainer.dataloader)
    if trainer.runtime.rank == 0:
        reports = [trainer.validator.report()] if trainer.validator else []
        for report in filter(None, reports + trainer.callbacks.reports()):
            print(report)
    if export is not None and result["status"] == "finished":
        for modules in whole_models(trainer.parts):
            result |= export(modules) or {}
    # Not after an error: another rank may never reach the collective that `close` waits for.
    trainer.close()
    trainer.runtime.close()
    return result


def _write_about(file: Path, dataloader: Any) -> None:
    dataset = getattr(dataloader, "dataset", None)
    examples = getattr(dataset, "examples", dataset)
    about = {"conversations": getattr(examples, "conversations", 0)}
    file.write_text(json.dumps(about) + "\n", encoding="utf-8")
