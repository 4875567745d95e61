"""bfloat16 and float16 compute in 16 bits, keep float32 where it matters, and train the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.checkpoint.ranks import run
from tests.precision import cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def losses():
    """Losses of every precision, by number of ranks."""
    return {ranks: run(cases.precisions, ranks, timeout=400)[0] for ranks in (1, 2)}


@pytest.fixture(scope="module")
def facts():
    return run(cases.facts, 2, timeout=300)


#: (variant, the exact one, how far its losses may be)
CLOSE = [
    ("bf16", "fp32", 0.02),
    ("pure_bf16", "fp32", 0.02),
    ("fp16", "fp32", 0.01),
    ("fp8", "bf16", 0.1),
    ("fp8_rowwise", "bf16", 0.1),
    ("lora_bf16", "lora", 0.02),
    ("lora_fp8", "lora_bf16", 0.1),
    ("nf4_bf16", "nf4", 0.02),
    ("int8_bf16", "int8", 0.02),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("variant", "exact", "tolerance"), CLOSE)
def test_losses_are_close_to_the_exact_ones(losses, ranks, variant, exact, tolerance):
    got, expected = losses[ranks][variant], losses[ranks][exact]
    assert len(got) == cases.STEPS and got != expected, "it must compute something else"
    assert got == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("variant", ["fp32", "lora", "nf4", "int8"])
def test_two_ranks_give_the_losses_of_one(losses, variant):
    assert losses[2][variant] == pytest.approx(losses[1][variant], abs=1e-5)


@pytest.mark.parametrize("variant", [variant for variant, _, _ in CLOSE])
def test_two_ranks_are_close_to_one(losses, variant):
    assert losses[2][variant] == pytest.approx(losses[1][variant], abs=0.05)


@pytest.mark.parametrize(("quantize", "packed"), [("nf4", "torch.uint8"), ("int8", "torch.int8")])
def test_a_quantised_block_computes_in_bfloat16_and_keeps_what_it_has(facts, quantize, packed):
    found = facts[0]["gathered"][quantize]
    seen, kept = found["seen"], found["kept"]
    assert {seen[n] for n in seen if n.endswith("qweight")} == {packed}, "bytes are no numbers"
    adapters = [name for name in kept if "lora_" in name]
    assert {kept[name] for name in adapters} == {"torch.float32"}
    assert {seen[name] for name in adapters} == {"torch.bfloat16"} == {seen["output"]}
    assert set(found["rotary"]) == {"torch.float32"}


def test_gradients_are_unscaled_before_they_are_clipped(facts):
    for rank in facts:
        assert rank["fp16_norm"] == pytest.approx(rank["fp32_norm"], rel=0.02)
        # SGD moves by its rate times the clipped gradient's norm: 0.5 * 0.01.
        assert rank["fp32_moved"] == pytest.approx(0.005, rel=1e-3)
        assert rank["fp16_moved"] == pytest.approx(0.005, rel=1e-3)


def test_an_overflow_on_one_rank_is_passed_over_by_all(facts):
    for rank in facts:
        assert all(rank["unmoved"]) and rank["moved_on"]
        assert rank["scale"] == 2.0**9, "halved once, on every rank"
        assert rank["skipped"] == 0, "it is the scaler's business"


def test_the_loss_scale_goes_on_where_it_was(tmp_path):
    for rank in run(cases.resumed, 2, str(tmp_path), "fp16", timeout=300):
        assert rank["second"] == rank["first"]
        assert rank["first"]["scaler"]["scale"] != 2.0**8


def test_adapters_that_a_learning_rate_has_killed_are_told_of(runtime, caplog):
    optimizer = partial(torch.optim.AdamW, lr=1e9)
    model = cases.llama("bfloat16", adapter=cases.lora)
    trainer, _ = cases.training(cases.BF16, 16, model=model, optimizer=optimizer)
    try:
        trainer.train()
    except FloatingPointError as error:
        assert "is not finite" in str(error)
    else:
        assert "the gradient norm has been exactly 0 for 10 steps" in caplog.text
        assert "learning rate" in caplog.text
    finally:
        trainer.close()
