"""What padding costs: the same ragged examples trained on padded, length-grouped, packed, flat.

The lengths are drawn as `exp(normal(ln 100, 0.9))`, clipped to 8 ... 512 tokens: a median of 100, a
mean of about 140, a few at the limit. Instruction data are about like that; `--sigma` makes them
more or less ragged. Every token is a label.

All contenders train the same small Llama from the same values with ditty_di's Trainer on one CPU
thread, about the same number of tokens a step: 8 examples, or 2 packs of 512. They take short
turns, a fresh model each. A turn's speed is its non-padding tokens over the time from the first
request for a batch after the warm-up to the last, in wall time and in the process's CPU time (which
other programs on the machine disturb less). Reported is the median of the turns, and the median
ratio to the padded turn of the same round. Before that, the loss of all examples under the
same untrained model is computed in each form: it must be one number.

    launch/bench packing --json packing.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

# One thread for everything, before any library reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _here import environment
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ditty_di import Runtime, Trainer
from ditty_di.data import (
    LengthGroupedSampler,
    Loader,
    PackedCollate,
    PackedDataset,
    PaddedCollate,
    PaddingFreeCollate,
)
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss

VOCAB, SEQ, EXAMPLES_A_STEP, PACKS_A_STEP = 2048, 512, 8, 2
MEDIAN, SHORTEST = 100, 8
CLOCKS = ("wall", "cpu")


class Ragged:
    """Examples of random tokens, each as long as it is."""

    def __init__(self, examples: int, sigma: float) -> None:
        rng = np.random.default_rng(0)
        drawn = np.exp(rng.normal(np.log(MEDIAN), sigma, examples))
        self.lengths = np.clip(np.round(drawn), SHORTEST, SEQ).astype(np.int64)
        self.ids = [torch.from_numpy(rng.integers(0, VOCAB, n + 1)) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return {"input": self.ids[index][:-1]}, self.ids[index][1:]


class Watched:
    """A loader that notes when each micro-batch was asked for, and its tokens."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.batch_size = loader, loader.batch_size
        self.asked: list[tuple[float, float]] = []
        self.real: list[int] = []
        self.computed: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in self.loader:
            self.asked.append((time.perf_counter(), time.process_time()))
            self.real.append(int((labels != -100).sum()))
            self.computed.append(labels.numel())
            yield inputs, labels

    def tokens_per_second(self, warm_up: int) -> dict[str, float]:
        tokens = sum(self.real[warm_up:-1])
        spans = zip(CLOCKS, self.asked[warm_up], self.asked[-1], strict=True)
        return {clock: tokens / (end - start) for clock, start, end in spans}


def make_model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loaders(examples: Ragged) -> dict[str, partial[Loader]]:
    grouped = partial(LengthGroupedSampler, dataset=examples, group_size=EXAMPLES_A_STEP)
    return {
        "padded": partial(Loader, examples, EXAMPLES_A_STEP, collate_fn=PaddedCollate()),
        "length_grouped": partial(
            Loader, examples, EXAMPLES_A_STEP, collate_fn=PaddedCollate(), sampler=grouped
        ),
        "packed": partial(
            Loader, PackedDataset(examples, SEQ), PACKS_A_STEP, collate_fn=PackedCollate()
        ),
        "padding_free": partial(Loader, examples, EXAMPLES_A_STEP, collate_fn=PaddingFreeCollate()),
    }


def loss_of_all(loader: Loader, hidden: int) -> float:
    """Of the untrained model over all examples, in nats a token."""
    model, loss_fn = make_model(hidden).eval(), CrossEntropyLoss(output="logits")
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, labels in loader:
            rest = {name: value for name, value in inputs.items() if name != "input"}
            output = model(inputs["input"], **rest)
            total += float(loss_fn(output, labels, torch.ones(()))[0])
            count += int((labels != -100).sum())
    return total / count


def turn(loader: Loader, steps: int, hidden: int) -> Watched:
    source = Watched(loader)
    runtime = Runtime()
    trainer = Trainer(
        model=make_model(hidden),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        dataloader=source,
        max_steps=steps,
        runtime=runtime,
        logger=MetricsProcessor(log_interval=steps),
    )
    status = trainer.train()["status"]
    if status != "finished":
        raise SystemExit(f"a turn ended early: {status}")
    trainer.close()
    runtime.close()
    return source


def measure(options: argparse.Namespace) -> dict[str, Any]:
    examples = Ragged(options.examples, options.sigma)
    forms = loaders(examples)
    losses = {name: loss_of_all(make(epochs=1), options.hidden) for name, make in forms.items()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    shares: dict[str, float] = {}
    names = list(forms)
    for number in range(options.rounds):
        # Whoever comes first is another one in each round.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            source = turn(forms[name](seed=number), options.steps + 1, options.hidden)
            turns[name].append(source.tokens_per_second(options.warm_up))
            shares[name] = sum(source.real) / sum(source.computed)
    results: dict[str, Any] = {}
    for name in forms:
        results[name] = {
            "share_of_real_tokens": shares[name],
            "loss_of_all_examples": losses[name],
        }
        for clock in CLOCKS:
            mine, padded = ([each[clock] for each in turns[who]] for who in (name, "padded"))
            results[name][clock] = {
                "tokens_per_second": statistics.median(mine),
                "ratio_to_padded": statistics.median(
                    a / b for a, b in zip(mine, padded, strict=True)
                ),
                "turns": mine,
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps a turn")
    parser.add_argument("--warm-up", type=int, default=5, help="of them not counted")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=0.9, help="of the lengths' logarithm")
    parser.add_argument("--hidden", type=int, default=256, help="the model's width")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if options.steps < options.warm_up + 2 or options.rounds < 1:
        parser.error("--steps must be at least --warm-up + 2, and --rounds at least 1")
    torch.set_num_threads(1)

    here = environment()
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    lengths = Ragged(options.examples, options.sigma).lengths
    settings["lengths"] = {
        "distribution": f"exp(normal(ln {MEDIAN}, {options.sigma})) within {SHORTEST} ... {SEQ}",
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
    }
    settings["parameters"] = nn.utils.parameters_to_vector(
        make_model(options.hidden).parameters()
    ).numel()
    results = measure(options)
    print(f"\n{here['processor']}, one thread; {here['versions']}")
    print(f"Llama of {settings['parameters']:,} parameters; {settings['lengths']}\n")
    heads = [f"{clock} {what}" for clock in CLOCKS for what in ("tokens/s", "ratio")]
    print(" " * 16 + "".join(f"{head:>14}" for head in [*heads, "real tokens", "loss of all"]))
    for name, r in results.items():
        cells = [
            f"{r[clock]['tokens_per_second']:14,.0f}{r[clock]['ratio_to_padded']:14.2f}"
            for clock in CLOCKS
        ]
        rest = f"{r['share_of_real_tokens']:14.1%}{r['loss_of_all_examples']:14.7f}"
        print(f"{name:16}{''.join(cells)}{rest}")
    print(
        "\ntokens/s: without padding; ratio: to padded; real: share of tokens that are no padding"
    )
    if here["load_average"] > 0.5 * (here["cores"] or 1):
        print(f"the machine was busy (load {here['load_average']:.1f}): the figures are not final")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"environment": here, "settings": settings, "results": results}, file, indent=2
            )
            file.write("\n")


if __name__ == "__main__":
    main()
