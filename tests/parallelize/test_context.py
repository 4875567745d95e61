"""Sequences that are split over ranks: parts of batches, losses without training, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from ditty_di.batch import Batch, Context
from ditty_di.data.loader import Loader
from ditty_di.data.sampling.mixture import Mixture
from ditty_di.loggers.processor import MetricsProcessor
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from ditty_di.models.causal_lm import from_config
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.context import SequenceSplit
from ditty_di.parallelize.fits import Degrees, Parts, fits
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.checkpoint import ranks
from tests.distributed.cases import Recorder

SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


# -- parts of batches -----------------------------------------------------------------------------


def parts_of_a_batch() -> dict[str, Any]:
    """What a rank of two gets of a packed row of 7 tokens and of one document."""
    split = SequenceSplit(Runtime(cp=2).parallel_dims.get_mesh("cp"))
    ids, weights = torch.arange(7)[None], torch.linspace(0, 1, 7)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    context = Context(weights=weights, source=torch.tensor([5]), step=3)
    batch = Batch({"input": ids, "position_ids": positions, "use_cache": False}, ids + 10, context)
    packed, plain = split.cut(batch, ignore_index=-7), split.cut(Batch({"input": ids}, None))
    refused = {}
    for name, value in {"attention_mask": torch.ones(1, 7), "pixels": torch.ones(1, 3, 2)}.items():
        try:
            split.cut(Batch({"input": ids, name: value}, ids))
        except ValueError as error:
            refused[name] = str(error)
    own = plain.inputs["input"].float().requires_grad_()
    whole = split.whole(own)
    (whole * torch.arange(8)).sum().backward()
    return {
        "packed": (packed.inputs, packed.labels, dict(packed.context)),
        "plain": (plain.inputs, plain.labels),
        "whole": (whole.detach(), own.grad, split.join({"a": own.detach(), "b": 1}, 7)),
        "refused": refused,
    }


@pytest.fixture(scope="module")
def parts() -> list[dict[str, Any]]:
    return ranks.run(parts_of_a_batch, 2)


def test_a_rank_gets_two_chunks_of_everything_that_is_a_tokens(parts):
    for rank, own in enumerate([[0, 1, 6, 7], [2, 3, 4, 5]]):
        inputs, labels, context = parts[rank]["packed"]
        padded = [*range(7), 0]
        assert inputs["input"].tolist() == [[padded[i] for i in own]]
        assert inputs["position_ids"].tolist() == [[[0, 1, 2, 0, 1, 2, 3, 0][i] for i in own]]
        assert labels.tolist() == [[[*range(10, 17), -7][i] for i in own]]
        starts = [0, 0, 0, 3, 3, 3, 3, 7]  # of the document of each token
        assert inputs["attention_mask"].flatten().tolist() == [starts[i] for i in own]
        assert inputs["use_cache"] is False and context["step"] == 3
        assert context["source"].tolist() == [5] and context["weights"].shape == (1, 4)


def test_a_row_of_one_document_gets_positions_and_no_mask(parts):
    for rank, own in enumerate([[0, 1, 6, 0], [2, 3, 4, 5]]):
        inputs, labels = parts[rank]["plain"]
        assert inputs["position_ids"].tolist() == [own]
        assert "attention_mask" not in inputs and labels is None


def test_parts_join_to_whole_sequences_and_gradients_add_up(parts):
    for rank, own in enumerate([[0, 1, 6, 7], [2, 3, 4, 5]]):
        whole, gradient, joined = parts[rank]["whole"]
        assert whole.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]
        assert gradient.tolist() == [[2.0 * i for i in own]]
        assert joined["a"].tolist() == [list(range(7))] and joined["b"] == 1


def test_inputs_that_are_not_split_are_refused(parts):
    refused = parts[0]["refused"]
    assert "the batch has an attention_mask" in refused["attention_mask"]
    assert "pixels has shape [1, 3, 2]" in refused["pixels"]


# -- without a backward pass ----------------------------------------------------------------------


LOSSES = {
    "whole": partial(CrossEntropyLoss, output="logits"),
    "chunked": partial(LinearCrossEntropyLoss, chunk_tokens=5),
}


class Rows(torch.utils.data.Dataset):
    """Rows of 13 tokens in two documents, with masked labels."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        ids = torch.arange(13) * (i + self.step) % 64
        positions = torch.cat((torch.arange(4 + i % 3), torch.arange(9 - i % 3)))
        return {"input": ids, "position_ids": positions}, ((ids + 1) % 64).where(ids > 5, -100)


