"""Pipeline stages take rows of any length, validate and export; what does not fit is said before.

That they train like one rank is in `test_matrix`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from peft import LoraConfig

from ditty_di.adapters import apply_adapter
from ditty_di.models.titan import llama3
from ditty_di.parallelize.activation_checkpointing import full, selective
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.fits import Degrees, Parts, fits
from ditty_di.parallelize.stages import split, validate
from ditty_di.parallelize.titan import pipeline_llama
from tests.checkpoint.ranks import run
from tests.parallelize import staged

SCHEDULES = ("1F1B", "ZBVZeroBubble")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Rows of many lengths, an epoch that ends within a step, validation, and an export."""
    folder = tmp_path_factory.mktemp("ragged")
    (alone,) = run(staged.ragged, 1, folder, None)
    first, last = run(staged.ragged, 2, folder, *SCHEDULES)
    return {schedule: (alone[None], (first[schedule], last[schedule])) for schedule in SCHEDULES}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_of_any_length_are_trained_on_and_validated(ragged, schedule):
    alone, (first, last) = ragged[schedule]
    assert len(alone["loss"]) == 3  # two whole steps and the rest of the epoch
    for name in ("loss", "loss/even", "loss/odd"):
        assert first[name] == pytest.approx(alone[name], abs=1e-5)
    assert len(alone["validation"][0]) == 3 and np.allclose(
        first["validation"], alone["validation"], rtol=0, atol=1e-5
    )
    assert last["validation"] == first["validation"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_evaluation_alone_has_the_numbers_of_one_rank(ragged, schedule):
    alone, ranks = ragged[schedule]
    for rank in ranks:
        assert rank["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-5)
    assert {"loss", "loss/even", "loss/odd"} <= alone["evaluated"].keys()


def test_bfloat16_rounds_no_more_than_on_one_rank(ragged):
    alone, (first, _) = ragged["1F1B"]
    assert alone["bf16"] != alone["loss"]
    assert first["bf16"] == pytest.approx(alone["bf16"], abs=5e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_export_of_all_stages_is_that_of_one_rank(ragged, schedule):
    _, (first, last) = ragged[schedule]
    assert first["exported"] < 1e-5
    assert last["exported"] is None, "only the first rank writes"


def test_a_callback_that_needs_the_output_is_left_out_and_forward_says_why(ragged):
    _, (first, _) = ragged["1F1B"]
    assert first["callbacks"] == ["watch"]
    assert "no rank has its output" in first["forward"]


# -- refusals -------------------------------------------------------------------------------------


def why(*, degrees=None, sharing=None, changes=None, **options):
    model = staged.llama(**changes or {})
    parts = Parts(model, None, partial(parallelize, **sharing or {}), partial(split, **options))
    return fits(parts, Degrees(**{"pp": 2, **(degrees or {})}))


def adapted(**options):
    return partial(apply_adapter, config=LoraConfig(**options))


ZERO = {"schedule": "InterleavedZeroBubble", "changes": {"num_hidden_layers": 4}}
UNFIT = {
    "runtime.pp=3: 2 layers do not fill 3 stages; pp fits 1, 2": {"degrees": {"pp": 3}},
    "runtime.pp=2: 2 layers do not fill 4 stages (2 a rank); pp fits 1": {
        "schedule": "Interleaved1F1B"
    },
    "pipeline.layers=[1, 2] has 3 layers in 2 stages, and the model 2": {"layers": [1, 2]},
    "it fits runtime.dp_shard=1, and not 2": {**ZERO, "degrees": {"dp_shard": 2}},
    "it fits runtime.dp_replicate=1, and not 2": {**ZERO, "degrees": {"dp_replicate": 2}},
    "it fits runtime.tp=1, and not 2": {**ZERO, "degrees": {"tp": 2}},
    "precision=fp32 and parallelize.cpu_offload=false": {
        **ZERO,
        "sharing": {"param_dtype": "bfloat16"},
    },
    "stages are not split along the sequence; write runtime.cp=1": {"degrees": {"cp": 2}},
    "compile=null": {**ZERO, "sharing": {"compile": {}}},
    "selective checkpointing allows one backward pass": {
        **ZERO,
        "sharing": {"activation_checkpointing": partial(selective, preserve_rng_state=False)},
    },
    "model.embed_tokens is tied to the head, and with schedule=ZBVZeroBubble": {
        "schedule": "ZBVZeroBubble",
        "changes": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    },
    "embed_tokens is tied to the head and has lora_embedding_A.default": {
        "changes": {
            "tie_word_embeddings": True,
            "adapter": adapted(target_modules=["embed_tokens", "q_proj"]),
        },
    },
    "nothing is trained in the layers [1] of pipeline rank 1": {
        "changes": {"adapter": adapted(target_modules=["q_proj"], layers_to_transform=[0])},
    },
}


@pytest.mark.parametrize("sentence", UNFIT)
def test_what_does_not_fit_is_one_sentence_that_says_what_would(sentence):
    (found,) = why(**UNFIT[sentence])
    assert sentence in found


def test_what_fits_has_no_sentence():
    assert why() == why(degrees={"pp": 1, "tp": 2}) == []
    assert why(**ZERO) == why(**ZERO, sharing={"activation_checkpointing": full}) == []


def test_torchtitans_model_and_others_need_their_own_function():
    titan, other = (
        llama3(dim=32, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=64),
        staged.llama(),
    )
    slots = {"stages": partial(split), "titan": partial(pipeline_llama)}
    own = Parts(titan, None, None, slots["titan"])
    assert fits(own, Degrees(pp=2)) == []
    assert "2 layers do not fill 5 stages; pp fits 1, 2, 3, 4" in fits(own, Degrees(pp=5))[0]
    (found,) = fits(Parts(titan, None, None, slots["stages"]), Degrees(pp=2))
    assert "pipeline=titan" in found
    (found,) = fits(Parts(other, None, None, slots["titan"]), Degrees(pp=2))
    assert "write pipeline=stages" in found


@pytest.mark.parametrize(
    "options, words",
    [
        ({"schedule": "DualPipeV"}, "schedule=DualPipeV: write one of 1F1B, GPipe"),
        ({"stages_per_rank": 2}, "1F1B has 1 on each rank"),
        ({"schedule": "ZBVZeroBubble", "stages_per_rank": 3}, "has 2 on each rank"),
        ({"layers": [2, 0]}, "each stage needs at least 1"),
    ],
)
def test_arguments_that_no_model_fits(options, words):
    with pytest.raises(ValueError, match=words):
        validate(**options)
    validate(schedule="Interleaved1F1B", stages_per_rank=3, layers=[1] * 6)


def test_micro_batches_that_do_not_divide_and_rows_that_cannot_be_padded():
    refused = run(staged.unfit_batches, 2)[0]
    assert "has 5 micro-batches, which do not divide into rounds of 2 ranks" in refused["rounds"]
    assert "1, 2, 3, 4, 6, 8, ... do" in refused["rounds"]
    assert "rows without padding are as long as their documents" in refused["padding"]
    assert "the input 'cu_seq_lens_q' cannot be padded" in refused["step"]
    assert "batching=packed" in refused["step"]
