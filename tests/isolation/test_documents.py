"""Layers with a state get each document in a row of its own; the probe finds where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ditty_di.data.collate import varlen_arguments
from ditty_di.isolation.documents import DocumentRows, recurrent_layers
from ditty_di.isolation.forms import FORMS, DocumentInputs
from ditty_di.isolation.probe import Isolation, NotIsolated

SPLIT = "a row of its own for each document in recurrent layers"
WIDTH = 8
#: Documents of 1 to 9 tokens, and in the second row one document.
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1, 0, 1, 2], list(range(15))])


class Mixer(nn.Module):
    """A causal convolution and a decaying sum, as in the layers of hybrid models."""

    def __init__(self, kernel: int = 4, decay: float = 0.9) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding=kernel - 1, groups=WIDTH)
        self.decay, self.calls = decay, []

    def forward(self, hidden, seq_idx=None, **kwargs):
        """[rows, length, width]"""
        assert seq_idx is None and not kwargs, "a row of one document"
        self.calls.append(tuple(hidden.shape[:2]))
        out = self.conv(hidden.mT)[..., : hidden.shape[1]].mT
        states, state = [], torch.zeros_like(out[:, 0])
        for token in out.unbind(1):
            state = self.decay * state + token
            states.append(state)
        return torch.stack(states, 1), {"last": out}


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.mixer = Mixer(**options)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, ids, position_ids=None, attention_mask=None, **kwargs):
        return self.head(self.mixer(self.embedding(ids))[0])


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(2, 15, WIDTH, requires_grad=True)


def documents(positions=POSITIONS):
    """(row, first, last + 1) of each."""
    starts = [(r, c) for r, c in (positions == 0).nonzero().tolist()]
    ends = [*starts[1:], (len(positions), 0)]
    return [
        (r, c, end if row == r else positions.shape[1])
        for (r, c), (row, end) in zip(starts, ends, strict=True)
    ]


def test_a_layer_sees_one_document_in_each_row(rows):
    mixer, hooks = Mixer(), DocumentRows()
    model = nn.ModuleList([mixer])
    expected = [mixer(rows[r : r + 1, a:b]) for r, a, b in documents()]
    detach = hooks.attach(model)
    hooks.follow(POSITIONS)
    mixer.calls.clear()
    out, more = mixer(rows, seq_idx=torch.zeros(2, 15), cu_seq_lens_q=torch.tensor([0, 30]))
    for (r, a, b), (alone, inner) in zip(documents(), expected, strict=True):
        torch.testing.assert_close(out[r, a:b], alone[0])
        torch.testing.assert_close(more["last"][r, a:b], inner["last"][0])
    tokens = sum(n * longest for n, longest in mixer.calls)
    assert tokens < 2 * POSITIONS.numel(), "documents are padded to less than twice their length"

    weights = torch.randn_like(out)
    (packed,) = torch.autograd.grad((out * weights).sum(), rows)
    losses = [
        (e[0][0] * weights[r, a:b]).sum()
        for (r, a, b), e in zip(documents(), expected, strict=True)
    ]
    (alone,) = torch.autograd.grad(sum(losses), rows)
    torch.testing.assert_close(packed, alone)
    detach()
    assert "forward" not in vars(mixer)


def test_calls_without_positions_are_as_before(rows):
    model = Model()
    ids = torch.arange(30).view(2, 15)
    plain = model(ids)
    remove = DocumentInputs(FORMS[SPLIT], None).attach(model)
    assert not torch.equal(model(ids, position_ids=POSITIONS)[0], plain[0])
    assert torch.equal(model(ids), plain)
    masked = {"position_ids": POSITIONS, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(ids, **masked), plain)
    remove()
    assert torch.equal(model(ids, position_ids=POSITIONS), plain)


def test_a_copy_follows_its_own_calls():
    model = Model()
    DocumentInputs(FORMS[SPLIT], None).attach(model)
    copied, ids = copy.deepcopy(model), torch.arange(30).view(2, 15)
    packed = model(ids, position_ids=POSITIONS)
    assert torch.equal(copied(ids, position_ids=POSITIONS), packed)
    model(ids)
    layers = [each.mixer(each.embedding(ids))[0] for each in (model, copied)]
    assert not torch.equal(*layers), "the copy still has the documents of its last call"
    torch.nn.init.zeros_(copied.mixer.conv.weight)
    assert torch.equal(model(ids, position_ids=POSITIONS), packed)


def test_compiled_blocks_call_layers_by_document():
    import torch._dynamo

    model = Model()
    DocumentInputs(FORMS[SPLIT], None).attach(model)
    ids = torch.arange(30).view(2, 15)
    expected = model(ids, position_ids=POSITIONS)
    torch._dynamo.reset()
    model.mixer.compile(backend="eager")
    assert torch.equal(model(ids, position_ids=POSITIONS), expected)
    torch._dynamo.reset()


class Leaking(Model):
    """Keeps what `DocumentRows` would cut: the layers are not recognized."""

    def __init__(self, *, kernel=1, decay=0.0):
        super().__init__(kernel=kernel, decay=decay)
        self.mixer.conv = nn.Sequential(self.mixer.conv)


def probe(model, sample):
    isolation = Isolation(
        model,
        config=None,
        forward=lambda i: model(i["input"], **{k: v for k, v in i.items() if k != "input"}),
        device=torch.device("cpu"),
        agree=bool,
        name="model",
    )
    isolation.ensure(sample)
    return isolation.form


def samples():
    packed = {"input": torch.arange(30).view(2, 15), "position_ids": POSITIONS}
    free = {"input": torch.arange(24)[None], "position_ids": torch.arange(8).repeat(3)[None]}
    return {
        "packed": packed,
        "packed, varlen": packed | varlen_arguments(POSITIONS),
        "padding-free": free | varlen_arguments(free["position_ids"]),
    }


LEAKS = {
    "a convolution of two tokens": {"kernel": 2},
    "a convolution of four tokens": {"kernel": 4},
    "a state": {"decay": 0.9},
    "a state that decays at once": {"decay": 1e-4},
}


@pytest.mark.parametrize("sample", samples())
@pytest.mark.parametrize("leak", LEAKS)
def test_the_probe_finds_what_crosses_documents(leak, sample):
    torch.manual_seed(0)
    with pytest.raises(NotIsolated, match=r"state crosses documents.*batching=padded"):
        probe(Leaking(**LEAKS[leak]), samples()[sample])


@pytest.mark.parametrize("sample", samples())
def test_the_probe_accepts_layers_without_a_memory_and_those_that_are_split(sample):
    assert probe(Leaking(), samples()[sample]) == next(iter(FORMS))
    assert probe(Model(), samples()[sample]) == SPLIT


def test_convolutions_of_one_token_and_those_inside_others_are_told_apart():
    model = nn.ModuleDict({"one": Mixer(kernel=1), "four": Mixer(kernel=4)})
    assert list(recurrent_layers(model)) == [model["four"]]
