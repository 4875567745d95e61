"""Models whose files hold other tensors than they do: two ranks read what one reads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ditty_di.adapters import apply_adapter
from ditty_di.adapters import initialize as initialize_adapters
from ditty_di.export import AdapterExport, HuggingFaceExport
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.deferred import Deferred
from ditty_di.models.pretrained import Pretrained
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.quantization import nf4
from ditty_di.runtime import Runtime
from ditty_di.training.setup import setup_model
from tests.checkpoint import ranks
from tests.models.families import CAUSAL, SEQ2SEQ, config
from tests.models.test_families import logits, save
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import fill

#: Merged experts, renamed tensors, positions and a buffer that the files do not have.
READ = ("mixtral", "gpt_neox", "falcon_h1", "jamba")
#: Tensors that only the constructor makes, and experts of three dimensions.
DRAWN = ("mixtral", "apertus", "openai-gpt")

LORA = partial(apply_adapter, config=LoraConfig(r=4, target_modules="all-linear"))


def placed(model, weights, runtime):
    (part,) = setup_model(
        model,
        runtime=runtime,
        weights=weights,
        parallelize_fn=shard,
        pipeline_fn=None,
    ).modules
    return part


def whole(model):
    """Parameters and buffers, as numbers that travel between processes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().double().numpy()
        for name, t in tensors.items()
    }


def read_and_draw(folder):
    """What each rank has of each model; rank 0 exports two of them."""
    runtime, largest = Runtime(), 0
    into = Deferred.copy_into

    def watched(self, out, index=None):
        nonlocal largest
        if self.ndim == 3 and self.shape[0] > 1:  # merged experts, not one of them
            largest = max(largest, out.numel() / self.shape.numel())
        into(self, out, index)

    Deferred.copy_into = watched  # type: ignore[method-assign]
    found = {}
    for name in (*READ, "marian"):
        ours = seq2seq if name == "marian" else causal_lm
        model = placed(ours.from_pretrained(folder / name), Pretrained(folder / name), runtime)
        found[name] = whole(model)
        if name in ("mixtral", "marian"):
            HuggingFaceExport(tokenizer(97), str(folder / f"{name}-export"))([model])
    weights = Pretrained(folder / "gpt_neox", init_missing=initialize_adapters)
    model = causal_lm.from_pretrained(folder / "gpt_neox", quantize=nf4, adapter=LORA)
    found["nf4"] = whole(placed(model, weights, runtime))
    for name in DRAWN:
        weights = partial(initialize, seed=3, init=hugging_face)
        drawn = causal_lm.from_config(config(name, CAUSAL[name]))
        found[f"drawn {name}"] = whole(placed(drawn, weights, runtime))
    runtime.close()
    return found, largest


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in READ:
        save(folder / name, config(name, CAUSAL[name]), "causal")
    save(folder / "marian", config("marian", SEQ2SEQ["marian"]), "seq2seq")
    return folder


def test_two_ranks_read_and_draw_what_one_does_and_export_it(bases):
    ((alone, _),) = ranks.run(read_and_draw, 1, bases)
    (one, share), (other, _) = ranks.run(read_and_draw, 2, bases)
    for name, tensors in alone.items():
        assert tensors.keys() == one[name].keys()
        for key, value in tensors.items():
            assert (value == one[name][key]).all() and (value == other[name][key]).all(), key
    assert share == 0.5, "a rank read experts that another one holds"
    for name, kind, auto in (
        ("mixtral", "causal", AutoModelForCausalLM),
        ("marian", "seq2seq", AutoModelForSeq2SeqLM),
    ):
        before, after = (auto.from_pretrained(bases / f) for f in (name, f"{name}-export"))
        assert torch.equal(logits(before, kind), logits(after, kind))


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_adapters_on_converted_tensors_fit_the_base_of_transformers(bases, name, tmp_path):
    model = causal_lm.from_pretrained(bases / name, adapter=LORA)
    fill(model, bases / name, init_missing=initialize_adapters)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    AdapterExport(tokenizer(97), str(tmp_path / "adapter"))([model])
    base = AutoModelForCausalLM.from_pretrained(bases / name)
    plain = logits(base, "causal")
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(stock, "causal"), logits(model, "causal"), rtol=0, atol=1e-5)
    assert not torch.equal(logits(stock, "causal"), plain)
