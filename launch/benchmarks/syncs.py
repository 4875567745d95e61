"""How often the host waits for the device in an optimizer step that is not logged.

A dispatch mode counts the operations that make the host wait: `_local_scalar_dense` (`item`,
`bool`, `float` of a tensor) and copies from the device to the host (`tolist`, `cpu`). On a machine
without accelerator every scalar read is counted, also those of tensors that stay on the CPU beside
an accelerator, such as the step counters of optimizers.

    launch/bench syncs --json syncs.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from functools import partial
from typing import Any

import torch
from _here import environment
from overhead import MAX_NORM, Named, make_model, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditty_di import Runtime, Trainer
from ditty_di.callbacks import Callback
from ditty_di.losses import CrossEntropyLoss
from ditty_di.metrics import Metrics

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
            str(func) in COPIES and from_device and to_host
        ):
            self.found[str(func)] += 1
        return result


def measure(steps: int, warm_up: int, **optimizer: Any) -> dict[str, float]:
    """Return the number of syncs per step, by operation."""
    counts = CountSyncs()

    class Watch(Callback):
        def step_end(self, trainer: Any) -> None:
            if trainer.step == warm_up:
                counts.__enter__()
            elif trainer.step == steps - 1:
                counts.__exit__(None, None, None)

    runtime = Runtime()
    trainer = Trainer(
        model=make_model(),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, **optimizer),
        lr_scheduler=schedule,
        dataloader=Named(steps),
        steps=steps,
        runtime=runtime,
        max_norm=MAX_NORM,
        metrics=Metrics(every=steps),
        callbacks={"watch": Watch()},
    )
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
    results = {
        name: measure(options.steps, 5, **arguments)
        for name, arguments in (("foreach", {}), ("fused", {"fused": True}))
    }
    for name, found in results.items():
        print(f"AdamW {name:8} {sum(found.values()):.1f} syncs per step: {found}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
