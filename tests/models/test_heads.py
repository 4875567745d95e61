"""Classifiers, encoders and masked language models of stock checkpoints, with new heads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ditty_di import quantization
from ditty_di.adapters import apply_adapter
from ditty_di.data.collate import EncoderCollate, model_pad_id
from ditty_di.export import AdapterExport, HuggingFaceExport, MergedExport
from ditty_di.export.load import open_model
from ditty_di.models import encoder, masked_lm, sequence_classification, token_classification
from ditty_di.models.weights import materialize, uninitialized
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.decoder import read_decoder
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.data.words import word_tokenizer
from tests.models.families import SIZES
from tests.models.tiny import CPU

LABELS = ["negative", "neutral", "positive"]
#: Bodies, by the class whose files are read.
FAMILIES = {
    "llama": AutoModelForCausalLM,
    "qwen3": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM,
    "distilbert": AutoModelForMaskedLM,
}
TASKS = {
    sequence_classification: AutoModelForSequenceClassification,
    token_classification: AutoModelForTokenClassification,
}


def save(folder, family):
    sizes = {**SIZES, "dim": 32, "hidden_dim": 48, "n_heads": 4, "pad_token_id": 0}
    known = AutoConfig.for_model(family).to_dict().keys()
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    options = {**sizes, **none, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **{k: v for k, v in options.items() if k in known})
    torch.manual_seed(3)
    FAMILIES[family].from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama")


def filled(model):
    materialize(model, CPU)
    model.default_weights(model, device=CPU)
    assert not uninitialized(model)
    return model.eval()


def batch(model):
    """Rows of other lengths, padded as in training."""
    rows = [({"input": torch.arange(5, 5 + n)}, torch.tensor([0])) for n in (9, 3, 6)]
    inputs, _ = EncoderCollate(pad_id=model_pad_id(model))(rows)
    return {"input_ids": inputs["input"], "attention_mask": inputs["attention_mask"]}


def output(model, **inputs):
    with torch.no_grad():
        return model.eval()(**(inputs or batch(model)))


def lora(model):
    return apply_adapter(model, config=LoraConfig(r=4, target_modules="all-linear"))


def moved(model):
    """The model after an update of what is trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.rpartition(".")[2])
def test_a_new_head_on_a_body_of_stock_files_and_back(task, base, tmp_path):
    model = filled(task.from_pretrained(base, labels=LABELS))
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.num_labels == 3
    stock = TASKS[task].from_pretrained(base, num_labels=3)
    heads = {
        name
        for name, p in model.named_parameters()
        if not torch.equal(p, stock.get_parameter(name))
    }
    assert heads and not any(".layer" in name for name in heads), "the body is that of the files"
    assert all("pooler" in name or "classifier" in name or "score" in name for name in heads)
    again = filled(task.from_pretrained(base, labels=LABELS))
    assert all(map(torch.equal, model.parameters(), again.parameters())), "a head of the run's seed"
    # A row alone, without padding, gives the same as in its batch.
    whole, alone = output(model).logits, output(model, input_ids=torch.arange(5, 8)[None]).logits[0]
    in_batch = whole[1] if task is sequence_classification else whole[1, :3]
    assert torch.allclose(in_batch, alone, atol=1e-5)
    HuggingFaceExport(word_tokenizer(), str(tmp_path / "export"))([moved(model)])
    opened = TASKS[task].from_pretrained(tmp_path / "export")
    assert opened.config.label2id == {name: n for n, name in enumerate(LABELS)}
    assert torch.equal(output(opened, **batch(model)).logits, output(model).logits)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{TASKS[task].__name__}.from_pretrained" in card
    assert f"pipeline_tag: {model.pipeline_tag}" in card


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__.rpartition(".")[2])
def test_adapters_and_the_head_are_trained_and_saved_together(task, base, tmp_path):
    model = filled(task.from_pretrained(base, labels=LABELS, adapter=lora))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert all("modules_to_save" in name or "lora_" in name for name in trained)
    plain = filled(task.from_pretrained(base, labels=LABELS))
    assert torch.allclose(output(model).logits, output(plain).logits, atol=1e-6)
    AdapterExport(word_tokenizer(), str(tmp_path / "export"))([moved(model)])
    stock = TASKS[task].from_pretrained(base, num_labels=3)
    opened = PeftModel.from_pretrained(stock, tmp_path / "export")
    assert torch.allclose(output(opened, **batch(model)).logits, output(model).logits, atol=1e-6)
    said = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert said["task_type"] == model.head_task
    with pytest.raises(ValueError, match="give no text"):
        open_model(str(tmp_path / "export"))
    with pytest.raises(ValueError, match="merged into language models only"):
        MergedExport(word_tokenizer(), str(tmp_path / "merged")).check(model)


