"""Fine-tuning at the shapes of Llama 3.1 8B on one GPU: speed and memory by method.

Each case is a run of the command line in a process of its own, with random values made on the
device and random tokens (the figures do not depend on either), activation checkpointing and
compiled blocks. Reported are the medians over the steps after the warm-up, as the run itself
measured them: tokens/s, TFLOP/s and MFU of the model's own operations (6 a weight and token, 4 for
a frozen one, attention scores on top, recomputation not counted), and the peak of the memory that
tensors took. A case that fails says so, and the others go on.

    launch/bench gpu --json gpu.json
    launch/bench gpu --tiny                 # the same cases at toy size, anywhere
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _here import environment

HERE = Path(__file__).parent
#: name -> (experiment, rows a step, tokens a row, further overrides)
CASES: dict[str, tuple[str, int, int, list[str]]] = {
    "LoRA 2 x 2048": ("gpu_lora", 2, 2048, []),
    "LoRA 2 x 4096": ("gpu_lora", 2, 4096, []),
    "LoRA 1 x 4096": ("gpu_lora", 1, 4096, []),
    "QLoRA 2 x 2048": ("gpu_qlora", 2, 2048, []),
    "QLoRA 2 x 4096": ("gpu_qlora", 2, 4096, []),
    "full, 8-bit AdamW 2 x 2048": ("gpu_full", 2, 2048, []),
}
TINY = [
    "model.config.vocab_size=512",
    "model.config.hidden_size=128",
    "model.config.intermediate_size=256",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.train.tokens.size=20000",
    "compile=null",
]
#: Of model.config, for the scores' operations: `12 layers hidden tokens` (see loggers.flops).
SHAPES = {"layers": 32, "hidden": 4096}
MEASURED = ("tokens_per_second", "tflops", "mfu", "memory_gib")


def run(name: str, *, steps: int, warmup: int, tiny: bool, folder: Path) -> dict[str, Any]:
    experiment, rows, tokens, more = CASES[name]
    where = folder / re.sub(r"\W+", "_", name)
    tokens = 64 if tiny else tokens
    scores = 0.0 if tiny else 12.0 * SHAPES["layers"] * SHAPES["hidden"] * tokens
    command = [
        *(sys.executable, "-m", "ditty_di", "--config-dir", str(HERE / "conf")),
        *(f"+experiment={experiment}", f"run={where}", f"max_steps={steps}"),
        *(f"data.loader.micro_batch_size={rows}", f"data.seq_len={tokens}"),
        *(f"+logger.attention_flops_per_token={scores}", "launcher.nproc=1"),
        *(TINY if tiny else []),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-6:], "command": command}
    lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("step", 0) > warmup and "loss" in line]
    medians = {
        key: statistics.median(line[key] for line in measured)
        for key in MEASURED
        if key in measured[0]
    }
    return medians | {"loss": measured[-1]["loss"], "steps": len(measured)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=8, help="steps that do not count")
    parser.add_argument("--only", nargs="*", help="parts of the names of the cases to run")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("no CUDA device here; --tiny tries the script without one")
    chosen = [c for c in CASES if not options.only or any(part in c for part in options.only)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            results[name] = run(
                name,
                steps=options.steps,
                warmup=options.warmup,
                tiny=options.tiny,
                folder=Path(folder),
            )
            print(f"{name:28} {json.dumps(results[name])}", flush=True)
            if options.json:
                report = {"environment": environment(), "tiny": options.tiny, "cases": results}
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    if any("failed" in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
