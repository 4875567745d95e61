"""Whether the best learning rate of a narrow model is that of wider ones, with muP and without.

Decoders of several widths learn the bytes of Python's standard library, each with several rates,
the same steps and the same rows: once relative to the narrowest one (muP), and once each with
itself as its base, which is a Llama with one rate for all parameters. Reported are the losses of
the last tenth of the steps, the best rate of each width (of a parabola through the best three, as
a power of two), and what the rate that is best at the narrowest width costs at each other.

    launch/bench mup --json mup.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _here import environment
from torch import Tensor, nn

from ditty_di.models import mup
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import materialize
from ditty_di.optim import wsd
from ditty_di.optim.mup import by_width

HEAD, ROWS, SEQ = 16, 16, 64


def corpus(size: int) -> Tensor:
    """Return bytes of the standard library's modules, in the order of their names."""
    text = b""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long()


def widths(hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
    }


def train(hidden: int, base: int, lr: float, steps: int, seed: int, text: Tensor) -> float:
    """Return the mean loss of the last tenth of the steps; infinity where it is not finite."""
    config = mup.llama(
        base=widths(base),
        **widths(hidden),
        num_hidden_layers=2,
        vocab_size=256,
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
    )
    model: Any = from_config(config, init=mup.init)
    cpu = torch.device("cpu")
    materialize(model, cpu)
    model.default_weights(model, device=cpu, seed=seed)
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = by_width(list(model.named_parameters()), model=model, optimizer=adam, lr=lr)
    schedule = wsd(optimizer, max_steps=steps, warmup_ratio=0.1, decay_ratio=0.5)
    drawn = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - SEQ, (ROWS,), generator=drawn)
        rows = torch.stack([text[start : start + SEQ + 1] for start in starts.tolist()])
        logits = model(rows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
    return statistics.mean(losses[-max(1, steps // 10) :])


def best(losses: dict[float, float]) -> float:
    """Return log2 of the best rate, between the measured ones by a parabola through three."""
    rates = sorted(losses)
    n = min(range(len(rates)), key=lambda i: losses[rates[i]])
    around = [losses[rate] for rate in rates[max(0, n - 1) : n + 2]]
    if len(around) < 3 or not all(map(math.isfinite, around)):
        return math.log2(rates[n])
    left, middle, right = around
    step = math.log2(rates[n + 1] / rates[n])
    return math.log2(rates[n]) + step * (left - right) / (2 * (left - 2 * middle + right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--rates", type=int, nargs="*", default=[*range(-11, -2)], help="log2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    text = corpus(1 << 20)

    found: dict[str, dict[int, dict[float, float]]] = {"muP": {}, "without": {}}
    started = time.perf_counter()
    for hidden in arguments.widths:
        for name, base in (("muP", arguments.widths[0]), ("without", hidden)):
            for power in arguments.rates:
                runs = [
                    train(hidden, base, 2.0**power, arguments.steps, seed, text)
                    for seed in range(arguments.seeds)
                ]
                found[name].setdefault(hidden, {})[2.0**power] = statistics.mean(runs)

    report: dict[str, dict[str, dict[int, float]]] = {}
    print("log2 of the best learning rate, and what the narrowest model's costs (nats a byte)")
    print(f"{'width':>8}" + "".join(f"{hidden:>16}" for hidden in arguments.widths))
    for name, of_width in found.items():
        narrow = of_width[arguments.widths[0]]
        transferred = min(narrow, key=lambda rate: narrow[rate])
        powers = {hidden: best(losses) for hidden, losses in of_width.items()}
        costs = {h: losses[transferred] - min(losses.values()) for h, losses in of_width.items()}
        report[name] = {"log2_best_rate": powers, "cost_of_transfer": costs}
        shown = "".join(f"{powers[h]:>9.2f} {costs[h]:>+6.3f}" for h in arguments.widths)
        print(f"{name:>8}{shown}")
    if arguments.json:
        about = {"steps": arguments.steps, "seeds": arguments.seeds, "rows": ROWS, "seq_len": SEQ}
        figures = {
            "environment": environment(),
            **about,
            "seconds": time.perf_counter() - started,
            "losses": found,
            **report,
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
