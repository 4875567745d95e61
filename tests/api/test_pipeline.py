"""A pipeline trains as the trainer does that it composes, and says what it cannot do."""

from __future__ import annotations

import json
import math
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ditty_di import Trainer
from ditty_di.api import (
    Data,
    FSDPConfig,
    ModelFactory,
    PeftConfig,
    Pipeline,
    QuantConfig,
    TokenizerFactory,
)
from ditty_di.callbacks import Callback
from ditty_di.data import Loader
from ditty_di.export import HubError
from ditty_di.losses import CrossEntropyCalculator, LossCalculator, LossOutput, MSELoss
from ditty_di.optim import constant, cosine
from ditty_di.processors import PostProcessor, PreProcessor
from tests.api.cases import Block, Losses, net, rows, trained
from tests.models.tiny import save_llama


def pipeline(**options):
    given = {"model_factory": ModelFactory.from_instance(net()), "dataset": rows(), "max_steps": 3}
    return Pipeline(**{**given, **options})


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_it_is_the_trainer_with_these_parts_bit_for_bit():
    losses, model = trained(seed=5, max_steps=5, grad_accum=2)
    pairs = [({"input": x}, y) for x, y in rows()]
    by_hand = net()
    decayed = [p for p in by_hand.parameters() if p.ndim > 1]
    others = [p for p in by_hand.parameters() if p.ndim < 2]
    trainer = Trainer(
        model=by_hand,
        loss_fn=MSELoss(),
        optimizer=lambda named: torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": 0.01},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=1e-2,
        ),
        lr_scheduler=partial(constant, max_steps=5),
        dataloader=partial(Loader, pairs, micro_batch_size=8, seed=5),
        max_steps=5,
        global_batch_size=16,
    )
    assert trainer.train()["objective"] == losses[-1]
    assert same(by_hand, model)
    trainer.close()
    trainer.runtime.close()


def test_accumulated_batches_are_one_large_batch():
    one, _ = trained(batch_size=16)
    four, _ = trained(batch_size=4, grad_accum=4)
    assert four == pytest.approx(one, rel=1e-5)


def test_steps_are_the_optimizers_and_the_shorter_of_both_counts():
    def steps(**options):
        return pipeline(**{"max_steps": None, **options}, batch_size=8).compose()[0].config

    for options, expected in (
        ({"epochs": 2}, 24),
        ({"epochs": 2, "grad_accum": 3}, 8),
        ({"epochs": 0.3}, 4),
        ({"epochs": 2, "max_steps": 5}, 5),
        ({"epochs": 1, "max_steps": 50}, 12),
    ):
        assert steps(**options).training.steps == expected


def test_a_second_run_goes_on_exactly_where_the_first_one_was(tmp_path):
    dropout = nn.Sequential(net(), nn.Dropout(0.5))
    whole, model = trained(model=dropout, output_dir=tmp_path / "whole", max_steps=8)
    again = nn.Sequential(net(), nn.Dropout(0.5))
    first, _ = trained(model=again, output_dir=tmp_path / "parts", max_steps=3)
    other = nn.Sequential(net(seed=9), nn.Dropout(0.5))  # its values come from the checkpoint
    second, resumed = trained(model=other, output_dir=tmp_path / "parts", max_steps=8)
    assert first + second == whole
    assert same(model, resumed)
    trained(model=net(), output_dir=tmp_path / "plain", max_steps=2)
    assert trained(model=net(), output_dir=tmp_path / "plain", max_steps=2)[0] == []
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_without_loading_there_must_be_nothing_to_load(tmp_path):
    trained(output_dir=tmp_path, load_checkpoint=False, max_steps=2)
    with pytest.raises(ValueError, match=r"load_checkpoint=False, but .*step-00000002 is there"):
        trained(output_dir=tmp_path, load_checkpoint=False, max_steps=2)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path):
    trained(output_dir=tmp_path, checkpoint_every=2, max_steps=5)
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert found == ["step-00000004", "step-00000005"]  # the two newest are kept


def test_a_subclass_has_its_data_in_a_method():
    class Own(Pipeline):
        def dataset(self):
            x = torch.stack([x for x, _ in rows()])
            data = torch.utils.data.TensorDataset(x, x[:, :1].sin())
            return DataLoader(data, batch_size=self.batch_size, shuffle=True)

    own = Own(model_factory=ModelFactory.from_instance(net()), max_steps=4, batch_size=8, lr=1e-2)
    assert own.run() is own.trainer.model_parts[0]
    assert own.result["status"] == "finished"
    assert own.result["objective"] == trained(max_steps=4)[0][-1], "the order is the seed's"
    with pytest.raises(ValueError, match=r"pass dataset=, or write a subclass with dataset\(\)"):
        pipeline(dataset=None).run()


class Halved(PreProcessor):
    def process(self, batch, ctx):
        ctx["rows"] = len(batch)
        return batch / 2, ctx


