"""Hybrid models of transformers from files to files: trained, resumed, exported, generating."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from ditty_di import Trainer
from ditty_di.adapters import apply_adapter
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import Loader, PackedCollate
from ditty_di.export import AdapterExport, HuggingFaceExport
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models import causal_lm
from ditty_di.quantization import nf4
from tests.models.families import CAUSAL, HYBRID, RARE, config
from tests.models.test_families import logits, save
from tests.models.test_hugging_face import tokenizer

LORA = partial(apply_adapter, config=LoraConfig(r=2, target_modules="all-linear"))
ROWS = [
    ({"input": (torch.arange(16) * 7 + n) % 90 + 3,
      "position_ids": torch.cat([torch.arange(10), torch.arange(6)])},
     (torch.arange(16) * 5 + n) % 90 + 3)
    for n in range(4)
]  # fmt: skip


#: The same layers as others, in ten times the time.
SLOW = ("bailing_hybrid", "zamba")
BASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HYBRID]


@pytest.fixture(params=BASES, scope="module")
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, config(request.param, {**CAUSAL, **RARE}[request.param]), "causal")
    return folder


def trained(base, runtime, *, steps, folder=None, **options):
    """Trained on packed rows."""
    trainer = Trainer(
        model=causal_lm.from_pretrained(base, **options),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        dataloader=partial(Loader, ROWS, micro_batch_size=2, collate_fn=PackedCollate()),
        checkpointer=folder and partial(Checkpointer, folder, save_interval=1),
        max_steps=steps,
        runtime=runtime,
    )
    trainer.train()
    return trainer.model_parts[0]


def test_a_full_training_resumes_exactly_and_its_export_opens_in_stock(base, tmp_path, runtime):
    expected = trained(base, runtime, steps=2).state_dict()
    trained(base, runtime, steps=1, folder=tmp_path / "checkpoints")
    model = trained(base, runtime, steps=2, folder=tmp_path / "checkpoints")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    HuggingFaceExport(tokenizer(97), str(tmp_path / "export"))([model])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(stock, "causal"), logits(model, "causal"))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, plain = (
        stock.generate(torch.arange(3, 9)[None], use_cache=on, **options) for on in (True, False)
    )
    assert torch.equal(cached, plain)


def test_an_adapter_trains_and_opens_in_stock_peft(base, tmp_path, runtime):
    model = trained(base, runtime, steps=2, adapter=LORA)
    AdapterExport(tokenizer(97), str(tmp_path))([model])
    stock = AutoModelForCausalLM.from_pretrained(base)
    before = logits(stock, "causal")
    after = logits(PeftModel.from_pretrained(stock, tmp_path), "causal")
    # Of adapted experts stock adds the update to the weights.
    torch.testing.assert_close(after, logits(model, "causal"), rtol=0, atol=1e-5)
    assert not torch.allclose(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "recurrent_gemma"])
def test_an_adapter_trains_on_a_base_of_4_bits(name, tmp_path, runtime):
    """Mamba and RecurrentGemma read weights of layers that they do not call."""
    save(tmp_path, config(name, CAUSAL[name]), "causal")
    quantize = partial(nf4, block_size=8)
    model = trained(tmp_path, runtime, steps=2, adapter=LORA, quantize=quantize)
    moved = [p for n, p in model.named_parameters() if "lora_B" in n and p.any()]
    assert moved and all(p.isfinite().all() for p in moved)
