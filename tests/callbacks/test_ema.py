import copy

import pytest
import torch
from torch import nn

from ditty_di.callbacks import EMA, Callback
from tests.checkpoint.ranks import run
from tests.diffusion.ranks import averaged, resumed


class OneWeight:
    """A trainer as far as the average is concerned."""

    def __init__(self, dtype=torch.float32):
        self.layer = nn.Linear(1, 1, bias=False).to(dtype)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.model_parts = [nn.ModuleDict({"layer": self.layer, "frozen": self.frozen})]
        self.set(0.0)

    @torch.no_grad()
    def set(self, value):
        self.layer.weight.fill_(value)


def test_the_average_is_the_one_of_the_formula():
    trainer, ema = OneWeight(), EMA(0.9, warmup=False)
    ema.on_train_start(trainer)
    for _ in range(5):
        trainer.set(1.0)
        ema.on_step_end(trainer)
    state = ema.state_dict()
    assert list(state) == ["updates", "averages.layer.weight"], "what is frozen has no average"
    assert state["averages.layer.weight"].item() == pytest.approx(1 - 0.9**5)


def test_the_beginning_is_forgotten_soon():
    trainer, ema = OneWeight(), EMA(0.9999)
    ema.on_train_start(trainer)
    trainer.set(1.0)
    expected = 0.0
    for n in range(1, 8):
        ema.on_step_end(trainer)
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay)
    assert ema.state_dict()["averages.layer.weight"].item() == pytest.approx(expected)
    assert expected > 0.95


def test_small_changes_of_bfloat16_weights_are_not_rounded_away():
    trainer, ema = OneWeight(torch.bfloat16), EMA(0.999, warmup=False)
    trainer.set(1.0)
    ema.on_train_start(trainer)
    trainer.set(1.25)
    for _ in range(100):
        ema.on_step_end(trainer)
    average = ema.state_dict()["averages.layer.weight"]
    assert average.item() == pytest.approx(1.25 - 0.25 * 0.999**100, rel=1e-4)
    with ema.swap():
        assert trainer.layer.weight.dtype == torch.bfloat16
    assert trainer.layer.weight.item() == 1.25


def test_the_averages_are_in_the_model_only_within_swap():
    trainer, ema = OneWeight(), EMA(0.5, warmup=False)
    ema.on_train_start(trainer)
    trainer.set(1.0)
    ema.on_step_end(trainer)

    def evaluate():
        with ema.swap():
            assert trainer.layer.weight.item() == 0.5
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert trainer.layer.weight.item() == 1.0
    assert ema.state_dict()["averages.layer.weight"].item() == 0.5


def test_it_goes_on_where_it_was_saved():
    trainer, ema = OneWeight(), EMA(0.999)
    ema.on_train_start(trainer)
    values = [0.3, -2.0, 1.0, 4.0]
    for value in values[:2]:
        trainer.set(value)
        ema.on_step_end(trainer)
    saved = copy.deepcopy(ema.state_dict())
    other, resumed = OneWeight(), EMA(0.999)
    resumed.on_train_start(other)
    resumed.load_state_dict(saved)
    for value in values[2:]:
        for t, e in ((trainer, ema), (other, resumed)):
            t.set(value)
            e.on_step_end(t)
    assert resumed.state_dict() == ema.state_dict()


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="decay=1"):
        EMA(1)
    for use in (EMA().state_dict, EMA().update, EMA().swap().__enter__):
        with pytest.raises(RuntimeError, match="there are no averages"):
            use()


def test_a_callback_may_leave_out_what_it_does_not_need():
    class Counting(Callback):
        steps = 0

        def on_step_end(self, trainer):
            self.steps += 1

    callback = Counting()
    for point in ("on_train_start", "on_step_end", "on_validation_end", "on_save", "on_train_end"):
        getattr(callback, point)(None)
    assert callback.steps == 1


def test_shards_average_as_the_whole_does_and_resume_on_another_layout(tmp_path):
    (alone,) = run(averaged, 1, str(tmp_path / "one"))
    both = run(averaged, 2, str(tmp_path / "two"))
    assert (alone["sharded"], both[0]["sharded"]) == (False, True)
    for rank in (alone, *both):
        assert rank["back"], "the own weights are back after swap"
        assert not torch.equal(rank["own"], rank["inside"])
        torch.testing.assert_close(rank["averages"], alone["averages"])
        torch.testing.assert_close(rank["inside"], alone["inside"])
    for ranks, folder in ((1, "two"), (2, "one")):
        for loaded in run(resumed, ranks, str(tmp_path / folder)):
            assert loaded["updates"] == 3
            torch.testing.assert_close(loaded["averages"], alone["averages"])
            torch.testing.assert_close(loaded["inside"], alone["inside"])
