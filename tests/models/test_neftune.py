"""NEFTune: noise of the paper's size, on training's input embeddings and nowhere else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ditty_di.models.neftune import document_lengths, neftune
from tests.losses.families import batch, build

D = 32


def noise(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    """What a training forward pass adds to the embeddings: the same pass without it, subtracted."""
    seen: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    for training in (True, False):
        model.train(training)
        model(*args, **kwargs)
    handle.remove()
    noisy, clean = seen
    return noisy - clean


def test_variance_is_that_of_the_paper_whatever_the_batch():
    model = neftune(build("llama"), alpha=7.0)
    for rows, seq in ((1, 16), (64, 16), (8, 60)):
        values = noise(model, torch.randint(3, 97, (rows, seq)))
        bound = 7.0 / math.sqrt(seq * D)
        assert values.abs().max() <= bound * (1 + 1e-5)
        assert values.mean().abs() < bound * 6 / math.sqrt(3 * values.numel())
        expected = 7.0**2 / (3 * seq * D)
        # The variance of a uniform's square is 4/45: five standard deviations.
        assert values.pow(2).mean() == pytest.approx(expected, rel=5 * 0.9 / values.numel() ** 0.5)


def test_every_row_step_and_element_has_noise_of_its_own():
    model = neftune(build("llama"))
    ids = torch.randint(3, 97, (1, 50)).expand(2, -1)
    first, second = noise(model, ids), noise(model, ids)
    rows = torch.stack([*first.flatten(1), *second.flatten(1)])
    apart = torch.corrcoef(rows) - torch.eye(4)
    assert apart.abs().max() < 5 / math.sqrt(rows.shape[1])


def test_packed_documents_count_by_their_own_length():
    model = neftune(build("llama"), alpha=5.0)
    lengths = [40, 3, 17, 4]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].repeat(32, 1)
    values = noise(model, torch.randint(3, 97, positions.shape), position_ids=positions)
    for n, part in zip(lengths, values.split(lengths, dim=1), strict=True):
        bound = 5.0 / math.sqrt(n * D)
        assert part.abs().max() == pytest.approx(bound, rel=0.02)
        assert part.abs().max() <= bound * (1 + 1e-5)


def test_lengths_of_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [5, 6, 0, 1, 2, 3, 4]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 2, 2, 1, 1], [2, 2, 5, 5, 5, 5, 5]]


def test_masked_padding_has_no_noise_and_no_length():
    model = neftune(build("llama"), alpha=5.0)
    mask = torch.ones(64, 20, dtype=torch.long)
    mask[:, 4:] = 0
    values = noise(model, torch.randint(3, 97, mask.shape), attention_mask=mask)
    assert values[:, 4:].abs().max() == 0
    assert values[:, :4].abs().max() == pytest.approx(5.0 / math.sqrt(4 * D), rel=0.02)


def test_a_row_without_tokens_gives_no_nan():
    model = neftune(build("llama"))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert noise(model, torch.ones(2, 3).long(), attention_mask=mask).isfinite().all()


def test_encoder_and_decoder_of_a_seq2seq_model():
    model = neftune(build("t5"), alpha=5.0)
    model.train()
    seen: list[torch.Tensor] = []
    for part in (model.get_encoder(), model.get_decoder()):
        part.get_input_embeddings().register_forward_hook(
            lambda m, a, out: seen.append(out.detach() - m.weight[a[0]].detach())
        )
    mask = torch.ones(64, 30, dtype=torch.long)
    mask[:, 10:] = 0
    ids = torch.randint(3, 97, (64, 30))
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :6])
    for values, length in zip(seen, (10, 6), strict=True):
        assert values.abs().max() == pytest.approx(5.0 / math.sqrt(length * D), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_none_in_evaluation_generation_and_without_gradients(family):
    plain = build(family)
    model = neftune(copy.deepcopy(plain), alpha=100.0)
    inputs, _ = batch(family)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    for training in (False, True):  # generation does not leave training mode by itself
        model.train(training)
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_names_stay_and_copies_have_noise_of_their_own():
    plain = build("llama")
    model = neftune(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(model)
    mask = torch.tensor([[1, 1, 0, 0]])
    ids = torch.ones(1, 4).long()
    values = noise(twin, ids, attention_mask=mask)
    assert values[:, :2].abs().min() > 0 and values[:, 2:].abs().max() == 0


@pytest.mark.parametrize("trained", [["embed_tokens"], None])
def test_through_adapters(trained):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=trained)
    model = neftune(get_peft_model(build("llama"), config), alpha=5.0)
    mask = torch.ones(64, 20, dtype=torch.long)
    mask[:, 5:] = 0
    ids = torch.randint(3, 97, mask.shape)
    values = noise(model, input_ids=ids, attention_mask=mask)
    assert values.abs().max() == pytest.approx(5.0 / math.sqrt(5 * D), rel=0.02)
    model.train()
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradients_go_through_and_half_precision_stays():
    model = neftune(build("llama").bfloat16(), alpha=5.0).train()
    embedded = model.get_input_embeddings()(torch.ones(1, 4).long())
    assert embedded.dtype == torch.bfloat16
    embedded.sum().backward()
    assert model.get_input_embeddings().weight.grad[1].eq(4).all()


def test_noise_goes_on_from_a_saved_random_state():
    model = neftune(build("llama"))
    ids = torch.randint(3, 97, (2, 9))
    noise(model, ids)
    state = torch.get_rng_state()
    expected = noise(model, ids)
    torch.set_rng_state(state)
    assert torch.equal(noise(model, ids), expected)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_is_positive(alpha):
    with pytest.raises(ValueError, match="neftune: alpha="):
        neftune(build("llama"), alpha=alpha)


def test_a_model_without_input_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"Linear does not say where"):
        neftune(nn.Linear(2, 2))
