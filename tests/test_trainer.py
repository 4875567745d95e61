"""The trainer on one rank: what it computes, what it refuses, when it stops."""

from __future__ import annotations

import ast
import gc
import inspect
import math
import os
import pickle
import signal
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ditty_di.callbacks import EMA, Callback, StopFile
from ditty_di.checkpoint import Checkpointer, latest
from ditty_di.data.loader import Loader
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.optim.schedules import constant, cosine
from ditty_di.processors import ContractError
from ditty_di.runtime import Runtime, seed_everything
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.distributed.cases import Ragged, Recorder, make_trainer, tiny_llama


class Classes(torch.utils.data.Dataset):
    """Points and their quadrant; `bad` rows hold NaN, `masked` rows have no label."""

    def __init__(self, rows=64, bad=(), masked=()):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 2, generator=generator)
        self.y = (self.x[:, 0] > 0).long() * 2 + (self.x[:, 1] > 0).long()
        self.x[list(bad)] = torch.nan
        self.y[list(masked)] = -100

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input": self.x[i]}, self.y[i]


@pytest.fixture
def runtime():
    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()


def small(runtime, **slots):
    torch.manual_seed(0)
    options = {
        "model": nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, 4)),
        "loss_fn": CrossEntropyLoss(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": constant_rate,
        "dataloader": partial(Loader, Classes(), micro_batch_size=8, shuffle=False),
        "max_steps": 5,
    }
    return Trainer(runtime=runtime, **{**options, **slots})


constant_rate = partial(constant, max_steps=1000)


