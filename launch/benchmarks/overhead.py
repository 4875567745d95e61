"""What the Trainer costs a step, against a loop written by hand and Hugging Face's Trainer.

All train the same tiny Llama from the same values on the same micro-batches, with the same
loss, clipping, `torch.optim.AdamW` and schedule, on one CPU thread, and log and save nothing. They
take short turns, a fresh model each; a step lasts from one request for a batch to the next, as
the data source sees it, so that whatever a trainer does between steps counts. Reported is the
median of the turns' median steps, in wall time and in the process's CPU time (which other programs
on the machine disturb less), and the median difference to the hand-written loop's turn of the same
round. At the end the trained weights are compared: a trainer that did less, or something else,
would show there.

What processors cost is less than the turns of such a model differ by: so the Trainer, without any
and with two that do nothing, trains a table of logits as well, whose steps take less than a
millisecond.

    launch/bench overhead --json overhead.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

# One thread for everything, before any library reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import transformers
from _here import environment
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, BATCH, SEQ = 256, 4, 32
LR, MAX_NORM = 1e-3, 1.0
CLOCKS = ("wall", "cpu")
PASSING = (("with", "over_ms"), ("without", "ms_per_step"))


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQ,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Table(nn.Module):
    """A model of next to no work: a row of logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(VOCAB, VOCAB)
        nn.init.zeros_(self.rows.weight)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rows(ids))


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


class Source:
    """Micro-batches that exist already, and when each of them was asked for."""

    batch_size = BATCH

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB, (steps, BATCH, SEQ + 1), generator=generator)
        self.batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]
        self.asked: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.asked.append((time.perf_counter(), time.process_time()))
            yield batch

    def milliseconds(self, warm_up: int) -> dict[str, float]:
        """The median step's wall time and CPU time."""
        found = {}
        for clock, marks in zip(CLOCKS, zip(*self.asked[warm_up:], strict=True), strict=True):
            steps = [1e3 * (b - a) for a, b in pairwise(marks)]
            found[clock] = statistics.median(steps)
        return found


class Named(Source):
    """As our Trainer takes them."""

    def __iter__(self) -> Iterator[Any]:
        for ids, labels in super().__iter__():
            yield {"input": ids}, labels


class Flat(Source):
    """As Hugging Face's Trainer takes them."""

    def __iter__(self) -> Iterator[Any]:
        for ids, labels in super().__iter__():
            yield {"input_ids": ids, "labels": labels}


#: Trains for a number of steps.
Train = Callable[[int], tuple[Source, nn.Module]]


def by_hand(steps: int) -> tuple[Source, nn.Module]:
    model, source = make_model().train(), Source(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = schedule(optimizer)
    for ids, labels in source:
        optimizer.zero_grad()
        logits = model(ids).logits
        count = (labels != -100).sum()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        scheduler.step()
    return source, model


def ditty_di(
    steps: int, make: Callable[[], nn.Module] = make_model, **slots: Any
) -> tuple[Source, nn.Module]:
    from ditty_di import Runtime, Trainer
    from ditty_di.loggers import MetricsProcessor
    from ditty_di.losses import CrossEntropyLoss

    model, source = make(), Named(steps)
    runtime = Runtime()
    trainer = Trainer(
        model=model,
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=LR),
        lr_scheduler=schedule,
        dataloader=source,
        max_steps=steps,
        runtime=runtime,
        max_grad_norm=MAX_NORM,
        logger=MetricsProcessor(log_interval=steps),
        **slots,
    )
    trainer.train()
    trainer.close()
    runtime.close()  # its process group would make the others believe they are distributed
    return source, model


def processors() -> dict[str, Any]:
    """Two that do next to nothing, so that what is measured is the way through them."""
    from ditty_di.processors import Context, PostProcessor, PreProcessor

    class Before(PreProcessor):
        def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
            ctx["rows"] = len(batch)
            return batch, ctx

    class Behind(PostProcessor):
        def process(self, output: Any, ctx: Context) -> tuple[Any, Context]:
            ctx["seen"] = ctx["rows"]
            return output, ctx

    return {"preprocessors": [Before()], "postprocessors": [Behind()]}


