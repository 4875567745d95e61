"""Cross-entropy over a large vocabulary: whole logits against chunks of them, memory and time.

Each case runs in a process of its own: hidden states `[tokens, hidden]` and an output projection
`[vocab, hidden]` on the device, then the loss and its gradients (of the hidden states, and of the
projection unless it is frozen, as beside adapters). Reported are the memory that this needs at its
peak beyond what was there before (on a CPU the process's resident memory), the median seconds (on a
CPU of its one thread), and with `--compare` how far loss and gradients are from those of whole
logits in float64 (relative norms).

    launch/bench linear_ce --json linear_ce.json
    launch/bench linear_ce --device cuda --vocab 131072 --hidden 4096 --tokens 8192
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _here import environment
from torch import Tensor, nn

from ditty_di.losses import CrossEntropyLoss, LigerLinearCrossEntropyLoss, LinearCrossEntropyLoss
from ditty_di.losses.hidden_states import Head, HiddenStatesOutput


def losses(chunks: list[int], device: str) -> dict[str, Any]:
    """Each called with (hidden states, projection, labels, count), by name."""

    def whole(hidden: Tensor, head: nn.Linear, labels: Tensor, count: Tensor) -> Tensor:
        return CrossEntropyLoss()(head(hidden)[None], labels[None], count)[0]

    def deferred(loss_fn: nn.Module) -> Any:
        def run(hidden: Tensor, head: nn.Linear, labels: Tensor, count: Tensor) -> Tensor:
            output = HiddenStatesOutput(hidden[None], None, Head(head, head, (), nullcontext))
            return loss_fn(output, labels[None], count)[0]

        return run

    cases = {"whole": whole}
    cases |= {f"chunk {n}": deferred(LinearCrossEntropyLoss(chunk_tokens=n)) for n in chunks}
    if device == "cuda":
        cases["liger"] = deferred(LigerLinearCrossEntropyLoss())
    return cases


def problem(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden)
    head = nn.Linear(args.hidden, args.vocab, bias=False)
    labels = torch.randint(0, args.vocab, (args.tokens,))
    labels[torch.rand(args.tokens) < args.ignored] = -100
    head.weight.requires_grad_(not args.frozen)
    return (
        hidden.to(args.device, dtype).requires_grad_(),
        head.to(args.device, dtype),
        labels.to(args.device),
    )


class Peak:
    """Bytes that are in use at the most within it, beyond those before."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> Peak:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")
        self.bytes = peak - self.before

    @staticmethod
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One case, in this process."""
    dtype = getattr(torch, args.dtype)
    hidden, head, labels = problem(args, dtype)
    count = (labels != -100).sum().float()
    run = losses(args.chunks, args.device)[args.case]

    def step() -> Tensor:
        hidden.grad = head.weight.grad = None
        loss = run(hidden, head, labels, count)
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    # What is imported, compiled or allocated once for all belongs to no step.
    run(hidden[:2], head, labels[:2], count).backward()
    if args.device == "cuda":
        step()
    hidden.grad = head.weight.grad = None
    with Peak(args.device) as peak:
        loss = step()
    # On a CPU the process's own time, which other programs on the machine disturb less.
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    seconds = []
    for _ in range(args.repeat):
        start = clock()
        step()
        seconds.append(clock() - start)
    result = {
        "peak_mb": peak.bytes / 1e6,
        "gradients_mb": sum(p.grad.nbytes for p in (hidden, head.weight) if p.grad is not None)
        / 1e6,
        "seconds": statistics.median(seconds),
        "loss": float(loss),
    }
    if args.compare:
        found = [t.grad.double() for t in (hidden, head.weight) if t.grad is not None]
        hidden, head, labels = problem(args, dtype)
        hidden = hidden.detach().double().requires_grad_()
        head = head.double()
        exact = losses([], "cpu")["whole"](hidden, head, labels, count.double())
        # CrossEntropyLoss computes in float32, which is exact enough beside bfloat16.
        exact.backward()
        wanted = [t.grad for t in (hidden, head.weight) if t.grad is not None]
        result["loss_error"] = float((loss - exact.detach()).abs() / exact.detach())
        for name, a, b in zip(("hidden_error", "weight_error"), found, wanted, strict=False):
            result[name] = float((a - b).norm() / b.norm())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ignored", type=float, default=0.0, help="share of labels, 0 to 1")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--frozen", action="store_true", help="the projection is not trained")
    parser.add_argument("--compare", action="store_true", help="with float64: slow, and large")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        args.dtype = args.dtype[0]
        print(json.dumps(measure(args)))
        return
    options = [a for a in sys.argv[1:]]
    rows = []
    for dtype in args.dtype:
        names = ["whole", *(f"chunk {n}" for n in args.chunks)]
        names += ["liger"] if args.device == "cuda" else []
        for name in names:
            command = [sys.executable, __file__, *options, "--dtype", dtype, "--case", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(
                {"dtype": dtype, "loss_fn": name, **json.loads(done.stdout.splitlines()[-1])}
            )
            first = next(r for r in rows if r["dtype"] == dtype)
            print(
                f"{dtype:9s} {name:11s} {rows[-1]['peak_mb']:8.0f} MB "
                f"({rows[-1]['peak_mb'] / first['peak_mb']:.2f}) {rows[-1]['seconds']:8.3f} s "
                f"({rows[-1]['seconds'] / first['seconds']:.2f})  "
                + " ".join(f"{k}={v:.1e}" for k, v in rows[-1].items() if k.endswith("error")),
                flush=True,
            )
    if args.json:
        setup = {k: v for k, v in vars(args).items() if k not in ("json", "case")}
        report = {"environment": environment(), "settings": setup, "results": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
