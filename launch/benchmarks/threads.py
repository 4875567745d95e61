"""How OpenMP threads that wait should wait: training speed alone and beside other work.

Threads of a CPU kernel that have finished spin for a while, in the hope of more work. Alone that
saves the time of waking them; beside other processes they burn the time of the thread that they
wait for. Each setting trains the tiny Llama of the experiment `pretrain` in a process of its own
(the environment is read when OpenMP is loaded), in alternating turns, alone and beside processes
that only count. Reported are the medians of tokens a second, and their ratio to the default's.

    launch/bench threads --json threads.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from _here import environment

BATCH, SEQ = 16, 256
#: What a user who sets nothing has without ditty_di, first.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {n}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 1000, 3000, 10000, 30000)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def train(seconds: float) -> None:
    """Train for a while; print tokens a second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(2048, (BATCH, SEQ))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    print(steps * BATCH * SEQ / (time.perf_counter() - start))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other work on the machine: processes that do nothing but count."""
    count = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(count) for _ in range(processes)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def measure(setting: dict[str, str], seconds: float) -> float:
    ours = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, __file__, "--train", str(seconds)]
    done = subprocess.run(command, env=env | setting, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=5.0, help="of training, a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
        return

    found: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "busy": []} for name in arguments.only
    }
    for _ in range(arguments.rounds):
        for where, processes in (("alone", 0), ("busy", arguments.busy)):
            for name in arguments.only:
                with busy(processes):
                    found[name][where].append(measure(SETTINGS[name], arguments.seconds))

    median = {
        name: {where: statistics.median(values) for where, values in turns.items()}
        for name, turns in found.items()
    }
    first = median[arguments.only[0]]
    print(f"{'tokens/s':12}  {'alone':>8}  {'ratio':>6}  {'busy':>8}  {'ratio':>6}")
    for name, at in median.items():
        alone, beside = at["alone"], at["busy"]
        ratios = alone / first["alone"], beside / first["busy"]
        print(f"{name:12}  {alone:8.0f}  {ratios[0]:6.2f}  {beside:8.0f}  {ratios[1]:6.2f}")
    if arguments.json:
        report = {
            "environment": environment(),
            "busy_processes": arguments.busy,
            "tokens_per_second": found,
            "median": median,
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
