"""The base that ships: small, whole, and better than chance on text it has not seen."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ditty_di.assets import base
from ditty_di.batch import Batch
from ditty_di.data import TokenDataset, tokenize
from ditty_di.data.reading.python_code import python_code
from ditty_di.losses import CrossEntropyLoss


def test_it_is_small():
    assert sum(f.stat().st_size for f in Path(base()).glob("*.safetensors")) < 3_000_000


@torch.no_grad()
def test_it_beats_a_random_model_by_far_on_modules_that_were_held_out(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base())
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32).eval()
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    held_out = python_code().validation
    rows = TokenDataset(tokenize(held_out, tokenizer, cache_dir=tmp_path), seq_len=512)
    chosen = [rows[i] for i in range(0, len(rows), len(rows) // 16)]
    ids = torch.stack([row[0]["input"] for row in chosen])
    labels = torch.stack([row[1] for row in chosen])
    loss = CrossEntropyLoss(output="logits")
    batch, count = Batch({"input": ids}, labels), torch.tensor(labels.numel())
    trained, chance = (float(loss(m(ids), batch, count)[0]) for m in (model, random))
    assert chance > math.log(len(tokenizer)) - 0.1
    assert trained < 3.3
