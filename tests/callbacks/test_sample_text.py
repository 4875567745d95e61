"""Texts of a model while it is trained."""

from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.callbacks import SampleText
from ditty_di.callbacks.sample_text import labels, one_line
from ditty_di.data.loader import Loader
from ditty_di.training.validation import Validator
from tests.distributed.cases import Ragged, make_trainer
from tests.generation.test_sampling import DEVICE, Letters


def test_sample_text_continues_each_prompt():
    table = nn.Embedding.from_pretrained(torch.roll(torch.eye(27), 1, dims=1))
    sample = SampleText(Letters(), ["ab", "x", "y"], max_new_tokens=3, temperature=0)
    texts = sample(forward=lambda inputs: table(inputs["input"]), device=DEVICE)
    assert texts == {"sample/0": "abcde", "sample/1": "xyz", "sample/2": "yz"}
    short = SampleText(Letters(), ["ab"], max_new_tokens=3, temperature=0, echo=False)
    texts = short(forward=lambda inputs: table(inputs["input"]), device=DEVICE)
    assert texts == {"sample/0": "ab -> cde"}


CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    import ditty_di.assets

    made = AutoTokenizer.from_pretrained(ditty_di.assets.base())
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_conversation_is_known_by_what_the_user_says_last(tokenizer, template):
    tokenizer.chat_template = template
    asked = [["What is x?"], ["Hi", "Yes?", "And y\nthen?"], ["Hi", "Yes?", "Hi"]]
    names = ("user", "assistant")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": names[i % 2], "content": text} for i, text in enumerate(turns)],
            tokenize=False,
            add_generation_prompt=True,
        )
        for turns in asked
    ]
    assert labels(prompts, tokenizer) == ["What is x?", "And y", "Hi"]
    assert labels(prompts[:1], tokenizer) == ["What is x?"], "also when it is alone"


def test_a_text_is_known_by_its_first_line_of_its_own(tokenizer):
    head = "Below is an instruction.\n\n### Instruction:\n"
    found = labels([f"{head}{word}\n### Response:\n" for word in ("Add 1", "Add 2")], tokenizer)
    assert found == ["Add 1", "Add 2"]
    assert labels(["\ndef f(x):\n  return x", "def g():\n"], tokenizer) == ["def f(x):", "def g():"]
    assert labels(["same\nlines"] * 2, tokenizer) == ["same", "same"]
    assert labels(["word " * 50, "字" * 150], tokenizer) == [
        "word " * 18 + "word [...]",
        "字" * 94 + " [...]",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n b\r\nc", r"a\n b\n\nc"),
        ("a\n\n\n", "a [3 blank characters]"),
        ("\n" * 40, "[40 blank characters]"),
        ("a ", "a"),
        ("x" * 12, "xxxxxxxxxx [...]"),
    ],
)
def test_an_answer_is_one_line(text, shown):
    assert one_line(text, 10) == shown


def test_a_sample_ends_with_its_turn_and_within_the_models_positions(tokenizer):
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    seen = []

    def forward(inputs):
        seen.append(inputs["input"].shape[1])
        return torch.nn.functional.one_hot(torch.full_like(inputs["input"], end), len(tokenizer))

    options = {"max_new_tokens": 9, "temperature": 0.0, "echo": False}
    sample = SampleText(tokenizer, ["one two three four"], **options)
    texts = sample(forward=forward, device=DEVICE, max_length=4)
    assert texts == {"sample/0": "one two three four -> "} and set(seen) == {4}


def trained(samples=None, **slots):
    """Losses with dropout, what was written, and what the callbacks report."""
    loader = partial(Loader, Ragged(), micro_batch_size=16, shuffle=False)
    trainer, recorder = make_trainer(
        None,
        dropout=0.3,
        max_steps=3,
        validator=partial(
            Validator,
            loader,
            eval_interval=2,
            max_batches=1,
            validate_before_training=True,
            samples=samples,
        ),
        **slots,
    )
    trainer.train()
    trainer.close()
    return recorder.losses(), recorder.texts, trainer.callbacks.reports()


def test_texts_of_every_validation_change_nothing_else():
    sample = SampleText(Letters(), ["ab", "x"], max_new_tokens=2)
    losses, texts, (report,) = trained(callbacks={"sample": sample})
    assert (losses, [], []) == trained()
    assert [(step, name) for step, name, _ in texts] == [
        (step, name) for step in (0, 2, 3) for name in ("sample/0", "sample/1")
    ]
    assert texts[0][2].startswith("ab") and texts[1][2].startswith("x")
    assert [line.partition(":")[0] for line in report.splitlines()] == [
        f"{name} at step {step}" for name in ("sample/0", "sample/1") for step in (0, 3)
    ]


def test_a_validator_brings_the_callback_that_logs_samples():
    options = {"prompts": ["ab", "x"], "max_new_tokens": 2}
    by_validator = trained(samples=SampleText(Letters(), **options))
    assert by_validator == trained(callbacks={"sample": SampleText(Letters(), **options)})
    assert len(by_validator[1]) == 6


def test_one_validation_has_nothing_to_be_compared_with():
    sample = SampleText(Letters(), ["ab"], max_new_tokens=1)
    trainer, _ = make_trainer(None, max_steps=1, validator=None)
    sample.on_validation_end(trainer)
    trainer.close()
    assert sample.report() == ""
