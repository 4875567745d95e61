"""How often the host waits for the device in an optimizer step that is not logged.

"loss and grad_norm" is the trainer's own wait: their values are read in the step that computes
them. Beside it a dispatch mode counts the operations of model and optimizer that make the host
wait: `_local_scalar_dense` (`item`, `bool`, `float` of a tensor) and blocking copies from the
device to the host. On a machine without accelerator every scalar read is counted, also those of
tensors that stay on the CPU beside an accelerator, such as step counters of optimizers.

    launch/bench syncs --json syncs.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from _here import environment
from overhead import MAX_NORM, Named, make_model, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditty_di import Runtime, Trainer
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.training.non_finite import StepValues
from ditty_di.training.step import TrainStep

CASES: dict[str, dict[str, Any]] = {
    "foreach": {},
    "fused": {"fused": True},
    "fused, a step may be skipped": {"fused": True, "max_skipped_steps": 1},
}
COPIES = ("aten._to_copy.default", "aten.copy_.default")


class CountSyncs(TorchDispatchMode):
    """Count the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.accelerator = torch.accelerator.is_available()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count, and run the operation."""
        result = func(*args, **(kwargs or {}))
        from_device = any(
            isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in tree_leaves(args)
        )
        to_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        reads = str(func) == "aten._local_scalar_dense.default"
        if (reads and (from_device or not self.accelerator)) or (
            str(func) in COPIES
            and from_device
            and to_host
            and not (kwargs or {}).get("non_blocking")
        ):
            self.found[str(func)] += 1
        return result


def measure(
    steps: int, warm_up: int, max_skipped_steps: int = 0, **optimizer: Any
) -> dict[str, float]:
    """Return the number of syncs per step, by operation."""
    counts = CountSyncs()

    class Counted(TrainStep):
        """Count in the steps that are neither warm-up nor logged."""

        taken = 0

        def __call__(self, *args: Any) -> StepValues:
            self.taken += 1
            counted = warm_up < self.taken < steps
            with counts if counted else nullcontext():
                values = super().__call__(*args)
            counts.found["loss and grad_norm"] += counted and not values.pending
            return values

    runtime = Runtime()
    trainer = Trainer(
        model=make_model(),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, **optimizer),
        lr_scheduler=schedule,
        dataloader=Named(steps),
        max_steps=steps,
        runtime=runtime,
        max_grad_norm=MAX_NORM,
        logger=MetricsProcessor(log_interval=steps),
        max_skipped_steps=max_skipped_steps,
    )
    trainer.optimizer_step.__class__ = Counted
    trainer.train()
    trainer.close()
    runtime.close()
    return {name: n / (steps - 1 - warm_up) for name, n in counts.found.items()}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    results = {name: measure(options.steps, 5, **arguments) for name, arguments in CASES.items()}
    for name, found in results.items():
        print(f"AdamW {name:30} {sum(found.values()):.1f} syncs per step: {found}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
