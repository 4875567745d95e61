"""What the ranks of a distributed test do: `python -m tests.distributed.cases CASE RESULT JSON`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ditty_di.checkpoint import Checkpointer
from ditty_di.data.loader import Loader
from ditty_di.data.tokens import TokenDataset
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.optim.schedules import cosine
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from tests.models import tiny

STEPS, RESUME_AT, VOCAB, ROWS = 20, 8, 64, 16


class Recorder:
    """A metrics writer that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.texts: list[tuple[int, str, str]] = []

    def start(self, **ignored: Any) -> None: ...

    def write(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        self.texts.append((step, name, text))

    def close(self) -> None: ...

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]


def tokens() -> np.ndarray:
    """A learnable stream with ragged masks (label 0 is rare)."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, size=6000)
    return (np.cumsum(steps) % VOCAB).astype(np.uint16)


class Ragged(torch.utils.data.Dataset):
    """Token rows of which a row-dependent share of the labels is masked."""

    def __init__(self, seq_len: int = 32) -> None:
        self.rows = TokenDataset(tokens(), seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        inputs, labels = self.rows[i]
        labels = labels.clone()
        labels[: i % 29] = -100
        return inputs, labels


def tiny_llama(dropout: float = 0.0, tie: bool = True) -> nn.Module:

    return from_config(
        tiny.llama(
            vocab_size=VOCAB,
            # Every matrix is 8-bit in AdamW8bit (4096 elements) also as one of two shards.
            hidden_size=128,
            intermediate_size=96,
            max_position_embeddings=64,
            tie_word_embeddings=tie,
            attention_dropout=dropout,
        )
    )


def optimizer(name: str) -> Any:
    if name == "AdamW8bit":
        from torchao.optim import AdamW8bit

        return partial(AdamW8bit, lr=1e-2)
    extra = {"momentum": 0.9} if name == "SGD" else {}
    return partial(getattr(torch.optim, name), lr=1e-2, **extra)


def make_trainer(
    folder: Path | None,
    *,
    layout: str = "fsdp",
    accumulation: int = 1,
    optimizer_name: str = "AdamW",
    dropout: float = 0.0,
    max_steps: int = STEPS,
    async_save: bool = False,
    rows: int = ROWS,
    runtime: Runtime | None = None,
    **slots: Any,
) -> tuple[Trainer, Recorder]:
    degrees = {"fsdp": {}, "ddp": {"dp_replicate": -1, "dp_shard": 1}}[layout]
    runtime = runtime or Runtime(seed=3, **degrees)
    recorder = Recorder()
    checkpointer = None
    if folder is not None:
        checkpointer = partial(
            Checkpointer,
            str(folder / "checkpoints"),
            save_interval=RESUME_AT,
            keep_latest_k=None,
            async_save=async_save,
        )
    options = {
        "model": tiny_llama(dropout),
        "loss_fn": CrossEntropyLoss(output="logits"),
        "optimizer": optimizer(optimizer_name),
        "lr_scheduler": partial(cosine, max_steps=STEPS, warmup_steps=3),
        "dataloader": partial(
            Loader, Ragged(), micro_batch_size=rows // accumulation // runtime.dp_world_size, seed=3
        ),
        "weights": partial(initialize, seed=3, init=hugging_face),
        "parallelize_fn": shard,
        "checkpointer": checkpointer,
    }
    trainer = Trainer(
        runtime=runtime,
        max_steps=max_steps,
        global_batch_size=rows,
        logger=MetricsProcessor(loggers=[recorder], log_interval=1),
        **{**options, **slots},
    )
    return trainer, recorder


def train(folder: Path | None, *, stance: str = "force_eager", **options: Any) -> list[float]:
    """Losses, and a digest of all parameters; torchao's step is slow to compile."""
    trainer, recorder = make_trainer(folder, **options)
    with torch.compiler.set_stance(stance):
        trainer.train()
    trainer.close()
    losses = trainer.runtime.broadcast(recorder.losses())
    digest = sum(float(_whole(p).double().abs().sum()) for p in trainer.model_parts[0].parameters())
    return [*losses, digest]


def _whole(p: torch.Tensor) -> torch.Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


VARIANTS = {
    "adamw": {},
    "adamw-accumulated": {"accumulation": 4},
    "adamw-dropout-async": {"dropout": 0.2, "async_save": True},
    "sgd": {"optimizer_name": "SGD"},
    "sgd-accumulated": {"optimizer_name": "SGD", "accumulation": 4},
    "adamw8bit": {"optimizer_name": "AdamW8bit"},
    "adamw8bit-accumulated": {"optimizer_name": "AdamW8bit", "accumulation": 4},
}


def whole_runs(folder: Path, layouts: list[str]) -> dict[str, list[float]]:
    """Every variant from the start to the end, checkpoints kept in `folder`."""
    out = {}
    for layout in layouts:
        for name, options in VARIANTS.items():
            key = f"{layout}-{name}"
            out[key] = train(folder / key, layout=layout, **options)
    return out


def resumed_runs(folder: Path, source: str, layout: str) -> dict[str, list[float]]:
    """Every variant from a copy of `source`'s checkpoint of step RESUME_AT to the end."""
    out = {}
    for name, options in VARIANTS.items():
        start = Path(source) / f"{layout}-{name}" / "checkpoints" / f"step-{RESUME_AT:08d}"
        here = folder / f"resumed-{os.environ['WORLD_SIZE']}-{Path(source).name}-{name}"
        runtime = Runtime(seed=3)
        if runtime.rank == 0:
            shutil.copytree(start, here / "checkpoints" / start.name)
        runtime.any(False)  # a barrier: the copy is there
        out[name] = train(here, layout=layout, **options)
    return out


class Lookup(nn.Module):
    """A language model whose two matrices have one shape, which is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 128)
        self.head = nn.Linear(128, VOCAB, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input))


def compiled_runs(folder: Path) -> dict[str, list[float]]:
    """Steps of AdamW8bit as torchao compiles them and not, by the stance of the compiler."""
    found = {}
    for stance in ("default", "force_eager"):
        torch.manual_seed(0)
        slots = {"model": Lookup(), "loss_fn": CrossEntropyLoss(), "weights": None}
        found[stance] = train(None, stance=stance, optimizer_name="AdamW8bit", max_steps=4, **slots)
    return found


def cases() -> dict[str, Callable[..., Any]]:
    from tests.distributed.agreement import agreement
    from tests.distributed.measuring import measured
    from tests.distributed.pipelined import pipelined
    from tests.distributed.processing import piped, processing, rejecting
    from tests.planning.cases import peaks, planned

    found = (
        whole_runs,
        resumed_runs,
        compiled_runs,
        agreement,
        pipelined,
        processing,
        rejecting,
        piped,
    )
    found += (planned, peaks, measured)
    return {case.__name__: case for case in found}


def main() -> None:
    case, result, payload = sys.argv[1:]
    arguments = json.loads(payload)
    arguments["folder"] = Path(arguments["folder"])
    value = cases()[case](**arguments)
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(value))
    sys.stdout.flush()
    os._exit(0)  # as ditty_di.launch.worker does: gloo's threads may outlive the interpreter


if __name__ == "__main__":
    main()