def hugging_face(steps: int) -> tuple[Source, nn.Module]:
    model, source = make_model(), Flat(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    optimizers: Any = (optimizer, schedule(optimizer))  # typed as LambdaLR there

    class FromSource(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return source

    def loss_fn(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        count = (labels != -100).sum()
        flat = output.logits.flatten(0, 1)
        return F.cross_entropy(flat, labels.flatten(), reduction="sum") / count

    arguments = transformers.TrainingArguments(
        output_dir="unused",
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        max_grad_norm=MAX_NORM,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = FromSource(
        model=model,
        args=arguments,
        train_dataset=source.batches,
        optimizers=optimizers,
        compute_loss_func=loss_fn,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return source, model


def contenders() -> dict[str, Train]:
    found: dict[str, Train] = {"by hand": by_hand, "ditty_di": ditty_di}
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("Hugging Face's Trainer is left out: pip install 'ditty_di[bench]'")
    else:
        found["Hugging Face"] = hugging_face
    return found


def measure(
    contenders: dict[str, Train], *, steps: int, warm_up: int, rounds: int
) -> dict[str, Any]:
    """Each one's steps, and what they take over those of the first."""
    turns: dict[str, list[dict[str, float]]] = {}
    weights: dict[str, Tensor] = {}
    others, first = list(contenders.items()), next(iter(contenders))
    for number in range(rounds):
        # Whoever comes first is another one in each round.
        for name, train in others[number % len(others) :] + others[: number % len(others)]:
            gc.collect()
            source, model = train(steps)
            turns.setdefault(name, []).append(source.milliseconds(warm_up))
            weights[name] = nn.utils.parameters_to_vector(model.parameters()).detach()
    results: dict[str, Any] = {}
    for name, _ in others:
        difference = (weights[name] - weights[first]).abs().max()
        results[name] = {"largest_weight_difference": float(difference)}
        for clock in CLOCKS:
            mine, base = ([turn[clock] for turn in turns[who]] for who in (name, first))
            typical = statistics.median(mine)
            results[name][clock] = {
                "ms_per_step": typical,
                "over_ms": statistics.median(a - b for a, b in zip(mine, base, strict=True)),
                "ratio": typical / statistics.median(base),
                "turns": mine,
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=70, help="optimizer steps a turn")
    parser.add_argument("--warm-up", type=int, default=20, help="of them not counted")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each trainer")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if options.steps < options.warm_up + 3 or options.rounds < 1:
        parser.error("--steps must be at least --warm-up + 3, and --rounds at least 1")
    torch.set_num_threads(1)

    settings = {"steps": options.steps, "warm_up": options.warm_up, "rounds": options.rounds}
    here = environment()
    results = measure(contenders(), **settings)
    more = {**settings, "steps": 20 * options.steps}
    passing = measure(
        {
            "without": partial(ditty_di, make=Table),
            "with": partial(ditty_di, make=Table, **processors()),
        },
        **more,
    )
    print(f"\n{here['processor']}, one thread; {here['versions']}")
    print(f"tiny Llama (d 64, 4 layers), {BATCH} x {SEQ} tokens a step; {settings}\n")
    heads = [f"{clock} {what}" for clock in CLOCKS for what in ("ms/step", "over", "ratio")]
    print(" " * 14 + "".join(f"{head:>14}" for head in heads) + f"{'weights':>12}")
    for name, r in results.items():
        cells = [
            f"{r[clock]['ms_per_step']:14.3f}{r[clock]['over_ms']:+14.3f}{r[clock]['ratio']:14.3f}"
            for clock in CLOCKS
        ]
        print(f"{name:14}{''.join(cells)}{r['largest_weight_difference']:12.1e}")
    print("\nover: ms a step over the loop by hand; weights: largest difference to its result")
    for clock in CLOCKS:
        over, plain = (1e3 * passing[who][clock][what] for who, what in PASSING)
        print(f"two trivial processors: {over:+.0f} us a step of {plain:.0f} ({clock})")
    if here["load_average"] > 0.5 * (here["cores"] or 1):
        print(f"the machine was busy (load {here['load_average']:.1f}): the figures are not final")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {
                    "environment": here,
                    "settings": settings,
                    "results": results,
                    "processors": {"settings": more, "results": passing},
                },
                file,
                indent=2,
            )
            file.write("\n")


if __name__ == "__main__":
    main()
