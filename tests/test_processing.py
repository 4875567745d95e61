"""Processors, contracts, parameters of losses and callbacks in the real trainer, on one rank."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ditty_di.callbacks import EMA, Callback, Callbacks, EarlyStopping
from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.read import CheckpointError, from_checkpoint, load_loss
from ditty_di.losses import (
    CrossEntropyLoss,
)
from ditty_di.processors import ContractError, PreProcessor
from ditty_di.tasks.evaluate import evaluate
from tests.distributed.cases import make_trainer
from tests.distributed.processing import (
    Double,
    Notes,
    Refuse,
    Rows,
    Targets,
    TwoHeads,
    composite,
    held_out,
    make,
    uncertain,
)


@pytest.fixture
def small(runtime):
    return partial(make, runtime, micro=4)


def weights_of(trainer):
    parameters = [*trainer.parts.parameters(), *trainer.loss_parameters.trained]
    return [p.detach().clone() for p in parameters]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(model, rows, data=None):
    """(cross-entropy, masked squared error, as means) over some rows, all at once."""
    data = data or Rows()
    ids, labels, values, kept = (
        torch.stack([getattr(data, name)[row] for row in rows])
        for name in ("input", "labels", "values", "kept")
    )
    logits, said = model(ids, scale=torch.tensor(0.5))
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return ce, F.mse_loss(2 * said[kept], values[kept])


# -- what is computed -----------------------------------------------------------------------------


def test_processors_and_every_part_of_the_loss_against_a_computation_by_hand(small):
    torch.manual_seed(0)
    ce, mse = by_hand(TwoHeads(), range(12))
    trainer, recorder = small(max_steps=1)
    trainer.train()
    (row,) = recorder.rows
    assert row["cross_entropy_calculator/ce"] == pytest.approx(ce.item(), abs=1e-6)
    assert row["mse_loss/mse"] == pytest.approx(mse.item(), abs=1e-6)
    assert row["loss"] == pytest.approx((ce + 0.7 * mse).item(), abs=1e-6)
    assert row["tokens_seen"] == 12 * 6 and row["rejected_batches"] == 0


def test_validation_goes_through_the_processors_and_is_exact(small):
    trainer, _ = small(max_steps=2, validator=held_out(5))
    trainer.train()
    with torch.no_grad():
        ce, mse = by_hand(trainer.model_parts[0], range(55, 60), Rows(60))
    assert trainer.objective == pytest.approx((ce + 0.7 * mse).item(), abs=1e-6)


def test_noise_of_the_global_generator_is_the_same_in_each_validation(small):
    class Noise(PreProcessor):
        def process(self, batch, ctx):
            return torch.randint(10, batch.shape), ctx

    trainer, recorder = small(
        optimizer=partial(torch.optim.SGD, lr=0.0),
        preprocessors=[Targets(), Noise()],
        validator=held_out(),
        max_steps=4,
    )
    trainer.train()
    losses = [row["validation/loss"] for row in recorder.rows if "validation/loss" in row]
    assert len(losses) == 2 and losses[0] == losses[1]


def test_processors_are_told_where_training_is(small):
    told = []

    class Look(PreProcessor):
        def process(self, batch, ctx):
            names = ("epoch", "step", "total_steps", "device", "model")
            told.append([ctx[name] for name in names])
            return batch, ctx

    trainer, _ = small(data=Rows(16), preprocessors=[Targets(), Look()], max_steps=2)
    trainer.train()
    model = trainer.model_parts[0]
    at = zip((0, 0, 0, 0, 1, 1), (1, 1, 1, 2, 2, 2), strict=True)  # 4 of 16 rows each
    assert told == [[epoch, step, 2, torch.device("cpu"), model] for epoch, step in at]


def test_without_processors_a_batch_goes_the_plain_way():
    seen = []

    class Look(CrossEntropyLoss):
        def forward(self, output, batch, num_valid_global):
            seen.append(batch)
            return super().forward(output, batch, num_valid_global)

    loss = Look(output="logits")
    trainer, recorder = make_trainer(None, loss_fn=loss, max_steps=1, accumulation=2)
    assert trainer.loss_fn is loss  # nothing around it
    assert trainer.accumulation.prepare is None  # and no second reduction per step
    trainer.train()
    assert [dict(batch.context) for batch in seen] == [{}, {}]
    assert "rejected_batches" not in recorder.rows[0]


# -- rejected batches -----------------------------------------------------------------------------


def test_a_run_of_which_nothing_is_left_ends_without_an_update(small):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    trainer, recorder = small(data=Rows(bad=range(48)), grad_scaler=scaler, max_steps=3)
    before = weights_of(trainer)
    result = trainer.train()
    assert all_equal(before, weights_of(trainer))
    assert (result["step"], result["rejected_batches"], result["skipped_steps"]) == (3, 9, 0)
    # No loss is not a loss of 0.
    assert result["objective"] is None
    assert not any("loss" in row for row in recorder.rows)
    assert scaler.get_scale() == 8.0


def test_a_scaler_works_after_a_rejected_window(small):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    trainer, recorder = small(data=Rows(bad=[12, 16, 20]), grad_scaler=scaler, max_steps=3)
    trainer.train()
    assert ["loss" in row for row in recorder.rows] == [True, False, True]
    assert scaler.get_scale() == 32.0


def test_the_count_of_rejected_batches_is_resumed(small, tmp_path):
    keep = partial(Checkpointer, str(tmp_path), save_interval=2)
    first, _ = small(data=Rows(bad=[1, 13]), checkpointer=keep, max_steps=2)
    assert first.train()["rejected_batches"] == 2
    first.close()
    again, _ = small(data=Rows(bad=[1, 13]), checkpointer=keep, max_steps=4)
    assert again.train()["rejected_batches"] == 2
    again.close()


def test_a_run_without_processors_goes_on_with_some_and_the_other_way_round(runtime, tmp_path):
    class RejectThird(PreProcessor):
        def process(self, batch, ctx):
            return None if ctx["step"] == 3 else (batch, ctx)

    def trained(steps, *preprocessors):
        keep = partial(Checkpointer, str(tmp_path), save_interval=2)
        trainer, _ = make_trainer(
            None, checkpointer=keep, preprocessors=preprocessors, max_steps=steps
        )
        result = trainer.train()
        trainer.close()
        return result

    assert "rejected_batches" not in trained(2)
    assert trained(4, RejectThird())["rejected_batches"] == 1
    assert trained(5)["step"] == 5


# -- contracts ------------------------------------------------------------------------------------


def test_a_pipeline_that_does_not_fit_is_refused_before_training(small):
    with pytest.raises(ContractError, match=r"model.*scale:0:f32.*nothing before gives 'scale'"):
        small(preprocessors=[Refuse()])
    with pytest.raises(ContractError, match=r"mse_loss.*ctx.mask"):
        small(preprocessors=[Targets(contract="0:2:i64 -> | ctx.forward_kwargs.scale:0:f32")])


class Wrong(PreProcessor):
    """Says that it writes float32, and from its second batch on writes float64."""

    contract = "0:2:i64 -> | ctx.forward_kwargs.scale:0:f32"

    def __init__(self, first=1):
        super().__init__()
        self.left = first

    def process(self, batch, ctx):
        self.left -= 1
        dtype = torch.float32 if self.left >= 0 else torch.float64
        ctx["forward_kwargs"]["scale"] = torch.tensor(0.5, dtype=dtype)
        return batch, ctx


def test_real_tensors_are_compared_with_contracts_on_demand(small):
    message = r"wrong.*scale.*expected rank 0, dtype f32.*found.*f64"

    def run(mode, good):
        return small(contracts=mode, preprocessors=[Targets(), Wrong(good)], max_steps=1)[0].train()

    with pytest.raises(ContractError, match=message):
        run("runtime", 0)
    with pytest.raises(ContractError, match=message):
        run("every_batch", 1)
    # What nobody looks at stays unseen: float64 in the second micro-batch, or in all.
    assert run("runtime", 1)["step"] == run("static", 0)["step"] == 1


def test_tensors_are_compared_also_where_there_is_no_processor():
    class Narrow(CrossEntropyLoss):
        contract = "0:3:f32 | ctx.target:2:i32 -> loss:0:f32"

    trainer, _ = make_trainer(
        None, loss_fn=Narrow(output="logits"), contracts="runtime", max_steps=1
    )
    with pytest.raises(ContractError, match=r"ctx.target: expected .* i32; found .* i64"):
        trainer.train()


def test_an_unknown_check_is_refused(small):
    with pytest.raises(
        ValueError, match=r"trainer.contracts=evry: write static, runtime or every_batch"
    ):
        small(contracts="evry")


# -- parameters of losses -------------------------------------------------------------------------


def test_parameters_of_a_loss_are_trained_and_clipped_with_the_model(small):
    sgd = partial(torch.optim.SGD, lr=1.0)
    trainer, recorder = small(loss_fn=uncertain(), optimizer=sgd, max_grad_norm=0.25, max_steps=1)
    torch.manual_seed(0)
    model, s = TwoHeads(), torch.full((2,), 0.3, requires_grad=True)
    ce, mse = by_hand(model, range(12))
    loss = torch.exp(-s[0]) * ce + 0.5 * torch.exp(-s[1]) * mse + s.sum() / 2
    loss.backward()
    trained = [*model.parameters(), s]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.25)
    trainer.train()
    assert recorder.rows[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert recorder.rows[0]["grad_norm"] == pytest.approx(norm.item(), abs=1e-6)
    for mine, there in zip(weights_of(trainer), trained, strict=True):
        torch.testing.assert_close(mine, (there - there.grad).detach(), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_them_by_name_and_evaluation_reads_them(small, runtime, tmp_path):
    keep = partial(Checkpointer, str(tmp_path), save_interval=None)
    trainer, _ = small(loss_fn=uncertain(), checkpointer=keep, validator=held_out(5), max_steps=4)
    trainer.train()
    trainer.close()
    assert {"loss"} <= trainer.checkpointer.states.keys()
    assert (
        "state.loss.log_variances.exp_avg" in trainer.checkpointer.states["optimizer"].state_dict()
    )

    torch.manual_seed(9)
    loss = uncertain()
    found = evaluate(
        model=TwoHeads().to("meta"),
        weights=partial(from_checkpoint, path=tmp_path),
        loss_fn=loss,
        loss_weights=partial(load_loss, path=tmp_path),
        preprocessors=[Refuse(), Targets()],
        postprocessors=[Double()],
        validator=held_out(5),
        runtime=runtime,
    )
    assert found["objective"] == pytest.approx(trainer.objective, abs=1e-6)
    assert torch.equal(loss.log_variances, trainer.loss_parameters.trained[0])
    load_loss(composite(), tmp_path)  # has none: nothing to read


def test_a_checkpoint_of_another_loss_is_refused(small, tmp_path):
    keep = partial(Checkpointer, str(tmp_path), save_interval=None)
    trainer, _ = small(checkpointer=keep, max_steps=1)
    trainer.train()
    trainer.close()
    with pytest.raises(CheckpointError, match=r"does not fit the loss: .*log_variances"):
        load_loss(uncertain(), tmp_path)


# -- callbacks ------------------------------------------------------------------------------------


def test_callbacks_of_every_moment_and_their_state(small, tmp_path):
    def run(steps):
        calls = []
        notes = Notes(calls, "n")
        trainer, _ = small(
            callbacks={"notes": notes, "none": None, "plain": Callback()},
            checkpointer=partial(Checkpointer, str(tmp_path), save_interval=2, keep_latest_k=None),
            validator=held_out(),
            max_steps=steps,
        )
        trainer.train()
        trainer.close()
        return calls, notes.steps

    calls, steps = run(3)
    moments = [(1, "on_step_end"), (2, "on_step_end"), (2, "on_validation_end"), (2, "on_save")]
    moments += [(3, "on_step_end"), (3, "on_validation_end"), (3, "on_save"), (3, "on_train_end")]
    assert calls == ["n on_train_start 0", *(f"n {moment} {step}" for step, moment in moments)]
    assert steps == 3
    assert run(5)[1] == 5


def test_what_is_no_callback_is_refused_by_name():
    with pytest.raises(TypeError, match=r"callbacks.ema: .* has no on_train_start, on_step_end"):
        Callbacks({"ema": object()})


def test_averages_of_weights_are_resumed_bit_for_bit(small, tmp_path):
    def run(folder, *steps):
        for until in steps:
            ema = EMA(0.9)
            trainer, _ = small(
                callbacks={"ema": ema},
                checkpointer=partial(Checkpointer, str(tmp_path / folder), save_interval=None),
                max_steps=until,
            )
            trainer.train()
            trainer.close()
        return ema.state_dict(), trainer

    whole, trainer = run("whole", 5)
    again, _ = run("again", 2, 5)
    assert whole["updates"] == again["updates"] == 5
    assert whole.keys() == again.keys()
    for name, average in whole.items():
        assert torch.equal(torch.as_tensor(average), torch.as_tensor(again[name])), name
    assert not torch.equal(whole["averages.logits.weight"], trainer.model_parts[0].logits.weight)


def stopping(small, folder, patience, **slots):
    options = {
        # The first validation is the best.
        "optimizer": partial(torch.optim.SGD, lr=0.0),
        "checkpointer": partial(Checkpointer, str(folder), save_interval=None),
        "callbacks": {"stop": EarlyStopping(patience)},
        "validator": held_out(),
        "max_steps": 30,
        **slots,
    }
    trainer, _ = small(**options)
    result = trainer.train()
    trainer.close()
    return result["status"], result["step"], bool(result["stopped"])


def test_averages_are_read_out_of_a_checkpoint(small, tmp_path):
    ema = EMA(0.9)
    keep = partial(Checkpointer, str(tmp_path), save_interval=None)
    trainer, _ = small(callbacks={"mean": ema}, checkpointer=keep, max_steps=3)
    trainer.train()
    trainer.close()
    model = TwoHeads().to("meta").to_empty(device="cpu")
    from_checkpoint(model, device=torch.device("cpu"), path=tmp_path, averages="mean")
    averages = ema.state_dict()
    for name, p in model.named_parameters():
        assert torch.equal(p, averages[f"averages.{name}"]), name
    with pytest.raises(CheckpointError, match=r"no averages of a callback 'ema'; .* it has mean"):
        from_checkpoint(model, device=torch.device("cpu"), path=tmp_path, averages="ema")


def test_averages_may_take_the_place_of_the_weights_at_the_end(small):
    ema = EMA(0.9, apply_at_end=True)
    trainer, _ = small(callbacks={"ema": ema}, max_steps=3)
    trainer.train()
    trainer.close()
    averages = ema.state_dict()
    for name, p in trainer.model_parts[0].named_parameters():
        assert torch.equal(p, averages[f"averages.{name}"]), name


def test_early_stopping_counts_on_where_it_was_and_goes_on_with_more_patience(small, tmp_path):
    assert stopping(small, tmp_path, 3, max_steps=4) == ("finished", 4, False)
    assert stopping(small, tmp_path, 3) == ("finished", 8, True)
    assert stopping(small, tmp_path, 3) == ("finished", 8, True)
    assert stopping(small, tmp_path, 4) == ("finished", 10, True)


def test_early_stopping_lets_go_on_what_improves(small, tmp_path):
    better = {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "max_steps": 8}
    assert stopping(small, tmp_path / "a", 1, **better) == ("finished", 8, False)
    demanding = {"callbacks": {"stop": EarlyStopping(1, min_delta=10.0)}, **better}
    assert stopping(small, tmp_path / "b", 1, **demanding) == ("finished", 4, True)


def test_early_stopping_stops_at_losses_that_are_no_numbers():
    class Nowhere:
        validator, objective, step, stopped = object(), math.nan, 1, None

        def stop(self, reason):
            self.stopped = reason

    trainer, callback = Nowhere(), EarlyStopping(2)
    callback.on_train_start(trainer)
    callback.on_validation_end(trainer)
    assert trainer.stopped is None
    callback.on_validation_end(trainer)
    assert trainer.stopped


def test_early_stopping_without_a_validator_is_refused(small):
    trainer, _ = small(callbacks={"stop": EarlyStopping()})
    with pytest.raises(ValueError, match="needs a validator"):
        trainer.train()
    with pytest.raises(ValueError, match="patience=0"):
        EarlyStopping(0)
