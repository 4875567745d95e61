"""Seconds and memory of task=plan: Llama 3.1 at three sizes and a mixture of experts.

Each case is a run of the command line in a process of its own, one row of 8,192 tokens a rank,
bfloat16 beside float32 parameters, every block recomputed. Reported are wall and CPU seconds of the
command, what of them the planning took, its resident memory, and what it says.

    launch/bench plan --json plan.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _here import environment

HERE = Path(__file__).parent
#: name -> further arguments
CASES = {
    "8B on 8": ["model=llama_8b", "world_size=8"],
    "70B on 256": ["model=llama_70b", "world_size=256"],
    "405B on 16384": [
        *("model=llama_405b", "world_size=16384"),
        *("parallelize=hsdp", "parallelize.dp_shard=512"),
    ],
    "235B, experts, on 512": ["model=qwen3_235b", "world_size=512"],
}
COMMON = [
    *("+experiment=pretrain", "task=plan", "data=random_tokens", "tokenizer=none"),
    *("data.seq_len=8192", "data.loader.micro_batch_size=1", "model.dtype=float32"),
    *(
        "precision=bf16",
        "activation_checkpointing=full",
        "validator=none",
        "global_batch_size=null",
    ),
]


def run(name: str, folder: Path) -> dict[str, Any]:
    where = folder / re.sub(r"\W+", "_", name)
    command = [
        *(sys.executable, "-m", "ditty_di", "--config-dir", str(HERE / "conf")),
        *(*COMMON, *CASES[name], f"run={where}"),
    ]
    log, start = folder / f"{where.name}.log", time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    wall, output = time.perf_counter() - start, log.read_text().splitlines()
    if status:
        return {"failed": output[-6:], "command": command}
    plan, result = (json.loads((where / f"{name}.json").read_text()) for name in ("plan", "result"))
    return {
        "seconds": wall,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds_after_imports": result["seconds"],
        "peak_megabytes": used.ru_maxrss / 1000,
        "says": {
            "fits": plan["fits"],
            "peak_gib": plan["peak"] / (1 << 30),
            "tflop_per_rank": max(rank["flops"] for rank in plan["positions"]) / 1e12,
            "seconds_per_step": plan["seconds"],
        },
        "output": output,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    here, results = environment(), {}
    print(f"{here['processor']}, load {here['load_average']:.1f}\n")
    print(f"{'':24}{'wall s':>10}{'CPU s':>10}{'MB':>10}{'GiB':>10}{'fits':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            results[name] = found = run(name, Path(folder))
            if "failed" in found:
                print(f"{name:24} failed: {found['failed']}")
                continue
            says = found["says"]
            print(
                f"{name:24}{found['seconds']:10.1f}{found['cpu_seconds']:10.1f}"
                f"{found['peak_megabytes']:10.0f}{says['peak_gib']:10.1f}{says['fits']!s:>8}",
                flush=True,
            )
    if options.json:
        here["load_average_after"] = os.getloadavg()[0]
        report = {"environment": here, "cases": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
