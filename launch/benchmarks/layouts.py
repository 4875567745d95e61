"""Tokens a second of each layout on a few CPU ranks, and of torchtitan's own trainer beside ours.

A tiny Llama and a tiny Qwen3-MoE of transformers, and torchtitan's Llama, are trained over gloo on
processes of one thread each. Every contender of a number of ranks trains on the same rows from the
same values, with the same AdamW and clipping, in short alternating turns, a fresh model each; a
step lasts from one request for a batch to the next, as the data source of rank 0 sees it, so that
whatever a trainer does between steps counts. Reported is the median of the turns' median steps. The
losses of the last step are compared: a layout that did less, or something else, would show there.

On CPUs the figures compare trainers, and tell what the code of a layout costs; which layout is
fastest depends on the network of the machines that they are meant for.

    launch/bench layouts --json layouts.json
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

# One thread for everything, before any library reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _here import environment
from torch import Tensor, nn

from ditty_di import Runtime, Trainer
from ditty_di.compat import sum_gradients_on_gloo
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.models.titan import llama3
from ditty_di.models.weights import hugging_face, initialize, torchtitan
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.titan import parallelize_llama

VOCAB, LR, MAX_NORM = 2048, 1e-3, 1.0


@dataclass(frozen=True)
class Size:
    """Of the models and of the batches of all ranks."""

    width: int = 256
    layers: int = 4
    rows: int = 8
    length: int = 256


TINY = Size(width=32, layers=1, rows=4, length=16)

#: Model and layout by number of ranks; arguments of the runtime.
LAYOUTS: dict[int, dict[tuple[str, str], dict[str, Any]]] = {
    2: {
        ("Llama", "fsdp 2"): {},
        ("Llama", "ddp 2"): {"dp_replicate": 2},
        ("Llama", "tp 2"): {"tp": 2},
        ("Llama", "cp 2"): {"cp": 2},
        ("Qwen3-MoE", "fsdp 2"): {},
        ("Qwen3-MoE", "ep 2"): {"ep": 2},
        ("titan Llama", "fsdp 2"): {},
        ("titan Llama", "tp 2"): {"tp": 2},
    },
    4: {
        ("Llama", "fsdp 4"): {},
        ("Llama", "ddp 4"): {"dp_replicate": 4},
        ("Llama", "tp 4"): {"tp": 4},
        ("Llama", "tp 2 x fsdp 2"): {"tp": 2},
        ("Llama", "cp 2 x fsdp 2"): {"cp": 2},
        ("Qwen3-MoE", "fsdp 4"): {},
        ("Qwen3-MoE", "ep 2 x fsdp 2"): {"ep": 2},
        ("titan Llama", "fsdp 4"): {},
        ("titan Llama", "tp 2 x fsdp 2"): {"tp": 2},
    },
}


# -- models ---------------------------------------------------------------------------------------


def _transformers(kind: str, size: Size) -> nn.Module:
    import transformers

    config = getattr(transformers, kind)(
        vocab_size=VOCAB,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        moe_intermediate_size=size.width,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=size.width // 4,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return from_config(config)


def _titan(size: Size) -> Any:
    return llama3(
        dim=size.width,
        n_layers=size.layers,
        n_heads=4,
        hidden_dim=2 * size.width,
        vocab_size=VOCAB,
        max_seq_len=size.length,
    )


@dataclass(frozen=True)
class Model:
    build: Callable[[Size], nn.Module]
    parallelize: Callable[..., nn.Module] = parallelize
    output: str | None = "logits"
    init: Any = hugging_face


MODELS = {
    "Llama": Model(partial(_transformers, "LlamaConfig")),
    "Qwen3-MoE": Model(partial(_transformers, "Qwen3MoeConfig")),
    "titan Llama": Model(_titan, parallelize_llama, output=None, init=torchtitan),
}


# -- data -----------------------------------------------------------------------------------------


class Source:
    """Batches that exist already, this rank's rows of them, and when each was asked for."""

    def __init__(self, size: Size, steps: int, *, dp_rank: int, dp_world_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB, (steps, size.rows, size.length + 1), generator=generator)
        self.batches = ids[:, dp_rank::dp_world_size]
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.batch_size = self.batches.shape[1]
        self.asked: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for ids in self.batches:
            self.asked.append(time.perf_counter())
            yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

    def seconds(self, warm_up: int) -> float:
        """The median step."""
        return statistics.median(b - a for a, b in pairwise(self.asked[warm_up:]))