def test_a_quantized_body_keeps_its_new_head(llama):
    model = sequence_classification.from_pretrained(
        llama, labels=LABELS, quantize=quantization.nf4, adapter=lora
    )
    filled(model)
    assert output(model).logits.shape == (3, 3)
    heads = [p for name, p in model.named_parameters() if "score.modules_to_save" in name]
    assert [tuple(p.shape) for p in heads] == [(3, 32)] and heads[0].dtype == torch.float32


def test_embeddings_and_hidden_tokens_are_those_of_stock(base, tmp_path):
    model = filled(encoder.from_pretrained(base))
    stock = AutoModel.from_pretrained(base)
    states = [output(one, **batch(model)).last_hidden_state for one in (model, stock)]
    assert torch.equal(*states)
    unused = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith("pooler.") for name in unused)
    HuggingFaceExport(word_tokenizer(), str(tmp_path / "export"))([model])
    opened = AutoModel.from_pretrained(tmp_path / "export")
    assert torch.equal(output(opened, **batch(model)).last_hidden_state, states[0])
    if model.config.model_type in ("llama", "qwen3"):
        with pytest.raises(ValueError, match=r"no model of type .* for its AutoModelForMaskedLM"):
            masked_lm.from_pretrained(base)
        return
    model, stock = (
        filled(masked_lm.from_pretrained(base)),
        AutoModelForMaskedLM.from_pretrained(base),
    )
    assert torch.equal(*(output(one, **batch(model)).logits for one in (model, stock)))


def test_what_a_classifier_needs_and_lacks_is_said(llama, tmp_path):
    model = sequence_classification.from_pretrained(llama, labels=LABELS, pad_token_id=None)
    with pytest.raises(ValueError, match="no pad_token_id, by which a classifier finds the last"):
        model_pad_id(model)
    trained = filled(sequence_classification.from_pretrained(llama, labels=LABELS))
    HuggingFaceExport(word_tokenizer(), str(tmp_path / "two"))([trained])
    with pytest.raises(ValueError, match=r"\[3, 32\] there, \[2, 32\] in the model"):
        filled(sequence_classification.from_pretrained(tmp_path / "two", labels=["a", "b"]))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification, which give no text"):
        open_model(str(tmp_path / "two"))


def test_stages_would_not_find_the_last_token(llama):
    text, token = (task.from_pretrained(llama, labels=LABELS) for task in TASKS)
    assert (
        "a classifier of texts cannot be cut into stages: its head finds the last token"
        in read_decoder(text).problems[0]
    )
    assert read_decoder(token).problems == []


def heads_of_ranks(folder):
    """The parameters of new heads, with and without adapters, whole."""
    runtime = Runtime(seed=4)
    found = {}
    for name, transform in (("full", None), ("lora", lora)):
        model = sequence_classification.from_pretrained(folder, labels=LABELS, adapter=transform)
        model = shard(model, parallel_dims=runtime.parallel_dims)
        materialize(model, runtime.device)
        model.default_weights(model, device=runtime.device)
        for key, p in model.named_parameters():
            found[f"{name}.{key}"] = p.full_tensor() if hasattr(p, "full_tensor") else p
    runtime.close()
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def test_a_new_head_begins_alike_on_one_rank_and_two(tmp_path):
    folder = save(tmp_path, "bert")
    (one,), (two, _) = ranks.run(heads_of_ranks, 1, folder), ranks.run(heads_of_ranks, 2, folder)
    assert any("classifier.modules_to_save" in name for name in one) and one.keys() == two.keys()
    for name, value in one.items():
        assert (value == two[name]).all(), name
