"""Speed, memory and remaining time, as they reach a logger."""

import time
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn

from ditty_di.adapters import apply_adapter
from ditty_di.loggers import MetricsProcessor, flops
from ditty_di.models.causal_lm import from_config
from ditty_di.quantization import nf4
from ditty_di.runtime import Runtime
from tests.models.families import CAUSAL, config


class Recorder:
    """A logger that keeps what it was given."""

    def __init__(self, fails_to_close=False):
        self.started, self.values, self.texts, self.closed = None, [], [], False
        self.fails_to_close = fails_to_close

    def start(self, *, step, max_steps):
        self.started = (step, max_steps)

    def write(self, step, values):
        self.values.append((step, values))

    def text(self, step, name, text):
        self.texts.append((step, name, text))

    def close(self):
        self.closed = True
        if self.fails_to_close:
            raise OSError("disk full")


@pytest.fixture
def runtime():
    runtime = Runtime()
    yield runtime
    runtime.close()


def started(runtime, *loggers, step=0, **options):
    metrics = MetricsProcessor(loggers, **options)
    metrics.start(model_parts=[nn.Linear(8, 4)], max_steps=25, runtime=runtime, step=step)
    return metrics


def train(metrics, step, seconds, tokens=100, **values):
    time.sleep(seconds)
    metrics.ntokens_since_last_log += tokens
    metrics.log(step, {"loss": 1.0, **values})


def test_reports_the_first_every_nth_and_the_last_step(runtime):
    metrics = started(runtime, log_interval=10)
    assert [step for step in range(1, 26) if metrics.should_log(step)] == [1, 10, 20, 25]
    with pytest.raises(
        ValueError, match="log_interval must be a number of steps, at least 1; got 0"
    ):
        MetricsProcessor(log_interval=0)


def test_speed_share_and_remaining_time(runtime):
    recorder = Recorder()
    metrics = started(runtime, recorder, log_interval=5)
    train(metrics, 1, 0.02)
    metrics.data_loading_times += [0.01, 0.01]
    train(metrics, 5, 0.08, tokens=400)
    (_, first), (step, values) = recorder.values
    assert step == 5
    assert values["loss"] == 1.0
    assert values["seconds_per_step"] == pytest.approx(0.02, rel=0.4)
    assert values["tokens_per_second"] == pytest.approx(400 / (4 * values["seconds_per_step"]))
    assert values["data_loading_share"] == pytest.approx(0.02 / (4 * values["seconds_per_step"]))
    assert values["eta_seconds"] == pytest.approx(20 * 0.02, rel=0.5)
    assert values["tflops"] == pytest.approx(values["tokens_per_second"] * 6 * 36 / 1e12)
    assert 0.01 < values["memory_gib"] < 100
    assert "mfu" not in values, "a CPU has no peak to compare with"
    assert first["data_loading_share"] == 0


def test_counts_the_tokens_of_all_data_parallel_ranks(runtime):
    runtime.dp_world_size, runtime.world_size = 4, 8
    recorder = Recorder()
    metrics = started(runtime, recorder, log_interval=1, flops_per_token=1e6, peak_flops=1e9)
    train(metrics, 1, 0.01)
    values = recorder.values[0][1]
    assert values["tokens_per_second"] == pytest.approx(400 / values["seconds_per_step"])
    assert values["tflops"] == pytest.approx(values["tokens_per_second"] * 1e6 / 8 / 1e12)
    assert values["mfu"] == pytest.approx(values["tokens_per_second"] * 1e6 / 8 / 1e9)


def test_a_resumed_run_measures_from_its_own_start(runtime):
    recorder = Recorder()
    metrics = started(runtime, recorder, step=10, log_interval=10)
    train(metrics, 20, 0.05)
    assert recorder.started == (10, 25)
    assert recorder.values[0][1]["seconds_per_step"] == pytest.approx(0.005, rel=0.4)


def test_validation_is_neither_a_report_of_speed_nor_training_time(runtime):
    recorder = Recorder()
    metrics = started(runtime, recorder, log_interval=10)
    metrics.ntokens_since_last_log += 100
    with metrics.pause():
        time.sleep(0.2)
    metrics.log(5, {"validation/loss": torch.tensor(2.0)})
    assert recorder.values == [(5, {"validation/loss": 2.0})]
    train(metrics, 10, 0.02)
    assert recorder.values[1][1]["seconds_per_step"] < 0.01
    assert metrics.summary()["train_seconds"] < 0.15
    # A second report of a step, after its tokens were accounted for.
    metrics.log(10, {"validation/loss": 2.0})
    assert recorder.values[2] == (10, {"validation/loss": 2.0})


def test_summary_leaves_the_warm_up_out(runtime):
    metrics = started(runtime, log_interval=1)
    train(metrics, 1, 0.3)
    assert metrics.summary()["tokens_per_second"] == pytest.approx(100 / 0.3, rel=0.3)
    for step in (2, 3, 4):
        train(metrics, step, 0.02)
    summary = metrics.summary()
    assert summary["tokens_per_second"] == pytest.approx(100 / 0.02, rel=0.4)
    assert summary["train_seconds"] == pytest.approx(0.36, rel=0.3)
    assert summary["peak_memory_gib"] > 0
    assert MetricsProcessor().summary()["tokens_per_second"] == 0, "not even started"