# -- trainers: each returns its source and the loss of the last step ------------------------------


def ditty_di(model: str, runtime: Runtime, size: Size, steps: int) -> tuple[Source, float]:
    of = MODELS[model]
    trainer = Trainer(
        model=of.build(size),
        weights=partial(initialize, seed=0, init=of.init),
        loss_fn=CrossEntropyLoss(output=of.output),
        optimizer=partial(torch.optim.AdamW, lr=LR),
        lr_scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0),
        dataloader=partial(Source, size, steps),
        parallelize_fn=of.parallelize,
        runtime=runtime,
        max_steps=steps,
        max_grad_norm=MAX_NORM,
        logger=MetricsProcessor(log_interval=steps),
    )
    trainer.train()
    loss = trainer.last_loss
    trainer.close()
    source: Any = trainer.dataloader
    assert loss is not None
    return source, loss


def torchtitans(model: str, runtime: Runtime, size: Size, steps: int) -> tuple[Source, float]:
    """torchtitan's trainer, told to sum by gloo where there are CPUs, from our initial values."""
    from torchtitan import trainer as titan
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss as TitanLoss
    from torchtitan.components.optimizer import ParamGroupConfig
    from torchtitan.models.llama3.parallelize import parallelize_llama as titan_parallelize
    from torchtitan.protocols.model_spec import ModelSpec

    class Rows(BaseDataLoader.Config):
        def build(self, *, dp_rank: int, dp_world_size: int, **ignored: Any) -> Source:
            return Source(size, steps, dp_rank=dp_rank, dp_world_size=dp_world_size)

    class NoTokenizer(titan.BaseTokenizer.Config):
        def build(self, **ignored: Any) -> None: ...

    class OfLayout(titan.Trainer):
        def init_distributed(self) -> Any:
            return runtime.parallel_dims

    def parallelized(model: nn.Module, **options: Any) -> nn.Module:
        found = titan_parallelize(model, **options)
        sum_gradients_on_gloo(found)
        return found

    adamw = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    of = MODELS[model]
    config: Any = of.build(size).config
    dims = runtime.parallel_dims
    trainer = OfLayout(
        titan.Trainer.Config(
            model_spec=ModelSpec(
                name="llama3",
                flavor="",
                model=config,
                parallelize_fn=parallelized,
                pipelining_fn=None,
                post_optimizer_build_fn=None,
                state_dict_adapter=None,
            ),
            tokenizer=NoTokenizer(),
            dataloader=Rows(),
            loss=TitanLoss.Config(),
            optimizer=titan.OptimizersContainer.Config(
                param_groups=[
                    ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=adamw)
                ],
                implementation="for-loop",  # torch's own choice on CPUs
            ),
            lr_scheduler=titan.LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0),
            training=titan.TrainingConfig(
                local_batch_size=size.rows // runtime.dp_world_size,
                seq_len=size.length,
                max_norm=MAX_NORM,
                steps=steps,
                mixed_precision_param="float32",
                disable_cuda_graphs=True,
            ),
            parallelism=titan.ParallelismConfig(
                data_parallel_replicate_degree=dims.dp_replicate,
                data_parallel_shard_degree=dims.dp_shard,
                tensor_parallel_degree=dims.tp,
                spmd_backend=dims.spmd_backend,
            ),
            activation_checkpoint=None,
            metrics=titan.MetricsProcessor.Config(log_freq=steps),
        )
    )
    (built,) = trainer.model_parts
    initialize(built, device=runtime.device, seed=0, init=of.init)
    losses: list[float] = []
    trainer.metrics_processor.log = lambda step, loss, *others, **more: losses.append(loss)
    trainer.train()
    trainer.close()
    source: Any = trainer.dataloader
    return source, losses[-1]


