"""Vision-language models: their logits and gradients are stock's, on any layout, and back again."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageTextToText

from ditty_di import Trainer
from ditty_di.adapters import apply_adapter, initialize
from ditty_di.batch import Batch
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import (
    ImageRenderer,
    ImageTextCollate,
    Loader,
    PackedCollate,
    PackedDataset,
    PaddedCollate,
    PaddingFreeCollate,
    TokenizedDataset,
    records,
)
from ditty_di.export import AdapterExport, HuggingFaceExport
from ditty_di.export.load import open_model
from ditty_di.isolation import rehearse
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models import image_text, processor
from ditty_di.models.towers import language_model_paths, language_path
from ditty_di.models.weights import materialize
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.fits import Degrees, Parts, fits
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.parallelize.stages import split
from ditty_di.quantization import nf4
from ditty_di.runtime import Runtime
from ditty_di.training.step import TrainStep
from tests import warm
from tests.checkpoint import ranks
from tests.models import image_text as tiny
from tests.models.tiny import fill

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


class Case:
    """One family: its folder, its processor and its examples."""

    def __init__(self, folder, family, data):
        self.base = str(tiny.save(folder / family, family))
        self.processor = processor.from_pretrained(self.base)
        renderer = ImageRenderer(self.processor.tokenizer, processor=self.processor, max_tokens=128)
        source = records(data, validation_fraction=0)
        self.examples = TokenizedDataset(source, renderer, cache_dir=folder / "cache")

    def collate(self, inner=None):
        return ImageTextCollate(self.processor, inner or PaddedCollate(pad_id=0))

    def batch(self, *rows, inner=None):
        return self.collate(inner)([self.examples[row] for row in rows])

    def model(self, **options):
        model = image_text.from_pretrained(self.base, **options)
        return fill(model, self.base, init_missing=initialize)

    def stock(self):
        return AutoModelForImageTextToText.from_pretrained(self.base).eval()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_text")
    data = tiny.examples(folder / "data")
    return {family: Case(folder, family, data) for family in tiny.FAMILIES}


def logits(model, inputs):
    inputs = dict(inputs)
    with torch.no_grad():
        return model(inputs.pop("input"), use_cache=False, **inputs).logits


# -- before training -------------------------------------------------------------------------------


@FAMILIES
def test_the_logits_are_those_of_stock_transformers_on_its_own_inputs(cases, family):
    """Inputs are made by the stock processor from the conversation, not by our collate function."""
    case = cases[family]
    stock, model = case.stock(), case.model()
    inputs, _ = case.batch(1)  # two images
    text = case.processor.tokenizer.decode(inputs["input"][0])
    read = case.examples[1][0]["images"]
    pictures = [tiny.Image.open(path) for path in read]
    template = _prompt(case, 1)
    theirs = dict(case.processor(text=[template], images=pictures, return_tensors="pt"))
    ids = theirs.pop("input_ids")[:, : inputs["input"].shape[1]]
    assert text == case.processor.tokenizer.decode(ids[0])
    kinds = {name: theirs[name][:, : ids.shape[1]] for name in theirs if "type_ids" in name}
    theirs = {**theirs, **kinds, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = stock(input_ids=ids, **theirs).logits
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)


def _prompt(case, line):
    """The conversation of a line, as the stock chat template renders it."""
    folder = case.examples[1][0]["images"][0].rpartition("/")[0]
    with open(f"{folder}/train.jsonl") as file:
        messages = json.loads(file.readlines()[line])["messages"]
    return case.processor.tokenizer.apply_chat_template(messages, tokenize=False)


@FAMILIES
def test_rows_with_any_number_of_images_are_as_each_alone(cases, family):
    case = cases[family]
    model, (inputs, labels) = case.model(), case.batch(0, 1, 2, 3)
    together = logits(model, inputs)
    for row in range(4):
        alone, own = case.batch(row)
        length = len(case.examples[row][1])
        found = logits(model, alone)[0, :length]
        assert torch.allclose(together[row, :length], found, atol=1e-5)
        assert torch.equal(labels[row, :length], own[0, :length])


@FAMILIES
def test_image_tokens_are_never_learned(cases, family):
    case = cases[family]
    images = torch.tensor(_image_ids(case))
    _, labels = case.batch(0, 1, 2, 3)
    assert not torch.isin(labels, images).any()
    assert (labels >= 0).any(1).all()
    source = records(_lines(case), validation_fraction=0)
    renderer = ImageRenderer(case.processor.tokenizer, processor=case.processor)
    whole = TokenizedDataset(source, renderer, loss_mask="no_mask", cache_dir=case.base + "-cache")
    assert not any(torch.isin(whole[i][1], images).any() for i in range(len(whole)))
    assert (whole[1][1] >= 0).sum() > (case.examples[1][1] >= 0).sum()


def _image_ids(case):
    return [i for i in case.processor.image_token_ids if i is not None]


def _lines(case):
    return case.examples[1][0]["images"][0].rpartition("/")[0] + "/train.jsonl"


# -- gradients -------------------------------------------------------------------------------------


def step_gradients(model, batches, runtime):
    """The gradients of one optimizer step over micro-batches, by the trainer's own step."""
    loss_fn = CrossEntropyLoss(output="logits")
    step = TrainStep(
        parts=ModelParts([model]),
        loss_fn=loss_fn,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        runtime=runtime,
    )
    batches = [Batch.of(batch) for batch in batches]
    step.forward_backward(batches, sum(loss_fn.num_valid(batch) for batch in batches))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, batches):
    num_valid = sum((labels >= 0).sum() for _, labels in batches)
    for inputs, labels in batches:
        given = dict(inputs)
        found = model(given.pop("input"), use_cache=False, **given).logits
        loss = F.cross_entropy(found.flatten(0, 1), labels.flatten(), reduction="sum") / num_valid
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **bounds):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6, **bounds), name