def validated(loss: str, **degrees: int) -> tuple[dict[str, float], torch.Tensor]:
    """What a step and a validation report of two sources, and the logits of two rows."""
    model = from_config(T.Qwen3Config(**SMALL, head_dim=8))
    sources = Mixture({"web": Rows(3), "code": Rows(7)}, {"web": 3, "code": 1})
    recorder = Recorder()
    trainer = Trainer(
        runtime=Runtime(**degrees),
        model=model,
        weights=partial(initialize, seed=3, init=hugging_face),
        loss_fn=LOSSES[loss](),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        dataloader=partial(Loader, sources, micro_batch_size=4, seed=0),
        validator=partial(
            Validator, partial(Loader, sources, micro_batch_size=3, epochs=1), eval_interval=1
        ),
        logger=MetricsProcessor([recorder], log_interval=1),
        parallelize_fn=parallelize,
        max_steps=1,
    )
    trainer.train()
    with torch.no_grad():
        logits = trainer.forward({"input": torch.arange(10).reshape(2, 5)}).logits
    return {k: v for row in recorder.rows for k, v in row.items() if "/" in k}, logits


def all_validated(cases: list[tuple[str, dict[str, int]]]) -> list[Any]:
    return [validated(loss, **degrees) for loss, degrees in cases]


def test_sources_validation_and_whole_outputs_are_those_of_one_rank():
    (of_one,) = ranks.run(all_validated, 1, [(name, {}) for name in LOSSES])
    alone = dict(zip(LOSSES, of_one, strict=True))
    assert {"loss/web", "validation/loss/web", "validation/loss/code"} <= alone["chunked"][0].keys()
    cases = [(name, {degree: 2}) for name in LOSSES for degree in ("cp", "tp")]
    for rank, of_rank in enumerate(ranks.run(all_validated, 2, cases)):
        for (loss, degrees), (reported, logits) in zip(cases, of_rank, strict=True):
            values, whole = alone[loss]
            if rank == 0:  # it alone logs
                assert reported == pytest.approx(values, abs=1e-6), (loss, degrees)
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


# -- refusals -------------------------------------------------------------------------------------


def model_of(kind: str, **changes: Any) -> nn.Module:
    return from_config(getattr(T, f"{kind}Config")(**{**SMALL, **changes}))


LONG = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "build, refusal",
    [
        (partial(model_of, "Mamba"), "position_ids"),
        (partial(model_of, "Lfm2", layer_types=["full_attention", "conv"]), "layer 1 of Lfm2For"),
        (partial(model_of, "Gemma2", head_dim=8), "has attn_logit_softcapping"),
        (partial(model_of, "GptOss", head_dim=8, **MOE), "has sinks"),
        (partial(model_of, "Llama", rope_parameters=LONG), "rope_type dynamic"),
        (partial(nn.Linear, 2, 2), "Linear is not a model of transformers"),
    ],
)
def test_a_model_that_cannot_work_on_parts_is_refused(build, refusal):
    (first, *_) = fits(Parts(build(), parallelize_fn=parallelize), Degrees(cp=2))
    assert first.startswith("runtime.cp=2: ") and refusal in first
    assert first.endswith("or runtime.cp=1")


def test_losses_that_need_whole_rows_are_refused():
    model = model_of("Llama")

    def found(loss: Any) -> list[str]:
        return fits(Parts(model, loss, parallelize), Degrees(cp=2))

    assert found(CrossEntropyLoss(output="logits")) == found(LinearCrossEntropyLoss()) == []
    assert "write loss.shift=false" in found(CrossEntropyLoss(output="logits", shift=True))[0]
    assert "Linear is not known to be a sum over tokens" in found(nn.Linear(2, 2))[0]


def test_other_attention_functions_are_not_replaced():
    flex = from_config(T.LlamaConfig(**SMALL), attn_implementation="flex_attention")
    (problem,) = fits(Parts(flex, None, parallelize), Degrees(cp=2))
    assert "flex_attention does not gather" in problem


@pytest.mark.parametrize(
    "ranks_of_experts, changes, refusal",
    [
        (3, {}, "runtime.ep=3: 4 experts; ep fits 1, 2, 4"),
        (2, None, "LlamaForCausalLM has no expert-parallel plan"),
    ],
)
def test_experts_that_cannot_be_split_are_refused(ranks_of_experts, changes, refusal):
    model = model_of("Llama") if changes is None else model_of("Mixtral", **MOE)
    (problem,) = fits(Parts(model, None, parallelize), Degrees(ep=ranks_of_experts))
    assert refusal in problem


def test_adapters_on_experts_are_refused():
    from peft import LoraConfig

    from ditty_di.adapters import apply_adapter

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    on_experts = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    model = apply_adapter(model_of("Mixtral", **MOE), config=on_experts)
    (problem,) = fits(Parts(model, None, parallelize), Degrees(ep=2))
    assert "experts with adapters" in problem
    beside = LoraConfig(r=2, target_modules=["q_proj"])
    model = apply_adapter(model_of("Mixtral", **MOE), config=beside)
    assert fits(Parts(model, None, parallelize), Degrees(ep=2)) == []


def test_more_expert_ranks_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"runtime\.ep=2 does not divide the 1 ranks .* ep fits 1"):
        Runtime(ep=2)
