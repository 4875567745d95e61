"""Texts of a model while it is trained."""

from functools import partial

import torch
from torch import nn

from ditty_di.callbacks import SampleText
from ditty_di.data.loader import Loader
from ditty_di.metrics import Validator
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


def trained(**slots):
    """Losses with dropout, what was written, and what the callbacks report."""
    loader = partial(Loader, Ragged(), batch_size=16, shuffle=False)
    trainer, recorder = make_trainer(
        None,
        dropout=0.3,
        steps=3,
        validator=partial(Validator, loader, every=2, max_batches=1, first=True),
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


def test_one_validation_has_nothing_to_be_compared_with():
    sample = SampleText(Letters(), ["ab"], max_new_tokens=1)
    trainer, _ = make_trainer(None, steps=1, validator=None)
    sample.validation_end(trainer)
    trainer.close()
    assert sample.report() == ""
