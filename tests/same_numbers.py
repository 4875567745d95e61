"""Record what the shipped experiments compute, and compare it with an earlier record.

    launch/numbers before.json
    launch/numbers after.json --against before.json      # exit code 1 where anything differs

Of each experiment, on one rank and on two: losses and gradient norms of 20 steps, validation
losses, names, shapes and dtypes in the checkpoint, and the files of the export with their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from tests import warm

EXPERIMENTS = (
    *("pretrain", "titan_pretrain", "pretrain_base", "full", "lora", "dora", "qlora", "int8_lora"),
    *("fsdp_qlora", "fp16", "fp8", "seq2seq", "classification", "two_heads", "distillation"),
    *("diffusion", "flow_matching", "moe", "hybrid"),
    *("sequence_classification", "token_classification", "embedding", "masked_lm"),
)
#: Experiments whose rows are long: fewer of them.
SMALLER = {"pretrain_base": ["data.loader.micro_batch_size=2", "global_batch_size=8"]}


def record(experiment: str, ranks: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train in `folder` and return what is compared."""
    run = folder / "run"
    done = warm.run(
        [
            *("-m", "ditty_di", f"+experiment={experiment}", f"max_steps={steps}", f"run={run}"),
            *("logger.log_interval=1", f"launcher.nproc={ranks}", *SMALLER.get(experiment, ())),
        ],
        cwd=folder,
        timeout=1800,
    )
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "training": [[r["step"], r["loss"], r["grad_norm"], r["lr"]] for r in rows if "loss" in r],
        "validation": [
            {k: v for k, v in r.items() if k == "step" or k.startswith("validation/")}
            for r in rows
            if any(k.startswith("validation/") for k in r)
        ],
        "checkpoint": _names_and_shapes(max((run / "checkpoints").iterdir())),
        "export": {
            str(file.relative_to(run / "export")): _hash(file)
            for file in sorted((run / "export").rglob("*"))
            if file.is_file() and file.name != "README.md"  # the card has the date
        },
    }


def _names_and_shapes(checkpoint: Path) -> dict[str, str]:
    entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {
        name: f"{tuple(entry.size)} {entry.properties.dtype}" if hasattr(entry, "size") else "bytes"
        for name, entry in sorted(entries.items())
    }


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each kind of record that differs, of the experiments in both."""
    return [
        f"{name}: {kind} differs"
        for name in before.keys() & after.keys()
        for kind in before[name].keys() | after[name].keys()
        if before[name].get(kind) != after[name].get(kind)
    ]


def main() -> int:
    """Record, write, and compare if asked; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    parser.add_argument("--only", help="experiments, separated by commas; default: all")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    given = parser.parse_args()
    records: dict[str, Any] = {}
    for experiment in given.only.split(",") if given.only else EXPERIMENTS:
        for ranks in map(int, given.ranks.split(",")):
            with tempfile.TemporaryDirectory(prefix="numbers-") as folder:
                found = record(experiment, ranks, given.steps, Path(folder))
            print(experiment, ranks, found.get("failed", "recorded"), flush=True)
            records[f"{experiment} on {ranks}"] = found
            given.output.write_text(json.dumps(records, indent=1) + "\n")
    if given.against is None:
        return 0
    found = sorted(differences(json.loads(given.against.read_text()), records))
    print("\n".join(found) or "the same to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