def test_a_logger_that_cannot_close_does_not_fail_a_finished_training(runtime, caplog):
    recorder, broken = Recorder(), Recorder(fails_to_close=True)
    metrics = started(runtime, broken, recorder)
    metrics.close()
    metrics.close()
    assert recorder.closed
    assert "could not close the metrics logger" in caplog.text


def test_only_rank_zero_writes(runtime):
    runtime.rank = 1
    recorder = Recorder()
    metrics = started(runtime, recorder, log_interval=1)
    train(metrics, 1, 0)
    metrics.text(1, "sample", "words")
    metrics.close()
    assert (recorder.started, recorder.values, recorder.texts, recorder.closed) == (
        None,
        [],
        [],
        False,
    )


def test_flops_of_trained_frozen_looked_up_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.layer = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 10, bias=False)
            if tie:
                self.head.weight = self.embedding.weight

    assert flops.per_token([Tied(tie=False)]) == 6 * (16 + 40)
    assert flops.per_token([Tied(tie=True)]) == 6 * (16 + 40), "once, not twice"
    frozen = Tied(tie=False)
    frozen.layer.requires_grad_(False)
    assert flops.per_token([frozen]) == 4 * 16 + 6 * 40
    assert flops.per_token([Tied(tie=False).to("meta")]) == 6 * (16 + 40)
    assert flops.attention_per_token(num_layers=2, hidden_size=4, seq_len=8) == 12 * 2 * 4 * 8


@pytest.mark.parametrize(
    "kind, experts, of_a_token",
    [
        ("mixtral", 2 * 4 * 3 * 32 * 48, 2),
        ("qwen2_moe", 2 * 4 * 3 * 32 * 24, 2),
        ("qwen3_moe", 2 * 4 * 3 * 32 * 24, 2),
        ("olmoe", 2 * 4 * 3 * 32 * 48, 2),
        ("granitemoe", 2 * 4 * 3 * 32 * 48, 2),
        ("qwen3_next", 2 * 4 * 3 * 32 * 24, 2),
        ("deepseek_v3", 4 * 3 * 32 * 24, 2),  # the first layer is dense
        ("gpt_oss", 2 * 4 * (3 * 32 * 48 + 2 * 48 + 32), 2),  # with biases
    ],
)
def test_of_routed_experts_those_of_a_token_count(kind, experts, of_a_token):
    changes = CAUSAL[kind] | {"tie_word_embeddings": False}
    model = from_config(config(kind, changes))
    total, active = flops.parameters([model])
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == experts * (4 - of_a_token) // 4
    looked_up = model.get_input_embeddings().weight.numel()
    assert flops.per_token([model]) == 6 * (active - looked_up)


@pytest.mark.parametrize("quantize", [None, nf4])
def test_adapters_of_routed_experts_count_as_these_do(quantize):
    def model(**changes):
        return from_config(config("mixtral", CAUSAL["mixtral"]), **changes)

    lora = partial(apply_adapter, config=LoraConfig(r=8, target_modules="all-linear"))
    adapted = model(adapter=lora, quantize=quantize)
    sizes = {name: p.numel() for name, p in adapted.named_parameters() if "lora_" in name}
    added, of_experts = sum(sizes.values()), sum(n for k, n in sizes.items() if "experts" in k)
    bare, found = flops.parameters([model()]), flops.parameters([adapted])
    assert of_experts and found[0] == bare[0] + added
    assert found[1] == bare[1] + added - of_experts // 2  # 2 of 4 experts


def test_the_number_of_active_parameters_is_logged(runtime, caplog):
    caplog.set_level("INFO")
    model = from_config(config("mixtral", CAUSAL["mixtral"]))
    metrics = MetricsProcessor([])
    metrics.start(model_parts=[model], max_steps=1, runtime=runtime)
    total, active = flops.parameters([model])
    assert f"{total:,} parameters, {active:,} of them active for a token" in caplog.text
    dense = from_config(config("llama", CAUSAL["llama"]))
    caplog.clear()
    metrics.start(model_parts=[dense], max_steps=1, runtime=runtime)
    assert "active" not in caplog.text


def test_flops_of_a_packed_weight_are_those_of_what_it_stands_for():
    plain = nn.Sequential(nn.Linear(128, 64, bias=False)).requires_grad_(False)
    expected = flops.per_token([plain])
    assert flops.per_token([nf4(plain.to("meta"))]) == expected == 4 * 128 * 64


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(caplog):
    class Down(Recorder):
        def write(self, step, values):
            raise OSError("the dashboard is down")

    down, good = Down(), Recorder()
    metrics = MetricsProcessor([down, good], log_interval=1)
    metrics._active = [down, good]
    for step in (1, 2, 3):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    assert caplog.text.count("the training goes on without the metrics logger Down") == 1
    assert (
        "metrics are incomplete: without Down since step 1 (OSError: the dashboard" in caplog.text
    )


def test_peaks_are_those_of_the_devices_of_task_plan():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA A100-SXM4-40GB") == flops.peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak("NVIDIA H100 PCIe") is None, "another peak: it is not guessed"