class Target(PostProcessor):
    def process(self, output, ctx):
        ctx["target"] = ctx["original_batch"][0]["input"][:, :1].sin()
        return output, ctx


class Mean(LossCalculator):
    def compute(self, model_output, ctx):
        loss = (self.get_prediction(model_output) - self.get_target(ctx)).square().mean()
        return LossOutput(loss, {"rows": ctx["rows"]})


def test_a_batch_goes_through_processors_to_the_loss():
    """A tensor alone: the target is a postprocessor's."""
    losses = Losses()
    composed = pipeline(
        dataset=[x for x, _ in rows()],
        preprocessors=[Halved()],
        postprocessors=[Target()],
        loss_calculator=Mean(),
        batch_size=8,
        log_every=1,
        metrics_logger=[losses],
    )
    composed.run()
    halves = [(x / 2, y) for x, y in rows()]
    expected = trained(dataset=halves, lr=1e-4, max_steps=3)[0]
    assert losses.values == pytest.approx(expected, rel=1e-6)


def test_without_labels_a_loss_on_them_is_an_error():
    with pytest.raises(ValueError, match=r"ctx.target \[4, 0\]"):
        pipeline(dataset=[x for x, _ in rows()]).run()


def test_contracts_are_checked_when_the_pipeline_is_made():
    class Reads(PreProcessor):
        contract = "0:2:f | ctx.made:1:i64 -> x:2:f"

        def process(self, batch, ctx):
            return batch, ctx

    with pytest.raises(ValueError, match=r"nothing before writes ctx\.made"):
        pipeline(preprocessors=[Reads()])


def test_an_optimizer_and_a_schedule_of_ones_own():
    calls = []

    def schedule(optimizer, *, max_steps):
        calls.append(max_steps)
        return cosine(optimizer, max_steps=max_steps, warmup_steps=1)

    composed = pipeline(optimizer=partial(torch.optim.SGD, lr=0.5), lr_scheduler=schedule)
    composed.run()
    assert type(composed.trainer.optimizer) is torch.optim.SGD
    assert calls == [3]
    for options in ({"lr": 1.0}, {"weight_decay": 0.5}, {"use_8bit_optim": True}):
        with pytest.raises(ValueError, match="configure the default optimizer"):
            pipeline(optimizer=torch.optim.SGD, **options)
    with pytest.raises(TypeError, match="not a built SGD"):
        pipeline(optimizer=torch.optim.SGD(net().parameters())).run()


