"""Router losses under FSDP2, with any micro-batches: losses and parameters of one rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss, RoutedLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from tests.checkpoint import ranks
from tests.distributed.cases import VOCAB, Recorder, make_trainer
from tests.models.families import CAUSAL, config
from tests.parallelize import staged

STEPS = 10
VARIANTS = {
    "one micro-batch": {},
    "four micro-batches": {"accumulation": 4},
    "chunked": {"accumulation": 2, "chunked": True},
    "recomputed": {"parallelize_fn": partial(shard, activation_checkpointing=full)},
    "experts split": {"parallelize_fn": parallelize, "ep": True},
}


def model(**changes):
    kind, size = "qwen3_moe", {"vocab_size": VOCAB, "hidden_size": 64}
    return from_config(config(kind, CAUSAL[kind] | size | changes))


def trained(chunked=False, ep=False, **options):
    """Reports of each step, and the whole parameters afterwards."""
    if ep and dist.get_world_size() > 1:
        options["runtime"] = Runtime(seed=3, ep=2)
    inner = (
        LinearCrossEntropyLoss(chunk_tokens=50) if chunked else CrossEntropyLoss(output="logits")
    )
    loss_fn = RoutedLoss(inner, balance=0.1, z=0.01, information=0.01, per_expert=True)
    trainer, recorder = make_trainer(
        None, max_steps=STEPS, model=model(), loss_fn=loss_fn, optimizer_name="SGD", **options
    )
    trainer.train()
    reports = [
        {k: v for k, v in row.items() if k in ("loss", "grad_norm") or "router" in k}
        for row in trainer.runtime.broadcast(recorder.rows)
    ]
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy().copy()
        for name, p in trainer.model_parts[0].named_parameters()
    }
    trainer.close()
    return reports, {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in whole.items()}


def all_variants(names):
    return {name: trained(**VARIANTS[name]) for name in names}


def in_stages(schedules):
    """Losses and metrics of rows of many lengths, validations among them."""
    found = {}
    for schedule in schedules:
        recorder = Recorder()
        loss_fn = RoutedLoss(
            CrossEntropyLoss(output="logits"), balance=0.1, z=0.01, per_expert=True
        )
        slots = staged.slots_of(schedule) | {
            "model": model(num_hidden_layers=4, mlp_only_layers=[0]),
            "loss_fn": loss_fn,
            "logger": MetricsProcessor(loggers=[recorder], log_interval=1),
            "runtime": Runtime(seed=3, pp=2 if schedule else 1),
        }
        trainer = Trainer(**slots)
        trainer.train()
        rows = trainer.runtime.broadcast(recorder.rows)
        found[schedule] = [{k: v for k, v in row.items() if _compared(k)} for row in rows]
        trainer.close()
    return found


def _compared(name):
    return "loss" in name or "grad_norm" in name or "router" in name


SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")


@pytest.mark.slow
def test_each_pipeline_stage_has_the_part_of_its_layers():
    ((expected,),) = (one.values() for one in ranks.run(in_stages, 1, [None]))
    assert len(expected) > 4 and "validation/router/balance" in expected[2]
    for schedules in ranks.run(in_stages, 2, list(SCHEDULES)):
        for schedule, rows in schedules.items():
            assert len(rows) == len(expected)
            for row, alone in zip(rows, expected, strict=True):
                assert row == pytest.approx(alone, abs=1e-5, rel=1e-5), schedule


@pytest.mark.slow
def test_two_ranks_and_any_micro_batches_train_as_one_rank_does():
    ((one),) = ranks.run(all_variants, 1, list(VARIANTS))
    two, _ = ranks.run(all_variants, 2, list(VARIANTS))
    expected, parameters = one["one micro-batch"]
    assert len(expected) == STEPS and expected[0]["loss"] - expected[-1]["loss"] > 0.1
    assert {"router/balance", "router/z", "router/load_max", "router/load/1/3"} < expected[0].keys()
    for name in VARIANTS:
        for reports, whole in (one[name], two[name]):
            for step, report in zip(expected, reports, strict=True):
                assert report == pytest.approx(step, abs=1e-5, rel=1e-5), name
            for key, value in parameters.items():
                torch.testing.assert_close(
                    torch.from_numpy(whole[key]), torch.from_numpy(value), rtol=0, atol=1e-5
                )
