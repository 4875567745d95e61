"""A model with a deferred head is the same model: logits, loss, gradients, names, text."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ditty_di.generation.sampling import logits_of
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss, skip_lm_head
from tests.losses import as_batch
from tests.losses.families import FAMILIES, batch, build


def pair(family: str, **changes):
    model = build(family, **changes)
    return model, skip_lm_head(copy.deepcopy(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_whole_logits(family):
    plain, deferred = pair(family)
    inputs, labels = batch(family)
    whole, chunked = CrossEntropyLoss(output="logits"), LinearCrossEntropyLoss(chunk_tokens=4)
    count = whole.num_valid(as_batch(labels))
    assert chunked.num_valid(as_batch(labels)) == count
    losses = []
    for model, loss_fn in ((plain, whole), (deferred, chunked)):
        loss, metrics = loss_fn(model(**inputs), as_batch(labels), count)
        loss.backward()
        losses.append(loss.detach())
        assert metrics == {}
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, expected), found in zip(
        plain.named_parameters(), deferred.parameters(), strict=True
    ):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (expected, found)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_there_for_whoever_asks(family):
    plain, deferred = pair(family)
    inputs, labels = batch(family)
    expected, output = plain(**inputs), deferred(**inputs)
    assert torch.equal(logits_of(output), expected.logits)
    count = torch.tensor(9.0)
    loss_fn = CrossEntropyLoss(output="logits")
    assert (
        loss_fn(output, as_batch(labels), count)[0] == loss_fn(expected, as_batch(labels), count)[0]
    )
    with torch.no_grad():
        torch.testing.assert_close(
            LinearCrossEntropyLoss(chunk_tokens=5)(deferred(**inputs), as_batch(labels), count)[0],
            loss_fn(plain(**inputs), as_batch(labels), count)[0],
        )


def test_other_outputs_are_kept():
    plain, deferred = pair("mixtral")
    inputs, _ = batch("mixtral")
    output = deferred(**inputs)
    torch.testing.assert_close(output.aux_loss, plain(**inputs).aux_loss)
    assert output.loss is None and output.past_key_values is None
    assert "logits" in output and "aux_loss" in output and "past_key_values" not in output
    with pytest.raises(AttributeError, match="nothing"):
        _ = output.nothing


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "t5"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_unchanged(family, use_cache):
    plain, deferred = pair(family)
    inputs, _ = batch(family)
    inputs.pop("decoder_input_ids", None)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, "eos_token_id": -1}
    assert torch.equal(
        deferred.generate(**inputs, **options, pad_token_id=0),
        plain.generate(**inputs, **options, pad_token_id=0),
    )


@pytest.mark.parametrize(
    "asking", [{"labels": 1}, {"use_cache": True}, {"logits_to_keep": 1}, {"return_dict": False}]
)
def test_calls_that_want_the_ordinary_output_get_it(asking):
    plain, deferred = pair("llama")
    inputs, labels = batch("llama")
    asking = {k: labels if k == "labels" else v for k, v in asking.items()}
    expected, output = plain(**inputs, **asking), deferred(**inputs, **asking)
    assert type(output) is type(expected)
    index = 1 if "labels" in asking else 0
    assert torch.equal(output[index], expected[index])


def test_names_copies_and_saved_files_are_those_of_the_model(tmp_path):
    plain, deferred = pair("llama-tied")
    assert list(deferred.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in deferred.named_modules()] == [n for n, _ in plain.named_modules()]
    deferred.save_pretrained(tmp_path / "deferred")
    plain.save_pretrained(tmp_path / "plain")
    files = [
        sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir())
        for name in ("deferred", "plain")
    ]
    assert files[0] == files[1]

    inputs, _ = batch("llama-tied")
    before = deferred(**inputs).logits
    twin = copy.deepcopy(deferred)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    assert torch.equal(deferred(**inputs).logits, before), "the copy's forward is the copy's"
    assert twin(**inputs).logits.abs().max() == 0


def test_around_adapters_the_projection_is_called_with_its_own():
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    plain = get_peft_model(model, config).eval()
    deferred = skip_lm_head(copy.deepcopy(plain))
    inputs, labels = batch("llama")
    whole, chunked = CrossEntropyLoss(output="logits"), LinearCrossEntropyLoss(chunk_tokens=4)
    count = whole.num_valid(as_batch(labels))
    for peft_model, loss_fn in ((plain, whole), (deferred, chunked)):
        loss_fn(peft_model(**inputs), as_batch(labels), count)[0].backward()
    trained = [n for n, p in deferred.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained)
    for name in trained:
        torch.testing.assert_close(
            deferred.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-6, atol=1e-6
        )
    ids = inputs["input_ids"]
    generated = [
        m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (plain, deferred)
    ]
    assert torch.equal(*generated)
    merged = deferred.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits)


def test_dropout_in_the_projection_is_the_same_when_it_is_computed_again():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = skip_lm_head(get_peft_model(build("llama"), config)).train()
    inputs, labels = batch("llama")
    weight = model.base_model.model.lm_head.lora_A["default"].weight

    def loss(chunk_tokens: int) -> torch.Tensor:
        torch.manual_seed(3)
        loss_fn = LinearCrossEntropyLoss(chunk_tokens=chunk_tokens)
        return loss_fn(model(**inputs), as_batch(labels), torch.tensor(20.0))[0]

    (found,) = torch.autograd.grad(loss(6), weight)
    # The derivative along the gradient, by finite differences with the same dropped elements.
    step = 1e-3 * found / found.norm()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight.add_(sign * step)
            values.append(loss(6))
            weight.sub_(sign * step)
    measured = (values[0] - values[1]) / (2 * step.norm())
    torch.testing.assert_close(measured, found.norm(), rtol=5e-2, atol=0)


def test_outputs_are_found_by_whoever_looks_for_their_tensors():
    _, deferred = pair("mixtral")
    output = deferred(**batch("mixtral")[0])
    leaves, spec = pytree.tree_flatten(output)
    assert any(leaf is output.last_hidden_state for leaf in leaves)
    assert any(leaf is output.others.aux_loss for leaf in leaves)
    assert torch.equal(pytree.tree_unflatten(leaves, spec).logits, output.logits)
    assert not output.last_hidden_state._is_view()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_computes_under_the_autocast_of_the_forward_pass(family):
    from ditty_di.precision.autocast import autocast

    plain = autocast(build(family))
    deferred = skip_lm_head(copy.deepcopy(plain))
    inputs, labels = batch(family)
    whole, chunked = CrossEntropyLoss(output="logits"), LinearCrossEntropyLoss(chunk_tokens=100)
    expected, output = plain(**inputs), deferred(**inputs)
    assert output.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, expected.logits)
    for loss_fn, out in ((whole, expected), (chunked, output)):
        loss_fn(out, as_batch(labels), torch.tensor(20.0))[0].backward()
    for found, wanted in zip(deferred.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-2, atol=1e-4)


def test_a_forward_that_something_else_replaced_is_the_one_that_runs():
    model = build("llama")
    calls, forward = [], model.forward

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = counted
    inputs, _ = batch("llama")
    assert skip_lm_head(model)(**inputs).logits.shape == (2, 13, 97)
    assert len(calls) == 1


# -- what is refused ---------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"model\.head: Linear has no output embeddings"):
        skip_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"deferred already"):
        skip_lm_head(skip_lm_head(build("llama")))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda logits: logits.softmax(-1), "'softmax'"),
        (lambda logits: torch.cumsum(logits, 1), "'cumsum'"),
        (lambda logits: logits[..., :5], "'indexing'"),
        (lambda logits: torch.cat([logits, logits]), "'cat'"),
        (lambda logits: logits * torch.rand(2, 13, 1), "a value for each token"),
        (lambda logits: torch.rand(2, 13, 1) * logits, "a value for each token"),
    ],
)
def test_what_cannot_be_done_to_some_tokens_alone_is_refused(spoil, message):
    from transformers import LlamaForCausalLM

    class Spoiled(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = spoil(output.logits)
            return output

    model = build("llama")
    model.__class__ = Spoiled
    with pytest.raises(NotImplementedError, match=message) as caught:
        skip_lm_head(model)(**batch("llama")[0])
    assert "model.head" in str(caught.value)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, by: logits * by,
        lambda logits, by: by * logits,
        lambda logits, by: by.exp() + logits,
        lambda logits, by: (logits - by).tanh().mul(2.0),
        lambda logits, by: -logits.float() / by,
        lambda logits, by: torch.div(logits, by).to(by.dtype),
    ],
)
@pytest.mark.parametrize("shape", [(), (1, 1, 97), (97,)])
def test_what_is_done_to_each_element_is_done_later(change, shape):
    from transformers import LlamaForCausalLM

    by = torch.rand(shape) + 0.5

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = change(output.logits, by)
            return output

    model = build("llama")
    model.__class__ = Changed
    inputs, labels = batch("llama")
    expected = model(**inputs)
    output = skip_lm_head(copy.deepcopy(model))(**inputs)
    assert torch.equal(output.logits, expected.logits)
    count = torch.tensor(3.0)
    torch.testing.assert_close(
        LinearCrossEntropyLoss(chunk_tokens=4)(output, as_batch(labels), count)[0],
        CrossEntropyLoss(output="logits")(expected, as_batch(labels), count)[0],
    )


def test_a_model_that_makes_its_logits_otherwise_is_refused():
    from transformers import LlamaForCausalLM

    class Functional(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            hidden = self.model(input_ids).last_hidden_state
            output.logits = nn.functional.linear(hidden, self.lm_head.weight)
            return output

    model = build("llama")
    model.__class__ = Functional
    with pytest.raises(NotImplementedError, match="does not call its output embeddings"):
        skip_lm_head(model)(**batch("llama")[0])
