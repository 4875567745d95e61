"""What the ranks of `test_stages` do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ditty_di.callbacks import Callback
from ditty_di.data.collate import PaddedCollate, PaddingFreeCollate
from ditty_di.data.loader import Loader
from ditty_di.export.gather import whole_models
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.stages import split
from ditty_di.runtime import Runtime
from ditty_di.tasks.evaluate import evaluate
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Recorder


def llama(**changes: Any) -> Any:
    """Two layers and an untied head, unless changed."""
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    transforms = {"adapter": changes.pop("adapter", None)}
    return from_config(LlamaConfig(**{**size, **heads, **none, **changes}), **transforms)


class Lengths(torch.utils.data.Dataset):
    """Rows of 3 to 20 tokens, of two sources."""

    source_names = ("even", "odd")

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 21, (rows,), generator=generator)
        self.rows = [torch.randint(64, (n + 1,), generator=generator) for n in lengths.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return {"input": self.rows[i][:-1], "source": torch.tensor(i % 2)}, self.rows[i][1:]


class Watch(Callback):
    """Does nothing."""


class Sample(Callback):
    needs_forward = True


def slots_of(schedule: str | None) -> dict[str, Any]:
    """Two rows in a micro-batch and eight in a step, on one rank or two stages."""
    loader = partial(Loader, micro_batch_size=2, collate_fn=PaddedCollate())
    return {
        "model": llama(num_hidden_layers=4),
        "loss_fn": CrossEntropyLoss(output="logits"),
        "optimizer": partial(torch.optim.AdamW, lr=3e-3),
        "weights": partial(initialize, seed=3, init=hugging_face),
        "dataloader": partial(loader, Lengths(21, 0), seed=1, epochs=1),
        "validator": partial(Validator, partial(loader, Lengths(9, 1), epochs=1), eval_interval=2),
        "parallelize_fn": parallelize,
        "pipeline_fn": partial(split, schedule=schedule) if schedule else None,
        "callbacks": {"watch": Watch(), "sample": Sample()},
        "global_batch_size": 8,
        "max_steps": 10,
    }


def trainer(schedule: str | None, **slots: Any) -> tuple[Trainer, Recorder]:
    runtime, recorder = Runtime(seed=1, pp=2 if schedule else 1), Recorder()
    logger = MetricsProcessor([recorder], log_interval=1)
    return Trainer(runtime=runtime, logger=logger, **{**slots_of(schedule), **slots}), recorder


def ragged(folder: Path, *schedules: str | None) -> dict[str | None, dict[str, Any]]:
    return {schedule: _ragged(folder, schedule) for schedule in schedules}


def _ragged(folder: Path, schedule: str | None) -> dict[str, Any]:
    made, recorder = trainer(schedule)
    made.train()
    rows = made.runtime.broadcast(recorder.rows)
    found: dict[str, Any] = {
        **{
            name: [row[name] for row in rows if name in row]
            for name in ("loss", "loss/even", "loss/odd")
        },
        "validation": [
            [row[f"validation/loss{of}"] for of in ("", "/even", "/odd")]
            for row in rows
            if "validation/loss" in row
        ],
        "evaluated": _evaluated(schedule),
        "callbacks": list(made.callbacks.named),
        "exported": None,
    }
    for (model,) in whole_models(made.parts):
        state = model.state_dict()
        if schedule is None:
            torch.save(state, folder / "alone.pt")
            continue
        alone = torch.load(folder / "alone.pt")
        assert state.keys() == alone.keys()
        found["exported"] = max(float((state[n] - alone[n]).abs().max()) for n in alone)
    if schedule in (None, "1F1B"):
        found["bf16"] = _in_bfloat16(schedule)
    if schedule:
        found["forward"] = _error(lambda: made.forward({"input": torch.zeros(1, 4).long()}))
    made.close()
    return found


def _in_bfloat16(schedule: str | None) -> list[float]:
    dtypes = {"param_dtype": "bfloat16", "reduce_dtype": "float32"}
    made, recorder = trainer(schedule, parallelize_fn=partial(parallelize, **dtypes))
    made.train()
    rows = made.runtime.broadcast(recorder.rows)
    made.close()
    return [row["loss"] for row in rows if "loss" in row]


def _evaluated(schedule: str | None) -> dict[str, Any]:
    """What `task=evaluate` returns for the model at the start."""
    slots = slots_of(schedule)
    names = ("model", "loss_fn", "validator", "weights", "parallelize_fn", "pipeline_fn")
    return evaluate(
        **{name: slots[name] for name in names}, runtime=Runtime(seed=1, pp=2 if schedule else 1)
    )


# -- micro-batches --------------------------------------------------------------------------------


def unfit_batches() -> dict[str, str]:
    collate = PaddingFreeCollate()
    rows = partial(Loader, Lengths(40, 0), micro_batch_size=2, seed=1)
    known = partial(rows, collate_fn=collate)
    found = {
        "rounds": _error(lambda: trainer("Interleaved1F1B", global_batch_size=10)),
        "padding": _error(lambda: trainer("1F1B", dataloader=known, validator=None)),
    }
    # A function of one's own does not tell what it makes.
    own = partial(rows, collate_fn=lambda batch: collate(batch))
    made, _ = trainer("1F1B", dataloader=own, validator=None)
    found["step"] = _error(made.train)
    return found


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"
