"""The card tells what the run's files tell, nothing that is nobody's business, and is valid."""

import json

import pytest
from huggingface_hub import ModelCard

from ditty_di.export.card import write_card
from ditty_di.export.run_info import RunInfo

CONFIG = """
seed: 7
global_batch_size: 32
epochs: null
run: /home/me/outputs/x
data:
  path: /home/me/secret_project/pairs
  train:
    _target_: ditty_di.data.TokenizedDataset
    records: ${data.records}
    loss_mask: output_only
  records: {_target_: ditty_di.data.records, path: '${data.path}', hf_token: hf_abcdef}
quantize: {_target_: ditty_di.quantization.nf4, _partial_: true}
adapter: {_target_: ditty_di.adapters.peft, config: {_target_: peft.LoraConfig, r: 8}}
optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.002, betas: [0.9, 0.95]}
weights: {_target_: ditty_di.models.pretrained.Pretrained, path: '${model.path}', revision: abc}
model: {_target_: x, path: org/base}
logger: {loggers: {wandb: {api_key: hf_123456}}}
"""
METRICS = """\
{"step": 0, "validation/loss": 3.5}
{"step": 1, "loss": 4.0, "grad_norm": 1.0}
not json
{"step": 20, "loss": 2.0}
{"step": 20, "name": "sample/0", "text": "x"}
{"step": 20, "validation/loss": 1.25}
{"step": 2"""


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text(CONFIG)
    (run / "metrics.jsonl").write_text(METRICS)
    packages = {"torch": "2.13.0", "transformers": "5.23", "leftpad": "1"}
    (run / "environment.json").write_text(json.dumps({"python": "3.11.9", "packages": packages}))
    return str(run)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "export").mkdir()
    return tmp_path / "export"


def card(folder, record, **options):
    write_card(folder, record, **options)
    return ModelCard.load(folder / "README.md")


def test_everything_that_a_run_knows(folder, run):
    record = {"kind": "adapter", "base": "org/base", "revision": "abc"}
    made = card(folder, record, run=run, name="me/mine", license="apache-2.0")
    assert made.data.base_model == "org/base" and made.data.library_name == "peft"
    assert made.data.license == "apache-2.0" and made.data.pipeline_tag == "text-generation"
    assert "# mine" in made.text and 'PeftModel.from_pretrained(base, "me/mine")' in made.text
    assert 'from_pretrained("org/base", revision="abc")' in made.text
    for told in (
        "| held-out loss | 3.5000 (step 0) | 1.2500 (step 20) |",
        "| training loss | 4.0000 (step 1) | 2.0000 (step 20) |",
        "| steps | 20 |",
        "| global batch size | 32 |",
        "| seed | 7 |",
        "| optimizer | `AdamW(lr=0.002, betas=[0.9, 0.95])` |",
        "| adapter | `peft(config=LoraConfig(r=8))` |",
        "| base quantized by | `nf4()` |",
        "`TokenizedDataset(records=records(path=pairs), loss_mask=output_only)`",
        "| torch | 2.13.0 |",
        "| python | 3.11.9 |",
    ):
        assert told in made.text, told
    for untold in ("hf_", "/home", "leftpad", "epochs"):
        assert untold not in made.content, untold


def test_a_merged_model_tells_its_logit_difference(folder, run):
    one = {"max_abs": 0.0123, "mean_abs": 0.001, "kl": 1e-6}
    logit_diff = {"rows": 4, "tokens": 99, "from": {"unmerged": one, "training": one}}
    record = {"kind": "merged", "base": "org/base", "revision": None, "logit_diff": logit_diff}
    made = card(folder, record, run=run)
    assert made.data.library_name == "transformers" and made.data.license is None
    assert (
        "on 99 tokens of 4 rows" in made.text
        and "| unmerged | 0.012 | 0.001 | 1e-06 |" in made.text
    )
    assert (
        "AutoModelForCausalLM.from_pretrained" in made.text
        and "peft" not in made.text.split("## ")[1]
    )


def test_a_run_that_says_nothing(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("a: [")
    (tmp_path / "run" / "environment.json").write_text("[1]")
    (folder / "config.json").write_text('{"is_encoder_decoder": true}')
    for run in (None, str(tmp_path / "nowhere"), str(tmp_path / "run")):
        made = card(folder, {"kind": "model"}, run=run)
        assert made.data.base_model is None and made.data.pipeline_tag == "text2text-generation"
        assert "A model trained from scratch" in made.text and "## Training" not in made.text


def test_a_base_in_a_folder_is_no_metadata(folder, run, tmp_path):
    (tmp_path / "org").mkdir()
    record = {"kind": "adapter", "base": str(tmp_path / "org"), "revision": None}
    made = card(folder, record, run=run)
    assert made.data.base_model is None and "Adapters for `org`" in made.text
    assert str(tmp_path) not in made.content


def test_references_are_followed_but_never_for_ever():
    known = RunInfo(None)
    known.config = {"a": "${b}", "b": "${a}", "c": "${d.e}", "d": {"e": 3}, "f": "${now:%Y}"}
    assert known.at("c") == 3 and known.at("f") == "${now:%Y}" and known.at("d.x.y") is None
    assert known.at("a") is None
