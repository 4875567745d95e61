"""Folders of runs as training leaves them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

NASTY = "<script>window.broken = true</script>"


def write_run(
    folder: Path,
    steps: int = 40,
    *,
    seed: int = 0,
    typed: dict[str, Any] | None = None,
    status: str | None = "finished",
    text: str = "a text",
) -> Path:
    """Write a run whose loss falls from about 7 to 2 + `seed` / 10."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        exact = 2 + seed / 10 + 5 * math.exp(-8 * step / steps)
        loss = exact + draw.gauss(0, 0.05)
        lines.append(
            {
                **{"step": step, "lr": 1e-3 * (1 - step / steps), "loss": loss},
                **{"grad_norm": abs(draw.gauss(1, 0.2)), "tokens_seen": 512.0 * step},
                **{"tokens_per_second": draw.gauss(15000, 300), "seconds_per_step": 0.25},
                **{"eta_seconds": 0.25 * (steps - step), "memory_gib": 1.2},
            }
        )
        if step % (steps // 4) == 0:
            lines.append({"step": step, "validation/loss": exact + 0.1})
            lines.append({"step": step, "name": "sample/0", "text": f"{text} {step}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config: dict[str, Any] = {"name": "x", "max_steps": steps, "model": {"path": "me/base"}}
    for key, value in (typed or {}).items():
        node = config
        *above, last = key.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    overrides = [f"{key}={value}" for key, value in (typed or {}).items()]
    command = {"config_name": "config", "config_dirs": [], "overrides": overrides}
    (folder / "overrides.yaml").write_text(yaml.safe_dump(command))
    environment = {
        **{"date": "2026-11-27T10:00:00+00:00", "command": "python -m ditty_di", "python": "3.11"},
        **{"folder": str(folder.parent), "git": {"commit": "8e07cde", "dirty": True}},
        **{"hardware": {"host": "box", "gpus": ["H100", "H100"]}, "packages": {"torch": "2.13"}},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    if status is not None:
        loss = 2 + seed / 10 if status == "finished" else None
        result = {"status": status, "step": steps, "objective": loss, "seconds": 10.0}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_sweep(folder: Path, runs: int = 6, steps: int = 40) -> Path:
    """Write a sweep: the objective depends on the rate alone."""
    for n in range(runs):
        typed = {"optimizer.lr": 10 ** (-4 + n / 2), "optimizer.kind": ["adamw", "muon"][n % 2]}
        write_run(folder / str(n), steps, seed=n, typed=typed)
    (folder / "multirun.yaml").touch()
    return folder