@FAMILIES
def test_the_gradients_of_a_step_are_those_of_a_hand_written_loop(cases, family, runtime):
    """Of every parameter, of tower and projector too; a batch without images changes none."""
    case = cases[family]
    batches = [case.batch(0, 1), case.batch(2), case.batch(3)]
    found = step_gradients(case.model().train(), batches, runtime)
    expected = by_hand(case.stock().train(), batches)
    assert_same(found, expected)
    tower = [name for name in found if not language_model_paths(case.model())(name)]
    assert any(found[name].abs().max() > 0 for name in tower)
    alone = by_hand(case.stock().train(), [case.batch(2)])
    assert all(alone[name].abs().max() == 0 for name in tower if "lm_head" not in name)


@FAMILIES
def test_the_gradients_of_lora_are_those_of_stock_peft(cases, family, runtime):
    case = cases[family]
    config = LoraConfig(r=4, target_modules="all-linear")
    model = case.model(adapter=partial(apply_adapter, config=config))
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    language = language_path(model)
    assert adapted and all(name.startswith(f"{language}.") for name in adapted)

    layers = sorted(
        {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in adapted}
    )
    theirs = get_peft_model(case.stock(), LoraConfig(r=4, target_modules=layers))
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:  # peft begins with zeros
                values[name].normal_(std=0.1)
                parameter.copy_(values[name])
    batches = [case.batch(0, 1), case.batch(2, 3)]
    assert_same(step_gradients(model.train(), batches, runtime), by_hand(theirs.train(), batches))


@FAMILIES
def test_a_part_can_be_frozen_by_name_and_the_tower_is_not_quantized(cases, family):
    case = cases[family]
    whole = case.model()
    parts = {name.split(".")[1] for name, _ in whole.named_parameters()}
    tower = next(p for p in ("vision_model", "visual", "vision_tower") if p in parts)
    frozen = image_text.from_pretrained(case.base, freeze=[tower])
    assert {
        f".{tower}." in name for name, p in frozen.named_parameters() if not p.requires_grad
    } == {True}
    small = image_text.from_pretrained(case.base, quantize=nf4)
    packed = [path for path, layer in small.named_modules() if hasattr(layer, "qweight")]
    assert packed and all(language_model_paths(small)(path) for path in packed)
    more = image_text.from_pretrained(case.base, quantize=partial(nf4, include=[tower]))
    assert any(hasattr(m, "qweight") for path, m in more.named_modules() if f".{tower}." in path)
    with pytest.raises(ValueError, match=r"no parameter .* its parts are .*model\."):
        image_text.from_pretrained(case.base, freeze=["tower"])