@pytest.mark.parametrize(
    "options, state",
    [({}, 4), ({"optim_backend": "torchao"}, 1), ({"optim_backend": "bnb"}, 1)],
)
def test_moments_have_the_bits_that_were_asked_for(options, state):
    if options.get("optim_backend") == "bnb":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.Linear(256, 16), nn.Linear(16, 1))
    composed = pipeline(
        model_factory=ModelFactory.from_instance(model), use_8bit_optim=bool(options), **options
    )
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        composed.run()
    moments = composed.trainer.optimizer.state[model[1].weight]
    moment = moments.get("exp_avg", moments.get("state1"))
    assert getattr(moment, "codes", moment).element_size() == state
    groups = composed.trainer.optimizer.param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.01]


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"fp16": True}, torch.float16),
        ({"use_bfloat16": True}, torch.bfloat16),
        ({"accelerator_kwargs": {"mixed_precision": "bf16"}}, torch.bfloat16),
        ({"accelerator_kwargs": {"mixed_precision": "no"}}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_precision_is_of_products_only(options, dtype):
    seen = []
    model = net()
    model.head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    composed = pipeline(model_factory=ModelFactory.from_instance(model), **options)
    composed.run()
    assert set(seen) == {dtype}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert composed.trainer.grad_scaler.is_enabled() == (dtype == torch.float16)
    assert math.isfinite(composed.result["objective"])


def test_sixteen_bits_of_fsdp2_are_scaled_too():
    half = FSDPConfig(transformer_layers=[Block], param_dtype=torch.float16)
    factory = ModelFactory.from_instance(net(), fsdp_config=half)
    composed = pipeline(model_factory=factory)
    composed.run()
    assert composed.trainer.grad_scaler.is_enabled()
    assert composed.trainer.model_parts[0].head.weight.dtype == torch.float32


def test_float8_layers_take_the_place_of_linear_ones():
    model = net()
    composed = pipeline(
        model_factory=ModelFactory.from_instance(model),
        accelerator_kwargs={"mixed_precision": "fp8"},
    )
    composed.run()
    assert type(model.first[0].linear).__name__ == "Float8Linear"
    assert type(model.head) is nn.Linear, "its one output is no multiple of 16"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_steps": None}, "write how long to train"),
        ({"grad_accum": 0}, "grad_accum=0"),
        ({"push_to_hub": True}, "push_to_hub needs output_hub_repo"),
        ({"merge_adapters": True}, "merge_adapters needs a model with peft_config"),
        ({"optim_backend": "adam"}, "optim_backend='adam' is not one of torchao, bnb"),
        ({"fp16": True, "use_bfloat16": True}, "ask for fp16 and bf16; write one"),
        (
            {"fp16": True, "accelerator_kwargs": {"mixed_precision": "fp8"}},
            "ask for fp16 and fp8",
        ),
        ({"accelerator_kwargs": {"mixed_precision": "bf61"}}, "did you mean 'bf16'"),
        ({"accelerator_kwargs": {"split_batches": True}}, "no Accelerator.* split_batches"),
        ({"shuffle_buffer": 1000}, "shuffle_buffer"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_at_once(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        pipeline(**options)


def test_epochs_need_to_know_how_many_rows_there_are():
    class Endless:
        batch_size = 2

        def __iter__(self):
            while True:
                yield {"input": torch.ones(2, 16)}, torch.ones(2, 1)

    with pytest.raises(ValueError, match=r"no dataset to count rows of.*max_steps"):
        pipeline(dataset=Endless(), max_steps=None, epochs=1).run()
    assert pipeline(dataset=Endless()).run() is not None


def test_other_slots_of_the_trainer():
    class Counts(Callback):
        steps = 0

        def on_step_end(self, trainer):
            self.steps += 1

    counts = Counts()
    pipeline(trainer_kwargs={"callbacks": {"counts": counts}}).run()
    assert counts.steps == 3
    with pytest.raises(TypeError, match="validater"):
        pipeline(trainer_kwargs={"validater": None}).run()


@pytest.mark.parametrize("merge", [False, True])
def test_fine_tuning_from_rows_of_text_to_an_export(merge, tmp_path):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ditty_di.data import train_bpe

    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(40)]
    tokenizer = train_bpe(texts, vocab_size=300)
    save_llama(tmp_path / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "base")
    factory = TokenizerFactory.from_pretrained(str(tmp_path / "base"))
    assert factory.build() is factory.build()

    class Tuning(Pipeline):
        def dataset(self):
            return Data(
                dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
                tokenizer=self.tokenizer,
                seed=self.seed,
                batch_size=self.batch_size,
                grad_accum=self.grad_accum,
                group_by_length=True,
            ).prepare([("map", lambda row: self.tokenizer(row["text"]), {})])

    tuning = Tuning(
        model_factory=ModelFactory.from_huggingface(
            str(tmp_path / "base"),
            quant_config=QuantConfig(bits=4),
            peft_config=PeftConfig(r=4, alpha=8, dropout=0.1),
        ),
        tokenizer_factory=factory,
        loss_calculator=CrossEntropyCalculator(output_index="logits"),
        output_dir=tmp_path / "run",
        merge_adapters=merge,
        epochs=4,
        lr=1e-2,
    )
    tuning.run()
    assert tuning.result["step"] == 40
    assert tuning.result["objective"] < math.log(len(tokenizer)) - 0.5
    export = tmp_path / "run" / "export"
    assert (export / "adapter_model.safetensors").exists() is not merge
    AutoTokenizer.from_pretrained(export)
    AutoModelForCausalLM.from_pretrained(export)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000040" / "manifest.json"
    saved = [key for key in json.loads(manifest.read_text())["keys"] if key.startswith("model.")]
    assert saved and all("lora_" in key for key in saved), "the frozen base is in no checkpoint"


def test_a_push_that_cannot_work_is_known_before_training(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    save_llama(tmp_path / "base")
    options = {
        "model_factory": ModelFactory.from_huggingface(str(tmp_path / "base")),
        "output_dir": tmp_path / "run",
        "push_to_hub": True,
    }
    with pytest.raises(HubError, match="no token"):
        pipeline(**options, output_hub_repo="user/name").run()
    with pytest.raises(HubError, match="not a repository's name"):
        pipeline(**options, output_hub_repo="name", hf_hub_token="hf_secret").run()
    assert "HF_TOKEN" not in os.environ
    options["model_factory"] = ModelFactory.from_instance(net())
    with pytest.raises(ValueError, match="push_to_hub is for models of transformers"):
        pipeline(**options, output_hub_repo="user/name").run()
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_cannot_be_made_closes_what_it_opened(tmp_path):
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="push_to_hub is for models of transformers"):
        pipeline(output_dir=tmp_path, push_to_hub=True, output_hub_repo="user/name").run()
    assert not torch.distributed.is_initialized()


def test_a_model_of_transformers_is_exported_as_one(tmp_path):
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path / "base")
    ids = [({"input": torch.arange(6)}, torch.arange(1, 7)) for _ in range(8)]
    model = pipeline(
        model_factory=ModelFactory.from_huggingface(str(tmp_path / "base")),
        dataset=ids,
        loss_calculator=CrossEntropyCalculator(output_index="logits"),
        output_dir=tmp_path / "run",
    ).run()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert torch.equal(stock.lm_head.weight, model.lm_head.weight)