TRAINERS = {"ditty_di": ditty_di, "torchtitan": torchtitans}


def contenders(ranks: int) -> list[tuple[str, str, str]]:
    """(model, layout, trainer); torchtitan trains its own model only."""
    return [
        (model, layout, trainer)
        for model, layout in LAYOUTS[ranks]
        for trainer in TRAINERS
        if trainer == "ditty_di" or model == "titan Llama"
    ]


# -- turns ----------------------------------------------------------------------------------------


def serve(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """Take all turns on one of the ranks; rank 0 writes what it measured."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="DTensor")  # torchtitan seeds it on any device
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    size = TINY if options.tiny else Size()
    # One runtime for all turns of a layout: each has process groups.
    runtimes = {key: Runtime(seed=0, **degrees) for key, degrees in LAYOUTS[ranks].items()}
    turns: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for number in range(options.rounds):
        who = contenders(ranks)
        first = number % len(who)  # whoever comes first is another one in each round
        for model, layout, trainer in who[first:] + who[:first]:
            gc.collect()
            train = TRAINERS[trainer]
            source, loss = train(model, runtimes[model, layout], size, options.steps)
            name = f"{model}, {layout}, {trainer}"
            turns.setdefault(name, []).append(source.seconds(options.warm_up))
            losses[name] = loss
    if rank == 0:
        tokens = size.rows * size.length
        found = {
            name: {
                "tokens_per_second": tokens / statistics.median(seconds),
                "turns": [tokens / s for s in seconds],
                "last_loss": losses[name],
            }
            for name, seconds in turns.items()
        }
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # not through the interpreter's end, where threads of process groups may abort


def measure(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (ranks, folder, options), nprocs=ranks)
        return json.loads(Path(folder, "found.json").read_text())  # type: ignore[no-any-return]


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Our tokens a second over torchtitan's in the same round: medians, by layout."""
    both = {
        name.removesuffix(", torchtitan"): (found[name.replace("torchtitan", "ditty_di")], theirs)
        for name, theirs in found.items()
        if name.endswith(", torchtitan")
    }
    return {
        name: statistics.median(a / b for a, b in zip(o["turns"], t["turns"], strict=True))
        for name, (o, t) in both.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps a turn")
    parser.add_argument("--warm-up", type=int, default=5, help="of them not counted")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--tiny", action="store_true", help="models that only show that it works")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if options.steps < options.warm_up + 3 or options.rounds < 1:
        parser.error("--steps must be at least --warm-up + 3, and --rounds at least 1")
    here = environment()
    results = {ranks: measure(ranks, options) for ranks in options.ranks}
    for ranks, found in results.items():
        print(f"\n{ranks} ranks")
        for name, of_name in found.items():
            print(f"{name:44}{of_name['tokens_per_second']:12.0f} tokens/s", end="")
            print(f"  loss {of_name['last_loss']:.6f}")
        for name, ratio in ratios(found).items():
            print(f"{name}: {ratio:.2f} times the tokens/s of torchtitan's trainer")
    if here["load_average"] > 0.5 * (here["cores"] or 1):
        print(f"the machine was busy (load {here['load_average']:.1f}): the figures are not final")
    if options.json:
        settings = {"steps": options.steps, "warm_up": options.warm_up, "rounds": options.rounds}
        report = {
            "environment": here,
            "settings": {**settings, "tiny": options.tiny},
            "results": results,
            "ratios": {ranks: ratios(found) for ranks, found in results.items()},
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
