"""InfoNCE: the value by hand, padding, several numbers of features; pooling of hidden states."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ditty_di.batch import Batch, Context
from ditty_di.losses import InfoNCELoss
from ditty_di.processors import Pooling


def embeddings(parts, rows=5, features=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(parts * rows, features, generator=generator, requires_grad=True)


def loss_of(loss, output, labels):
    batch = Batch({}, labels)
    return loss(output, batch, loss.num_valid(batch))


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_each_anchor_has_to_find_its_positive(parts, cosine):
    output, labels = embeddings(parts), torch.zeros(5, dtype=torch.int64)
    found, metrics = loss_of(InfoNCELoss(temperature=0.5, cosine=cosine), output, labels)
    expected, right = 0.0, 0
    for n in range(5):
        anchor, others = output[n], output[5:]
        if cosine:
            scores = F.cosine_similarity(anchor[None], others) / 0.5
        else:
            scores = others @ anchor / 0.5
        expected = expected + scores.exp().sum().log() - scores[n]
        right += int(scores.argmax()) == n
    assert found.item() == pytest.approx(expected.item() / 5, abs=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(right / 5)


def test_padding_is_neither_an_anchor_nor_a_candidate():
    output, loss = embeddings(3), InfoNCELoss()
    kept = torch.cat([part[:3] for part in output.split(5)])
    found, metrics = loss_of(loss, output, torch.tensor([0, 0, 0, -100, -100]))
    expected, others = loss_of(loss, kept, torch.zeros(3, dtype=torch.int64))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6) and metrics == others
    found.backward()
    assert output.grad.view(3, 5, 8)[:, 3:].abs().max() == 0 and not output.grad.isnan().any()


def test_leading_features_have_to_do_alone():
    output, labels = embeddings(2), torch.zeros(5, dtype=torch.int64)
    found, _ = loss_of(InfoNCELoss(matryoshka_dims=[8, 2]), output, labels)
    alone = [loss_of(InfoNCELoss(), output[:, :size], labels)[0] for size in (2, 8)]
    assert found.item() == pytest.approx(sum(alone).item() / 2, abs=1e-6)
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[16\]: the embeddings have 8 features"):
        loss_of(InfoNCELoss(matryoshka_dims=[16]), output, labels)


def test_what_cannot_be_compared_is_refused():
    for options, message in (
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"matryoshka_dims": []}, "write numbers of features"),
    ):
        with pytest.raises(ValueError, match=message):
            InfoNCELoss.validate(**options)
    with pytest.raises(ValueError, match="8 embeddings for 5 rows: a loss of pairs needs two"):
        loss_of(InfoNCELoss(), embeddings(1, 8), torch.zeros(5, dtype=torch.int64))


def test_pooling_looks_at_the_tokens_of_a_row_alone():
    hidden = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    ctx = Context(forward_kwargs={"attention_mask": mask})

    def pooled(mode, ctx=ctx):
        return Pooling(mode=mode).process(SimpleNamespace(last_hidden_state=hidden), ctx)[0]

    means = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), hidden[2, 1:3].mean(0)])
    assert torch.allclose(pooled("mean"), means, atol=1e-6)
    assert torch.equal(pooled("cls"), torch.stack([hidden[0, 0], hidden[1, 0], hidden[2, 1]]))
    assert torch.equal(pooled("last"), torch.stack([hidden[0, 1], hidden[1, 3], hidden[2, 2]]))
    assert torch.allclose(pooled("mean", Context(forward_kwargs={})), hidden.mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="mode='max' must be one of mean, cls, last"):
        Pooling(mode="max")
