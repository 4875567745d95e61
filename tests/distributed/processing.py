"""Processors, composite losses, parameters of losses and callbacks on one rank or two; run by
`test_processing`."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.callbacks import ASHA, Callback, EarlyStopping
from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.loggers import MetricsProcessor
from ditty_di.losses import (
    CompositeLoss,
    CrossEntropyCalculator,
    MSELoss,
    UncertaintyWeightedLoss,
)
from ditty_di.optim.schedules import constant
from ditty_di.parallelize.data_parallel import shard
from ditty_di.processors import Context, PostProcessor, PreProcessor
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Recorder
from tests.distributed.pipelined import Staged, split

VOCAB, SEQ, VALUES = 11, 6, 5


class Rows(torch.utils.data.Dataset):
    """Tokens with ragged labels, values with a ragged mask; `bad` rows begin with the last token,
    which no other row has, and `lacking` ones are not there."""

    contract = "-> input:2:i64, values:3:f32, kept:2:b | ctx.target:2:i64"

    def __init__(self, rows: int = 48, *, bad: Any = (), lacking: Any = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCAB - 1, (rows, SEQ + 1), generator=generator)
        self.input, self.labels = ids[:, :-1].clone(), ids[:, 1:].clone()
        self.values = torch.randn(rows, SEQ, VALUES, generator=generator)
        self.kept = torch.rand(rows, SEQ, generator=generator) < 0.5
        self.kept[:, 0] = True
        for row in range(rows):
            self.labels[row, : row % (SEQ - 1)] = -100
        self.input[list(bad), 0] = VOCAB - 1
        self.there = [row for row in range(rows) if row not in set(lacking)]

    def __len__(self) -> int:
        return len(self.there)

    def __getitem__(self, i: int) -> Any:
        row = self.there[i]
        extra = {"values": self.values[row], "kept": self.kept[row]}
        return {"input": self.input[row], **extra}, self.labels[row]


class TwoHeads(nn.Module):
    """Says the next token and values: `[batch, seq, vocab]` and `[batch, seq, 5]`."""

    contract = "ids:2:i64, scale:0:f32 -> logits:3:f32, values:3:f32"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Tanh())
        self.logits, self.values = nn.Linear(16, VOCAB), nn.Linear(16, VALUES)

    def forward(self, ids: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(ids) * scale
        return self.logits(hidden), self.values(hidden)


class Targets(PreProcessor):
    """Takes what is no argument of the model out of them, and gives it one of its own."""

    contract = (
        "input:2:i64 | ctx.forward_kwargs.values:3:f32, ctx.forward_kwargs.kept:2:b "
        "-> ids:2:i64 | ctx.values:3:f32, ctx.mask:3:b, ctx.forward_kwargs.scale:0:f32"
    )

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        keywords = ctx["forward_kwargs"]
        ctx["values"] = keywords.pop("values")
        ctx["mask"] = keywords.pop("kept").unsqueeze(-1)  # counts five elements each
        keywords["scale"] = torch.tensor(0.5)
        return batch, ctx


class Refuse(PreProcessor):
    """Rejects micro-batches that have a bad row."""

    contract = "0:2:i64 ->"

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context] | None:
        return None if (batch[:, 0] == VOCAB - 1).any() else (batch, ctx)


class Double(PostProcessor):
    contract = "logits:3:f32, values:3:f32 -> logits:3:f32, values:3:f32"

    def process(self, output: Any, ctx: Context) -> tuple[Any, Context]:
        logits, values = output
        return (logits, 2 * values), ctx


def parts(weights: tuple[float, float] = (1.0, 1.0)) -> list[Any]:
    values = MSELoss(output_index=1, target_key="values", mask_key="mask")
    return [(CrossEntropyCalculator(), weights[0]), (values, weights[1])]


def composite() -> CompositeLoss:
    return CompositeLoss(parts((1.0, 0.7)))


def uncertain() -> UncertaintyWeightedLoss:
    return UncertaintyWeightedLoss(parts((1.0, 0.5)), log_variance=0.3)


def make(
    runtime: Runtime, *, micro: int, rows: int = 12, data: Any = None, **slots: Any
) -> tuple[Trainer, Recorder]:
    """A trainer on windows of `rows` rows in micro-batches of `micro`."""
    torch.manual_seed(0)
    recorder = Recorder()
    options: dict[str, Any] = {
        "model": TwoHeads(),
        "loss_fn": composite(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": partial(constant, max_steps=1000),
        "dataloader": partial(Loader, data or Rows(), micro_batch_size=micro, shuffle=False),
        "parallelize_fn": shard,
        "preprocessors": [Refuse(), Targets()],
        "postprocessors": [Double()],
        "global_batch_size": rows,
        "max_steps": 6,
        "logger": MetricsProcessor([recorder], log_interval=1),
    }
    return Trainer(runtime=runtime, **{**options, **slots}), recorder


NAMES = ("loss", "grad_norm", "cross_entropy_calculator/ce", "mse_loss/mse", "total")


def curves(recorder: Recorder, names: Any = NAMES) -> dict[str, list[float]]:
    """What rank 0 logged, on all ranks; NaN where a step had none."""
    rows = [row for row in recorder.rows if "lr" in row]
    return {name: [row.get(name, float("nan")) for row in rows] for name in names}


def trained(runtime: Runtime, **options: Any) -> dict[str, Any]:
    trainer, recorder = make(runtime, **options)
    result = trainer.train()
    trainer.close()
    out: dict[str, Any] = {**runtime.broadcast(curves(recorder)), "result": result}
    out["weights"] = [float(_whole(p).double().sum()) for p in trainer.parts.parameters()]
    out["loss_weights"] = [_whole(p).tolist() for p in trainer.loss_parameters.trained]
    return out


def _whole(p: Tensor) -> Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


class Notes(Callback):
    """Writes down what is called when, and counts steps as its state."""

    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name, self.steps = calls, name, 0

    def _note(self, moment: str, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} {moment} {trainer.step}")

    def on_train_start(self, trainer: Trainer) -> None:
        self._note("on_train_start", trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        self.steps += 1
        self._note("on_step_end", trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        self._note("on_validation_end", trainer)

    def on_save(self, trainer: Trainer) -> None:
        self._note("on_save", trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._note("on_train_end", trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


def held_out(rows: int = 10, *, bad: Any = (), drop: Any = (), **options: Any) -> Any:
    """Validates on the last of 60 rows, in their order, one at a time; without those to `drop`."""
    data = Rows(60, bad=bad, lacking=[*range(60 - rows), *drop])
    loader = partial(Loader, data, micro_batch_size=1, shuffle=False, epochs=1)
    return partial(Validator, loader, **{"eval_interval": 2, **options})


def processing(folder: Path) -> dict[str, Any]:
    """Every training on this many ranks, in FSDP2's and DDP's layout."""
    ranks = int(os.environ["WORLD_SIZE"])
    out: dict[str, Any] = {}
    for layout in ("fsdp", "ddp"):
        degrees = {"dp_replicate": -1, "dp_shard": 1} if layout == "ddp" else {}
        runtime = Runtime(seed=0, **degrees)
        run = partial(trained, runtime)
        for n in (1, 3):
            micro = 12 // ranks // n
            sgd = partial(torch.optim.SGD, lr=0.3)
            out[f"{layout}-composite-{n}"] = run(micro=micro, optimizer=sgd)
            out[f"{layout}-uncertain-{n}"] = run(
                micro=micro, loss_fn=uncertain(), max_grad_norm=0.5, validator=held_out()
            )
        out[f"{layout}-fused"] = run(
            micro=2,
            loss_fn=uncertain(),
            max_grad_norm=0.5,
            optimizer=partial(torch.optim.AdamW, lr=1e-2, fused=True),
        )
        saved = folder / f"{layout}-{ranks}"
        keep = partial(Checkpointer, str(saved), save_interval=3, keep_latest_k=None)
        whole = run(micro=2, loss_fn=uncertain(), checkpointer=keep)
        if runtime.rank == 0:
            shutil.rmtree(saved / "step-00000006")
        runtime.any(False)
        again = run(micro=2, loss_fn=uncertain(), checkpointer=keep)
        out[f"{layout}-resumed"] = [whole, again]
    runtime = Runtime(seed=0)
    out["sharded"] = trained(
        runtime, micro=2, loss_fn=uncertain(), max_grad_norm=0.5, parallelize_loss_fn=shard
    )
    calls: list[str] = []
    stop = {"first": Notes(calls, "a"), "none": None, "stop": EarlyStopping(patience=2)}
    stopped = trained(
        runtime,
        micro=2,
        max_steps=50,
        callbacks={**stop, "last": Notes(calls, "z")},
        # Nothing can improve: the rate is 0.
        optimizer=partial(torch.optim.SGD, lr=0.0),
        validator=held_out(),
    )
    gathered: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(gathered, (calls, stopped["result"]))
    out["callbacks"] = gathered
    sweep = folder / f"sweep-{runtime.world_size}"
    if runtime.rank == 0:  # which alone sees how others were
        (sweep / "rungs/00000004").mkdir(parents=True)
        (sweep / "multirun.yaml").touch()
        (sweep / "rungs/00000004/0.json").write_text('{"loss": 0.0}')
    asha = {"asha": ASHA(str(sweep / "1"), eta=2)}
    pruned = trained(runtime, micro=2, callbacks=asha, max_steps=6, validator=held_out())
    out["pruned"] = [None] * runtime.world_size
    torch.distributed.all_gather_object(out["pruned"], pruned["result"])
    return out


def rejecting(folder: Path) -> dict[str, Any]:
    """Two ranks, of which one rejects: windows of three micro-batches of two rows a rank."""
    runtime = Runtime(seed=0)
    out: dict[str, Any] = {}
    # Global micro-batches are four rows, the first two of them rank 0's. Of each window one is
    # refused: by rank 1, by rank 0, by both.
    bad, lacking = [2, 13, 33, 34], [*range(0, 4), *range(12, 16), *range(32, 36)]
    out["some"] = trained(runtime, micro=2, data=Rows(bad=bad), max_steps=3)
    out["without"] = trained(runtime, micro=2, rows=8, data=Rows(lacking=lacking), max_steps=3)
    # The second window is refused altogether, by this rank or the other.
    bad, lacking = [13, 18, 20], list(range(12, 24))
    out["window"] = trained(runtime, micro=2, data=Rows(bad=bad), max_steps=3)
    out["without window"] = trained(runtime, micro=2, data=Rows(lacking=lacking), max_steps=2)
    # Rank 1 has nothing to validate but what it refuses.
    odd = [53, 55, 57, 59]
    out["refused"] = trained(runtime, micro=2, max_steps=2, validator=held_out(8, bad=odd))
    out["lacking"] = trained(runtime, micro=2, max_steps=2, validator=held_out(8, drop=odd))
    results: list[Any] = [None, None]
    torch.distributed.all_gather_object(results, [out[name]["result"] for name in out])
    out["results"] = results
    return out


class Noisy(PreProcessor):
    """Makes input and target with random numbers of the global generator."""

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        drawn = torch.randint(VOCAB - 1, batch.shape)
        ctx["target"] = torch.where(ctx["target"] == -100, -100, drawn)
        return drawn, ctx


class Columns(PreProcessor):
    """The model gets the tokens alone."""

    def process(self, batch: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        ctx["forward_kwargs"].clear()
        return batch, ctx


class Sharper(PostProcessor):
    def process(self, output: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        return 3 * output, ctx


def piped(folder: Path, steps: int = 4) -> dict[str, Any]:
    """Processors and a loss with parameters on one rank, or on a pipeline of two stages."""
    pipeline = os.environ["WORLD_SIZE"] == "2"
    runtime = Runtime(seed=1, dp_shard=1, pp=2 if pipeline else 1)
    out: dict[str, Any] = {}

    def run(name: str, *preprocessors: PreProcessor, **options: Any) -> None:
        slots = {
            "model": Staged(),
            "loss_fn": UncertaintyWeightedLoss([(CrossEntropyCalculator(), 1.0)]),
            "preprocessors": [*preprocessors, Columns()],
            "postprocessors": [Sharper()],
            "pipeline_fn": partial(split, n_microbatches=4) if pipeline else None,
            "parallelize_fn": None,
            "max_grad_norm": 0.1,
            "max_steps": steps,
        }
        torch.manual_seed(1)
        trainer, recorder = make(runtime, micro=3, **{**slots, **options})
        trainer.train()
        trainer.close()
        names = ("loss", "grad_norm", "cross_entropy_calculator/ce")
        out[name] = curves(recorder, names)
        out[name]["loss_weights"] = [p.tolist() for p in trainer.loss_parameters.trained]

    run("plain")
    run("rejecting", Refuse(), data=Rows(bad=[4, 12, 15, 18, 21]), max_steps=3)
    if pipeline:
        run("noisy", Noisy(), optimizer=partial(torch.optim.AdamW, lr=5e-2), max_steps=40)
    return out
