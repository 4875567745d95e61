from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ditty_di.batch import Batch
from ditty_di.models.weights import initialize, torch_reset
from ditty_di.processors import Processors, Teacher

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return SimpleNamespace(logits=self.dropout(self.layer(x)) * scale)


def run(teacher, pupil=None, scale=None):
    kwargs = {} if scale is None else {"scale": torch.tensor(scale)}
    batch = Processors([teacher]).prepare(
        Batch({"input": torch.ones(2, 4), **kwargs}, torch.zeros(2)),
        epoch=0, step=1, total_steps=1, device=CPU, model=pupil or Model(),
    )  # fmt: skip
    return batch.inputs, batch.context


def test_the_teacher_is_frozen_in_evaluation_mode_and_without_gradients():
    model = Model().train()
    teacher = Teacher(model, output="logits")
    model.train()  # somebody's model.train() reaches it
    inputs, ctx = run(teacher, scale=2.0)
    logits = ctx["teacher_logits"]
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits, 2 * model.layer(torch.ones(2, 4)))  # no dropout
    assert torch.equal(inputs["input"], torch.ones(2, 4))


def test_a_pupil_cannot_be_its_own_teacher():
    model = Model()
    with pytest.raises(ValueError, match="share parameters"):
        run(Teacher(model, output="logits"), pupil=nn.Sequential(model))


def test_a_teacher_on_meta_needs_weights_and_gets_them_once():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="teacher: its model is on the meta device"):
        Teacher(model)
    filled = []

    def weights(model, *, device):
        filled.append(device)
        initialize(model, device=device, seed=1, init=torch_reset)

    teacher = Teacher(model, output="logits", key="big", weights=weights)
    first, second = run(teacher)[1]["big"], run(teacher)[1]["big"]
    assert filled == [CPU]
    assert torch.equal(first, second) and first.abs().sum() > 0


def test_outputs_that_are_not_there_are_explained():
    with pytest.raises(LookupError, match=r"'logit'.*SimpleNamespace with logits"):
        run(Teacher(Model(), output="logit"))
    assert str(Teacher(Model(), key="k", contract="x:2 -> | ctx.k:2:f").contract).endswith("2:f")
