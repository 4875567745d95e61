"""Generation configs: read as stock reads them, repaired where stock would refuse to save them."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ditty_di.adapters import apply_adapter, initialize
from ditty_di.export import AdapterExport, HuggingFaceExport, MergedExport
from ditty_di.export.load import open_model
from ditty_di.models import causal_lm
from ditty_di.models.files import ModelFiles
from ditty_di.models.generation import read, savable
from ditty_di.models.pretrained import Pretrained
from ditty_di.tasks.loading import ready
from tests.export import cases
from tests.tasks.conftest import tokenizer

__all__ = ["tokenizer"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "values, reset",
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature", "top_p"}),
        ({"typical_p": 0.5, "top_k": 7, "min_p": 0.1}, {"typical_p", "top_k", "min_p"}),
        ({"epsilon_cutoff": 0.1, "eta_cutoff": 0.1}, {"epsilon_cutoff", "eta_cutoff"}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping", "length_penalty"}),
        ({"output_scores": True}, {"output_scores"}),
        ({"pad_token_id": -1}, {"pad_token_id"}),
        ({"temperature": 0.6, "do_sample": True, "top_k": 7}, set()),
        ({"num_beams": 4, "early_stopping": True, "num_return_sequences": 2}, set()),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_only_what_contradicts_the_rest_is_reset(values, reset, tmp_path):
    config = GenerationConfig(eos_token_id=[0, 3], repetition_penalty=1.5, **values)
    repaired, found = savable(config)
    assert found == {name: values[name] for name in reset}
    repaired.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 3] and saved["repetition_penalty"] == 1.5
    assert {n: saved.get(n) for n in values} == {
        n: None if n in reset else value for n, value in values.items()
    }


@pytest.mark.parametrize(
    "values",
    [
        {"num_return_sequences": 4},
        {"early_stopping": "sometimes"},
        {"max_new_tokens": 0},
        {"cache_implementation": "none such"},
        {"suppress_tokens": [9], "forced_eos_token_id": 9},
        {"streamer": None},
    ],
    ids=str,
)
def test_what_stock_refuses_to_read_is_left_out(values, tmp_path, caplog):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 3, **values}))
    with pytest.raises(ValueError):
        GenerationConfig.from_pretrained(tmp_path)
    found = read(ModelFiles(tmp_path))
    assert found.eos_token_id == 3
    assert str(file) in caplog.text and list(values)[-1] in caplog.text


def test_an_old_config_says_how_to_generate(tokenizer, tmp_path):
    """Where there is no generation_config.json, config.json counts, as for stock."""
    base = cases.llama(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").unlink()
    file = tmp_path / "config.json"
    changes = {"num_beams": 4, "early_stopping": True, "eos_token_id": 5}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    stock = AutoModelForCausalLM.from_pretrained(base).generation_config
    ours = causal_lm.from_pretrained(base, tokenizer=tokenizer).generation_config
    for one in (stock, ours):
        assert (one.num_beams, one.early_stopping, one.eos_token_id) == (4, True, 5)


def chat_tokenizer(base):
    chat = AutoTokenizer.from_pretrained(base)
    chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    chat.chat_template = CHATML
    return chat


@pytest.mark.parametrize("kind", ["model", "adapter", "merged"])
def test_every_export_has_a_config_that_stock_saves(kind, tokenizer, tmp_path, capsys):
    base = cases.llama(tmp_path / "base", tokenizer)
    values = {"temperature": 0.6, "do_sample": False, "eos_token_id": 7, "bos_token_id": 4}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(values))
    chat = chat_tokenizer(base)
    adapter = None if kind == "model" else partial(apply_adapter, config=LoraConfig(r=2))
    model = causal_lm.from_pretrained(base, tokenizer=chat, adapter=adapter)
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [7, end], "a run stops there too"
    ready(model, Pretrained(base, init_missing=initialize), torch.device("cpu"))
    exports = {"model": HuggingFaceExport, "adapter": AdapterExport, "merged": MergedExport}
    path = tmp_path / "out"
    exports[kind](chat, str(path))([model])
    assert "left out temperature=0.6" in capsys.readouterr().out
    saved = json.loads((path / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["bos_token_id"]) == ([7, end], 4)
    assert "temperature" not in saved
    opened = open_model(str(path))
    assert opened.generation_config.eos_token_id == [7, end]
    if kind != "adapter":
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kind", ["model", "adapter", "merged"])
def test_a_base_tuned_on_a_conversation_stops_where_the_turn_ends(kind, tokenizer, tmp_path):
    """Learnt by heart: the run, and the folder without this tokenizer's help, say no more."""
    base = cases.llama(tmp_path / "base", tokenizer, initializer_range=0.05)
    chat = chat_tokenizer(base)
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
    adapter = None if kind == "model" else partial(apply_adapter, config=lora)
    model = causal_lm.from_pretrained(base, tokenizer=chat, adapter=adapter)
    ready(model, Pretrained(base, init_missing=initialize), torch.device("cpu"))
    messages = [{"role": "user", "content": "Document 3"}, {"role": "assistant", "content": "says"}]
    ids = chat.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    asked = chat.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    prompt = chat(asked, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for _ in range(300):
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.05
    exports = {"model": HuggingFaceExport, "adapter": AdapterExport, "merged": MergedExport}
    exports[kind](chat, str(tmp_path / "out"))([model.eval()])
    new = prompt.shape[1]
    for one in (model, open_model(str(tmp_path / "out"))):
        said = one.generate(input_ids=prompt, max_new_tokens=20, do_sample=False, pad_token_id=1)
        assert chat.decode(said[0, new:]) == "says<|im_end|>"