# -- several documents in a row --------------------------------------------------------------------


def packed_logits(case, model):
    """Pairs (logits in a packed row, logits alone) of every example."""
    packed = PackedDataset(case.examples, seq_len=96)
    inputs, _ = case.collate(PackedCollate())([packed[row] for row in range(len(packed))])
    found, pairs = logits(model, inputs), []
    for row in range(len(packed)):
        at = 0
        for member in packed.members(row):
            length = len(case.examples[member][1])
            alone = logits(model, case.batch(member)[0])[0, :length]
            pairs.append((found[row, at : at + length], alone))
            at += length
    return pairs


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_packed_and_padding_free_documents_are_as_each_alone(cases, family):
    """Positions of Qwen2.5-VL are of time, height and width: those of each document restart."""
    case = cases[family]
    model = case.model()
    for found, alone in packed_logits(case, model):
        assert torch.allclose(found, alone, atol=1e-5)
    inputs, _ = case.batch(0, 1, 2, 3, inner=PaddingFreeCollate(pad_id=0))
    alone = [pair for pair in packed_logits(case, model)]
    at, found = 0, logits(model, inputs)[0]
    for row in range(4):
        length = len(case.examples[row][1])
        expected = logits(model, case.batch(row)[0])[0, :length]
        assert torch.allclose(found[at : at + length], expected, atol=1e-5)
        at += length


def test_a_model_whose_images_are_seen_otherwise_in_packed_rows_is_refused_by_task_check(cases):
    """Gemma 3 looks up image blocks of its sliding windows by position, which restarts."""
    case = cases["gemma3"]
    slots = {
        "loss_fn": CrossEntropyLoss(output="logits"),
        "dataloader.collate_fn": case.collate(PaddingFreeCollate(pad_id=0)),
        "dataloader.dataset.seq_len": None,
        "model": image_text.from_pretrained(case.base),
    }
    with pytest.raises(
        ValueError, match=r"gemma3: documents with images differ .* batching=padded"
    ):
        rehearse(slots.get)
    for family in ("smolvlm", "qwen2_5_vl"):
        model = image_text.from_pretrained(cases[family].base)
        collate = cases[family].collate(PaddingFreeCollate(pad_id=0))
        assert rehearse({**slots, "model": model, "dataloader.collate_fn": collate}.get) == []


# -- layouts, resuming, exports --------------------------------------------------------------------