def test_the_first_20_losses_are_those_of_a_hand_written_loop_bit_for_bit(runtime):
    trainer, recorder = make_trainer(None)
    trainer.train()

    model = tiny_llama()
    from ditty_di.models.weights import materialize

    materialize(model, torch.device("cpu"))
    initialize(model, device=torch.device("cpu"), seed=3, init=hugging_face)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = cosine(optimizer, max_steps=20, warmup_steps=3)
    losses = []
    for _, (inputs, labels) in zip(range(20), Loader(Ragged(), 16, seed=3), strict=False):
        logits = model(inputs["input"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    assert recorder.losses() == losses


def test_the_inherited_methods_read_nothing_else_from_the_config(runtime):
    """torchtitan's own code is parsed: a new field that it reads fails here, not in a run."""
    import torchtitan.trainer

    def is_called(name, member):
        own = getattr(Trainer, name)
        return own is member or f"super().{name}(" in inspect.getsource(own)

    inherited = {
        name
        for name, member in vars(torchtitan.trainer.Trainer).items()
        if inspect.isfunction(member) and name != "init_distributed" and is_called(name, member)
    }
    read = set()
    for name in inherited:
        source = textwrap.dedent(inspect.getsource(getattr(torchtitan.trainer.Trainer, name)))
        for node in ast.walk(ast.parse(source)):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text.startswith("self.config.") and text.count(".") == 3:
                read.add(text.removeprefix("self.config."))
    assert "training.steps" in read
    config = small(runtime).config
    for path in read:
        section, field = path.split(".")
        assert hasattr(getattr(config, section), field), f"torchtitan now reads config.{path}"


def test_exactly_the_asked_number_of_steps(runtime):
    result = small(runtime, max_steps=7).train()
    assert (result["status"], result["step"]) == ("finished", 7)


def test_parameters_that_no_gradient_reaches_are_named_once(runtime, caplog):
    class Unused(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    small(runtime, model=Unused(nn.Linear(2, 4), nn.Linear(3, 3))).train()
    told = [r.getMessage() for r in caplog.records if "no gradient" in r.getMessage()]
    assert len(told) == 1 and "reached 2 trainable parameters" in told[0]
    assert "1.weight, 1.bias" in told[0]


def test_accumulation_counts_windows_not_micro_batches(runtime):
    trainer = small(runtime, max_steps=3, global_batch_size=16)
    assert trainer.gradient_accumulation_steps == 2
    trainer.train()
    assert trainer.dataloader.state_dict()["consumed"] == 3 * 16


def test_data_that_ends_early_finishes_with_a_save(runtime, tmp_path):
    loader = partial(Loader, Classes(20), micro_batch_size=8, epochs=1)
    checkpointer = partial(Checkpointer, str(tmp_path), save_interval=100)
    trainer = small(runtime, dataloader=loader, max_steps=50, checkpointer=checkpointer)
    result = trainer.train()
    trainer.close()
    assert (result["status"], result["step"]) == ("finished", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_data_that_never_begins_is_an_error(runtime):
    nothing = torch.utils.data.DataLoader(Classes(4), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="yields no batch"):
        small(runtime, dataloader=nothing).train()


def test_the_profiler_is_started_and_leaves_a_trace(runtime, tmp_path):
    from torchtitan.tools.profiler import Profiler

    config = Profiler.Config(enable_profiling=True, profile_freq=4, profiler_warmup=1)
    profiler = partial(Profiler, config, base_folder=str(tmp_path))
    assert small(runtime, profiler=profiler, max_steps=5).train()["status"] == "finished"
    assert list(tmp_path.rglob("*trace.json.gz"))


def test_a_partial_last_window_still_trains(runtime):
    loader = partial(Loader, Classes(24), micro_batch_size=8, epochs=1)
    result = small(runtime, dataloader=loader, max_steps=50, global_batch_size=16).train()
    assert result["step"] == 2


def test_a_finished_run_started_again_trains_and_writes_nothing(runtime, tmp_path):
    checkpointer = partial(Checkpointer, str(tmp_path), save_interval=100)
    first = small(runtime, checkpointer=checkpointer)
    first.train()
    first.close()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = small(runtime, checkpointer=checkpointer)
    result = again.train()
    again.close()
    assert (result["status"], result["step"]) == ("finished", 5)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_plain_torch_loader_is_taken_epoch_after_epoch_until_it_ends(runtime):
    loader = torch.utils.data.DataLoader(Classes(16), batch_size=8)
    result = small(runtime, dataloader=loader, max_steps=50).train()
    assert (result["status"], result["step"]) == ("finished", 2)


# -- what is not finite ---------------------------------------------------------------------------


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model_parts[0].parameters()]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(runtime):
    trainer = small(runtime, dataloader=partial(Loader, Classes(bad=[9]), 8, shuffle=False))
    after_first = None

    class Watch(Recorder):
        def write(self, step, values):
            nonlocal after_first
            after_first = weights_of(trainer)

    trainer.metrics_processor.loggers.append(Watch())
    trainer.metrics_processor.log_interval = 1
    with pytest.raises(FloatingPointError, match=r"step 2 is not finite.*rows \[8, 9, 10"):
        trainer.train()
    for before, after in zip(after_first, weights_of(trainer), strict=True):
        assert torch.equal(before, after)


def test_an_infinite_loss_with_finite_gradients_is_found_too(runtime):
    class Infinite(CrossEntropyLoss):
        def forward(self, output, batch, num_valid_global):
            loss, metrics = super().forward(output, batch, num_valid_global)
            return loss + math.inf, metrics

    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        small(runtime, loss_fn=Infinite()).train()


def test_the_budget_passes_over_bad_windows_and_no_more(runtime):
    bad = partial(Loader, Classes(bad=[9, 20]), 8, shuffle=False)
    result = small(runtime, dataloader=bad, max_skipped_steps=2, max_steps=8).train()
    assert (result["step"], result["skipped_steps"]) == (8, 2)
    assert math.isfinite(result["objective"])
    with pytest.raises(FloatingPointError, match="step 3"):
        small(runtime, dataloader=bad, max_skipped_steps=1).train()


def test_a_window_without_a_label_is_refused_not_counted_as_loss_zero(runtime):
    masked = partial(Loader, Classes(masked=range(8, 16)), 8, shuffle=False)
    with pytest.raises(FloatingPointError, match="step 2 has no label to learn from"):
        small(runtime, dataloader=masked).train()


def test_a_masked_micro_batch_in_a_window_is_fine(runtime):
    masked = partial(Loader, Classes(masked=range(8, 16)), 8, shuffle=False)
    assert small(runtime, dataloader=masked, global_batch_size=16).train()["step"] == 5


# -- float16 --------------------------------------------------------------------------------------


def test_gradients_are_unscaled_before_they_are_clipped(runtime):
    plain, scaled = (
        small(runtime),
        small(runtime, grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)),
    )
    plain.train(), scaled.train()
    for a, b in zip(weights_of(plain), weights_of(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_overflow_lowers_the_scale_and_is_no_skipped_step(runtime):
    class Steep(CrossEntropyLoss):
        def forward(self, output, batch, num_valid_global):
            return super().forward(output, batch, num_valid_global / 1000)

    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=10_000)
    trainer = small(runtime, loss_fn=Steep(), grad_scaler=scaler, max_steps=25)
    before = weights_of(trainer)
    result = trainer.train()
    assert result["skipped_steps"] == 0
    assert 0 < scaler.get_scale() < 3e38
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def test_the_scale_is_restored(runtime, tmp_path):
    def run(steps):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        trainer = small(
            runtime,
            grad_scaler=scaler,
            max_steps=steps,
            checkpointer=partial(Checkpointer, str(tmp_path), save_interval=100),
        )
        trainer.train()
        trainer.close()
        return scaler.get_scale()

    assert run(4) == 32.0
    assert run(6) == 64.0


# -- stopping -------------------------------------------------------------------------------------


def test_sigterm_saves_at_the_next_step_and_the_same_run_resumes(runtime, tmp_path):
    class Kill(Recorder):
        def write(self, step, values):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    from ditty_di.loggers.processor import MetricsProcessor

    def run(loggers):
        trainer = small(
            runtime,
            max_steps=10,
            logger=MetricsProcessor(loggers, log_interval=1),
            checkpointer=partial(Checkpointer, str(tmp_path), save_interval=100),
        )
        result = trainer.train()
        trainer.close()
        return result, weights_of(trainer)

    before = signal.getsignal(signal.SIGTERM)
    stopped, _ = run([Kill()])
    assert (stopped["status"], stopped["step"]) == ("preempted", 4)
    assert signal.getsignal(signal.SIGTERM) == before
    runtime._stop_requested = False
    resumed, weights = run([])
    assert (resumed["status"], resumed["step"]) == ("finished", 10)
    whole = small(runtime, max_steps=10)
    whole.train()
    for a, b in zip(weights, weights_of(whole), strict=True):
        assert torch.equal(a, b)


def test_the_stop_file_stops(tmp_path):
    runtime = Runtime()
    stop = StopFile(tmp_path / "stop")
    assert small(runtime, max_steps=1, callbacks={"stop": stop}).train()["status"] == "finished"
    (tmp_path / "stop").touch()
    result = small(runtime, max_steps=10, callbacks={"stop": stop}).train()
    runtime.close()
    assert (result["status"], result["step"]) == ("preempted", 1)


# -- what fails on the way ------------------------------------------------------------------------


class Failing(Classes):
    """Raises at one row, once it is told to."""

    bad_row: int | None = None

    def __getitem__(self, i):
        torch.rand(1), np.random.rand()  # what a step has drawn must be put back
        if i == self.bad_row:
            raise OSError("shard 7 is unreadable")
        return super().__getitem__(i)


class Drops(nn.Module):
    """Batch norm and dropout: both change what a checkpoint holds in the forward pass."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.head = nn.Linear(16, 4)
        self.fails_at = None
        self.calls = 0

    def forward(self, input):
        self.calls += self.training
        output = self.head(self.layers(input))
        if self.calls == self.fails_at:
            raise OSError("the model is unwell")
        return output


class BadLoss(CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.calls, self.fails_at = 0, None

    def forward(self, output, batch, num_valid_global):
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError("the loss is unwell")
        return super().forward(output, batch, num_valid_global)


class At(Callback):
    """Raises at one step, of one moment."""

    def __init__(self, moment, step):
        self.step = step
        setattr(self, moment, self._raise)

    def _raise(self, trainer):
        if trainer.step == self.step:
            raise OSError("the callback is unwell")


def kept(runtime, tmp_path, *, steps=8, rows=None, model=None, loss=None, **slots):
    torch.manual_seed(0)
    trainer = small(
        runtime,
        model=model or Drops(),
        loss_fn=loss or BadLoss(),
        dataloader=partial(Loader, rows or Failing(), micro_batch_size=4, seed=1),
        checkpointer=partial(Checkpointer, str(tmp_path), save_interval=100, async_save=True),
        global_batch_size=8,
        max_steps=steps,
        **slots,
    )
    seed_everything(7)
    return trainer


def fail_in_loader(runtime, folder):
    rows = Failing()
    order = Loader(rows, 4, seed=1).sampler.between(0, 64)
    rows.bad_row = order[5 * 8 + 5]  # the second micro-batch of step 6
    return kept(runtime, folder, rows=rows)


def fail_in_forward(runtime, folder):
    model = Drops()
    model.fails_at = 12  # the second micro-batch of step 6
    return kept(runtime, folder, model=model)


def fail_in_loss(runtime, folder):
    loss = BadLoss()
    loss.fails_at = 12
    return kept(runtime, folder, loss=loss)


def fail_in_callback(runtime, folder):
    callbacks = {"bad": At("on_step_end", 5), "ema": EMA(0.9)}
    return kept(runtime, folder, callbacks=callbacks)


def fail_in_validation(runtime, folder):
    class Validates(Validator):
        def validate(self, step):
            raise OSError("the validation is unwell")

    loader = Loader(Classes(16), 8, shuffle=False, epochs=1)
    return kept(runtime, folder, validator=partial(Validates, loader, eval_interval=5))


FAILURES = [fail_in_loader, fail_in_forward, fail_in_loss, fail_in_callback, fail_in_validation]


@pytest.mark.parametrize("fail", FAILURES)
def test_an_exception_saves_the_last_good_step_and_resuming_is_exact(
    runtime, tmp_path, fail, caplog
):
    with pytest.raises(OSError, match=r"unwell|unreadable") as error:
        fail(runtime, tmp_path / "failed").train()
    assert latest(tmp_path / "failed").name == "step-00000005"
    after_the_step = fail in (fail_in_callback, fail_in_validation)
    assert error.value.training_step == (5 if after_the_step else 6)
    assert "failed; it goes on from step 5" in caplog.text

    ema = {"callbacks": {"ema": EMA(0.9)}} if fail is fail_in_callback else {}
    undisturbed = kept(runtime, tmp_path / "undisturbed", **ema)
    undisturbed.train()
    resumed = kept(runtime, tmp_path / "failed", **ema)
    seed_everything(1)
    assert resumed.train()["step"] == 8
    resumed.close(), undisturbed.close()
    assert content(tmp_path / "failed") == content(tmp_path / "undisturbed")


def content(folder):
    """Everything in the newest checkpoint of a folder."""
    return everything(latest(folder))


def everything(checkpoint):
    saved = {}
    read = _EmptyStateDictLoadPlanner()
    _load_state_dict(saved, storage_reader=FileSystemReader(checkpoint), planner=read, no_dist=True)
    return {key: plain(value) for key, value in flatten_state_dict(saved)[0].items()}


def plain(value):
    value = pickle.loads(value) if isinstance(value, bytes) else value
    return value.tolist() if isinstance(value, torch.Tensor) else repr(value)


def test_a_failure_in_the_first_step_saves_nothing(runtime, tmp_path, caplog):
    model = Drops()
    model.fails_at = 1
    with pytest.raises(OSError, match="unwell"):
        kept(runtime, tmp_path, model=model).train()
    assert latest(tmp_path) is None and "goes on" not in caplog.text


def test_a_failure_in_the_update_saves_nothing_half_done(runtime, tmp_path, caplog):
    class Torn(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            super().step(closure)
            if self.calls == 5:
                raise OSError("the optimizer is unwell")

    trainer = kept(runtime, tmp_path, optimizer=partial(Torn, lr=0.1))
    trainer.checkpointer.save_interval = 3
    with pytest.raises(OSError, match="unwell"):
        trainer.train()
    trainer.close()
    assert latest(tmp_path).name == "step-00000003"
    assert "goes on from step 3" in caplog.text and "the update of the parameters" in caplog.text


def test_validation_data_that_cannot_be_counted_are_found_before_the_first_step(runtime):
    """A fifth class, where the loss has weights for four."""
    rows = Classes(16)
    rows.y[3] = 4
    model = nn.Linear(2, 4)
    before = [p.clone() for p in model.parameters()]
    trainer = small(
        runtime,
        model=model,
        loss_fn=nn.CrossEntropyLoss(weight=torch.ones(4)),
        validator=partial(
            Validator, partial(Loader, rows, 8, shuffle=False, epochs=1), eval_interval=100
        ),
    )
    with pytest.raises(IndexError, match="index 4 is out of bounds"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_validator_that_is_tried_before_leaves_the_training_as_it_was(runtime, tmp_path):
    """Loader with a position, preprocessors' and dropout's random numbers."""
    loader = Loader(Failing(16), 8, epochs=1, shuffle=False)
    results = []
    for validator in (None, partial(Validator, loader, eval_interval=100)):
        trainer = kept(runtime, tmp_path / str(len(results)), validator=validator)
        trainer.train()
        results.append(weights_of(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert loader.state_dict()["consumed"] == 16


def test_parameters_that_are_not_finite_are_not_saved(runtime, tmp_path):
    optimizer = partial(torch.optim.SGD, lr=3e38, weight_decay=100.0)
    trainer = kept(runtime, tmp_path, optimizer=optimizer, steps=1)
    with pytest.raises(FloatingPointError, match=r"step 1: \d+ parameters are not finite \(lay"):
        trainer.train()
    assert latest(tmp_path) is None


def test_parameters_are_looked_at_when_a_checkpointer_of_ones_own_is_due(runtime):
    class Own:
        save_interval, steps = 3, ()

        def load(self):
            return None

        def save(self, step, *, force=False, objective=None):
            self.steps += (step,)
            return False

        def maybe_wait_for_staging(self):
            pass

        def close(self):
            pass

    class Net(nn.Linear):
        def __init__(self):
            super().__init__(2, 4)
            self.unused = nn.Parameter(torch.tensor([torch.inf]))

    own = Own()
    trainer = small(runtime, model=Net(), checkpointer=lambda **states: own, max_steps=5)
    with pytest.raises(FloatingPointError, match=r"step 3: 1 parameters are not finite \(unused"):
        trainer.train()
    assert own.steps == (1, 2), "it is asked at every step, and looked at in its own"


def test_gradients_of_exactly_zero_for_ten_steps_are_warned_about_once(runtime, caplog):
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[2].weight.zero_()
    model[2].requires_grad_(False)
    small(runtime, model=model, max_steps=25).train()
    assert caplog.text.count("the gradient norm has been exactly 0 for 10 steps") == 1


def test_the_objective_of_a_stopped_run_is_not_that_of_the_time_before_training(runtime):
    class Stop(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                trainer.runtime.request_stop()

    loader = Loader(Classes(16), 8, shuffle=False, epochs=1)
    validator = partial(Validator, loader, eval_interval=100, validate_before_training=True)
    trainer = small(runtime, max_steps=9, validator=validator, callbacks={"stop": Stop()})
    result = trainer.train()
    assert (result["status"], result["step"], result["objective_step"]) == ("preempted", 4, 4)
    assert result["objective"] == trainer.last_loss


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots, message",
    [
        ({"max_steps": 0}, "trainer.max_steps=0"),
        ({"max_grad_norm": 0}, "trainer.max_grad_norm=0 must be above 0"),
        ({"global_batch_size": 12}, r"global_batch_size=12 is not a multiple of 8"),
        ({"global_batch_size": 0}, r"global_batch_size=0"),
        (
            {"model": nn.Linear(2, 2, device="meta"), "weights": None},
            "weights: the model is on the meta device",
        ),
        (
            {"dataloader": Loader(Classes(), 8, dp_rank=1, dp_world_size=2)},
            r"dataloader: it was made for .*'dp_rank': 1",
        ),
        (
            {
                "dataloader": torch.utils.data.DataLoader(Classes(), 8),
                "checkpointer": partial(Checkpointer, "never"),
            },
            "dataloader: it has no state_dict",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_slot(runtime, slots, message):
    with pytest.raises(ValueError, match=message):
        small(runtime, **slots)


def test_a_model_without_a_trainable_parameter_is_refused(runtime):
    frozen = nn.Linear(2, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter must be trainable"):
        small(runtime, model=frozen)


def test_an_optimizer_of_other_parameters_is_refused(runtime):
    stale = nn.Linear(2, 4)
    with pytest.raises(ValueError, match="not trainable parameters of the model"):
        small(runtime, optimizer=lambda named: torch.optim.SGD(stale.parameters(), lr=1.0))


def test_a_model_brings_its_own_weights_and_contract(runtime):
    def zeros(model, /, *, device):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()

    def slots(**attributes):
        model = tiny_llama()
        for name, value in attributes.items():
            setattr(model, name, value)
        return {"model": model, "loss_fn": CrossEntropyLoss(output="logits")}

    filled = small(runtime, **slots(default_weights=zeros))
    assert not any(p.any() for p in filled.model_parts[0].parameters())
    random = partial(initialize, init=hugging_face)
    other = small(runtime, **slots(default_weights=zeros), weights=random)
    assert any(p.any() for p in other.model_parts[0].parameters())
    assert small(runtime, model=nn.Linear(2, 4)).train()["step"] == 5
    with pytest.raises(ContractError, match="logits"):
        small(runtime, **slots(default_weights=zeros, contract="0:2:i64 -> odd:3:f"))


def test_a_scaler_may_be_a_partial_that_lacks_the_device(runtime):
    scaler = partial(torch.amp.GradScaler, init_scale=8.0, growth_interval=2)
    trainer = small(runtime, grad_scaler=scaler, max_steps=4)
    trainer.train()
    assert trainer.grad_scaler.get_scale() == 32.0


def test_weights_that_leave_a_tensor_unset_are_refused(runtime):
    def forgetful(model, /, *, device):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.zero_()

    with pytest.raises(ValueError, match=r"have no value.*norm.weight"):
        small(runtime, model=tiny_llama(), weights=forgetful)


def test_what_was_injected_is_used_and_not_replaced(runtime):
    model, loss = nn.Linear(2, 4), CrossEntropyLoss()
    built = []

    def optimizer(named):
        built.append(torch.optim.SGD(named, lr=0.1))
        return built[-1]

    trainer = small(runtime, model=model, loss_fn=loss, optimizer=optimizer)
    assert trainer.model_parts[0] is model
    assert trainer.loss_fn is loss
    assert trainer.optimizer is built[0]


def test_garbage_collection_is_given_back(runtime):
    assert gc.isenabled()
    small(runtime).train()
    assert gc.isenabled()


def test_a_misspelt_argument_names_the_one_that_is_meant():
    with pytest.raises(
        TypeError, match=r"'max_stepz' is not a parameter of it; did you mean 'max_steps'"
    ):
        Trainer(model=nn.Linear(2, 2), max_stepz=3)
    assert "max_steps" in inspect.signature(Trainer).parameters, "as task=check reads it"
