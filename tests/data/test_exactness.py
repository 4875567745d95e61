"""However examples are batched, a model sees each of them alone."""

import pytest
import torch

from ditty_di.batch import Batch
from ditty_di.data import PackedCollate, PackedDataset, PaddedCollate, PaddingFreeCollate
from ditty_di.losses import CrossEntropyLoss
from tests.data.ragged import VOCAB, Documents, make_model, run

DOCUMENTS = Documents([9, 3, 16, 1, 7, 12, 5])
ATTENTIONS = ["sdpa", "eager"]


def alone(model):
    """Loss, its gradients, and the logits of each document, one at a time."""
    loss_fn, total = CrossEntropyLoss(output=None), None
    rows = [PaddedCollate()([DOCUMENTS[i]]) for i in range(len(DOCUMENTS))]
    count = sum(loss_fn.num_valid(Batch(*row)) for row in rows)
    logits = []
    for inputs, labels in rows:
        found = run(model, inputs)
        logits.append(found[0].detach())
        loss = loss_fn(found, Batch(inputs, labels), count)[0]
        total = loss if total is None else total + loss
    total.backward()
    return total.item(), gradients(model), logits


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def batches(how):
    """Micro-batches, and for each where its documents are: (row, start, document)."""
    if how == "packed":
        dataset = PackedDataset(DOCUMENTS, 20, pad_id=3)
        rows = [dataset[i] for i in range(len(dataset))]
        places = []
        for row in range(len(dataset)):
            start = 0
            for member in dataset.members(row):
                places.append((row, start, member))
                start += int(DOCUMENTS.lengths[member])
        return PackedCollate()(rows), places
    rows = [DOCUMENTS[i] for i in range(len(DOCUMENTS))]
    if how == "padded":
        return PaddedCollate(pad_id=3)(rows), [(i, 0, i) for i in range(len(rows))]
    starts = [0, *DOCUMENTS.lengths.cumsum().tolist()]
    return PaddingFreeCollate()(rows), [(0, starts[i], i) for i in range(len(rows))]


@pytest.mark.parametrize("how", ["padded", "packed", "padding_free"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mistral"])
def test_logits_loss_and_gradients_are_those_of_each_document_alone(architecture, attention, how):
    model = make_model(architecture, attention)
    loss, gradient, logits = alone(model)
    (inputs, labels), places = batches(how)
    found = run(model, inputs)
    for row, start, document in places:
        mine = found[row, start : start + len(logits[document])].detach()
        torch.testing.assert_close(mine, logits[document], atol=1e-5, rtol=0)
    loss_fn, batch = CrossEntropyLoss(), Batch(inputs, labels)
    total = loss_fn(found, batch, loss_fn.num_valid(batch))[0]
    assert total.item() == pytest.approx(loss, rel=1e-5)
    total.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, gradient[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("how", ["packed", "padding_free"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_document_changes_nothing(architecture, attention, how):
    model = make_model(architecture, attention).eval()
    (inputs, _), places = batches(how)
    changed = {**inputs, "input": inputs["input"].clone()}
    row, start, document = places[0]
    here = changed["input"][row, start : start + DOCUMENTS.lengths[document]]
    here += 1
    here %= VOCAB
    with torch.no_grad():
        before, after = (run(model, x) for x in (inputs, changed))
    for row, start, document in places:
        part = slice(start, start + int(DOCUMENTS.lengths[document]))
        same = torch.allclose(before[row, part], after[row, part], atol=1e-6)
        assert same == (document != places[0][2])


def test_flex_attention_is_exact():
    """Forward only: on a CPU it has no backward pass; tests/gpu has that."""
    model = make_model("llama", "sdpa").eval()
    # Uncompiled: the masks are the same, and a CPU needs a minute to compile them.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for how in ("packed", "padding_free"):
            (inputs, _), _ = batches(how)
            model.set_attn_implementation("sdpa")
            expected = run(model, inputs)
            model.set_attn_implementation("flex_attention")
            found = run(model, inputs)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