def sharded_gradients(base, batches, num_valid, freeze):
    """The gradients of one step, each rank with its micro-batches; towers are sharded too."""
    runtime = Runtime(seed=0)
    model = shard(
        image_text.from_pretrained(base, freeze=freeze), parallel_dims=runtime.parallel_dims
    )
    wrapped = [path for path, m in model.named_modules() if isinstance(m, FSDPModule) and path]
    materialize(model, runtime.device)
    model.default_weights(model, device=runtime.device)
    step = TrainStep(
        parts=ModelParts([model.train()]),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        runtime=runtime,
    )
    step.forward_backward([Batch.of(b) for b in batches[runtime.rank]], torch.tensor(num_valid))
    found = {
        name: p.grad.full_tensor().numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    runtime.close()
    return found, wrapped


@FAMILIES
def test_two_ranks_with_fsdp2_give_the_gradients_of_one(cases, family):
    """One rank has a micro-batch without images while the other's tower runs."""
    case = cases[family]
    batches = [[case.batch(0, 3), case.batch(1)], [case.batch(2), case.batch(0)]]
    flat = [batch for own in batches for batch in own]
    num_valid = float(sum((labels >= 0).sum() for _, labels in flat))
    (found, wrapped), _ = ranks.run(sharded_gradients, 2, case.base, batches, num_valid, ())
    expected = by_hand(case.stock().train(), flat)
    assert_same({name: torch.from_numpy(g) for name, g in found.items()}, expected, rtol=1e-4)
    assert any(not language_model_paths(case.model())(path) for path in wrapped)


def train(case, folder, steps, **options):
    return Trainer(
        model=image_text.from_pretrained(case.base, **options),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        dataloader=partial(Loader, case.examples, 2, collate_fn=case.collate()),
        checkpointer=partial(Checkpointer, str(folder), save_interval=2, keep_latest_k=None),
        max_steps=steps,
        global_batch_size=4,
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_resumed_training_is_that_of_one_run(cases, family, tmp_path):
    case = cases[family]
    options = {
        "freeze": ["visual"],
        "adapter": partial(apply_adapter, config=LoraConfig(r=2, target_modules="all-linear")),
    }
    whole = train(case, tmp_path / "whole", 4, **options).train()["objective"]
    train(case, tmp_path / "part", 2, **options).train()
    assert train(case, tmp_path / "part", 4, **options).train()["objective"] == whole


@FAMILIES
def test_an_export_opens_in_stock_with_its_processor_and_equal_logits(cases, family, tmp_path):
    case = cases[family]
    model, (inputs, _) = case.model(), case.batch(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    tokenizer = case.processor.tokenizer
    whole = HuggingFaceExport(tokenizer, str(tmp_path / "whole"), processor=case.processor)
    whole.prepare([model])
    whole([model])
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(opened, inputs), logits(model, inputs))
    assert torch.equal(
        logits(open_model(str(tmp_path / "whole")).eval(), inputs), logits(model, inputs)
    )
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoProcessor" in card
    again = processor.from_pretrained(str(tmp_path / "whole"))
    assert again.to_dict() == case.processor.to_dict()  # settings for videos, too
    assert again.chat_template == case.processor.chat_template

    adapter = partial(apply_adapter, config=LoraConfig(r=2, target_modules="all-linear"))
    adapted = case.model(adapter=adapter)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    AdapterExport(tokenizer, str(tmp_path / "adapter"), processor=case.processor)([adapted])
    stock = PeftModel.from_pretrained(case.stock(), tmp_path / "adapter").eval()
    assert torch.equal(logits(stock, inputs), logits(adapted, inputs))


@FAMILIES
def test_every_parallelism_that_splits_the_model_is_refused_in_a_sentence(cases, family):
    model = image_text.from_pretrained(cases[family].base)
    parts = Parts(model, CrossEntropyLoss(output="logits"), parallelize, split)
    (said,) = fits(parts, Degrees(pp=2))
    assert said == (
        "runtime.pp=2: a model that reads images has a tower beside its language model, and stages "
        "are cut from one list of blocks; write runtime.pp=1"
    )
    for name in ("tp", "cp"):
        problems = fits(parts, Degrees(**{name: 2}))
        assert any(f"write runtime.{name}=1" in text and "tower" in text for text in problems)
    assert fits(parts, Degrees(dp_shard=2)) == []


# -- the experiment --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_experiment_learns_to_name_digits_and_answers_about_a_picture(tmp_path):
    def run(*arguments):
        env = {**os.environ, "DITTY_DI_CACHE": str(tmp_path / "cache")}
        done = warm.run(["-m", "ditty_di", *arguments], cwd=tmp_path, env=env)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    run("+experiment=vision_language", "run=run", "max_steps=200")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["validation/exact_match"] > 0.9

    pictures = tmp_path / "cache" / "examples" / "digit-pictures-v1"
    lines = (pictures / "val.jsonl").read_text().splitlines()[:8]
    asked = [json.loads(line) for line in lines]
    expected = [record.pop("output") for record in asked]
    (pictures / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    run("run=run", "task=generate", f"prompts={pictures}/asked.jsonl", "output=answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = [answer["text"].strip() == name for answer, name in zip(answers, expected, strict=True)]
    assert sum(right) >= 7
