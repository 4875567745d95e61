"""NEFTune under FSDP2: ranks have different noise, and a resumed run the same as before."""

from __future__ import annotations

import pytest
import torch

from ditty_di.losses import LinearCrossEntropyLoss, skip_lm_head
from ditty_di.models.neftune import neftune
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.distributed.cases import RESUME_AT, make_trainer, tiny_llama


def noise_of_a_rank() -> torch.Tensor:
    runtime = Runtime(seed=0)
    model = shard(
        neftune(tiny_llama()), parallel_dims=runtime.parallel_dims, activation_checkpointing=full
    )
    materialize(model, runtime.device)
    initialize(model, device=runtime.device, init=hugging_face)
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    ids = torch.arange(60).reshape(1, 60)
    state = torch.get_rng_state()
    for training in (True, False, True):
        model.train(training)
        torch.set_rng_state(state)
        model(ids)
    assert torch.equal(seen[0], seen[2]), "the same state gives the same noise"
    return (seen[0] - seen[1]).numpy()


def test_ranks_with_one_seed_have_different_noise():
    first, second = (torch.from_numpy(v).flatten() for v in ranks.run(noise_of_a_rank, 2))
    assert float(first.std()) == pytest.approx(float(second.std()), rel=0.05)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert correlation.abs() < 5 / len(first) ** 0.5


def train(folder, steps):
    trainer, recorder = make_trainer(
        folder,
        max_steps=steps,
        model=skip_lm_head(neftune(tiny_llama())),
        loss_fn=LinearCrossEntropyLoss(chunk_tokens=50),
    )
    trainer.train()
    trainer.close()
    return recorder.losses()


def resume(folder):
    whole = train(folder / "whole", 11)
    train(folder / "parts", RESUME_AT)
    return whole, train(folder / "parts", 11)


@pytest.mark.slow
def test_a_resumed_run_has_the_noise_it_would_have_had(tmp_path):
    for whole, resumed in ranks.run(resume, 2, tmp_path, timeout=300):
        assert resumed == whole[RESUME_AT:]
