from __future__ import annotations

import gc
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ditty_di.batch import Batch
from ditty_di.losses import CompositeLoss, CrossEntropyCalculator, MSELoss
from ditty_di.processors import Context, ContractError, PostProcessor, PreProcessor, Processors

CPU = torch.device("cpu")


class Double(PreProcessor):
    contract = "x:n:f -> x:n:f | ctx.noise:n:f, ctx.forward_kwargs.t:1:i64"

    def process(self, batch, ctx):
        ctx["noise"] = torch.ones_like(batch)
        ctx["forward_kwargs"]["t"] = torch.arange(len(batch))
        return 2 * batch, ctx


class Flip(PostProcessor):
    contract = "eps:n:f -> eps:n:f | ctx.sign:0:i"

    def process(self, output, ctx):
        ctx["sign"] = -1
        return -output, ctx


class Lambda(PreProcessor):
    def __init__(self, function, **options):
        super().__init__(**options)
        self.process = function  # type: ignore[method-assign]

    def process(self, batch, ctx):
        raise AssertionError


def batch(rows=3):
    return Batch({"input": torch.ones(rows, 2), "mask": torch.ones(rows)}, torch.arange(rows))


def prepare(processors, given=None, step=1):
    return processors.prepare(
        given or batch(), epoch=0, step=step, total_steps=9, device=CPU, model=None
    )


def test_the_way_through():
    processors = Processors([Double()], [Flip()])
    given = batch()
    prepared = prepare(processors, given)
    inputs, ctx = prepared.inputs, prepared.context
    assert torch.equal(inputs["input"], torch.full((3, 2), 2.0))
    assert set(inputs) == {"input", "mask", "t"}
    assert set(given.inputs) == {"input", "mask"}  # the loader's own is untouched
    assert given.context == {}
    assert ctx["original_batch"][0]["input"] is given.inputs["input"]
    assert {key: ctx[key] for key in ("epoch", "step", "total_steps", "device", "model")} == {
        "epoch": 0, "step": 1, "total_steps": 9, "device": CPU, "model": None
    }  # fmt: skip
    assert torch.equal(ctx["target"], given.labels)
    assert "mask" not in ctx
    assert torch.equal(processors.finish(inputs["input"], prepared), torch.full((3, 2), -2.0))
    assert prepared.context["sign"] == -1


def test_without_processors_a_batch_is_what_it_was():
    processors, given = Processors(), batch()
    assert not processors
    assert prepare(processors, given) is given
    output = object()
    assert processors.finish(output, given) is output
    assert Processors(postprocessors=[Flip()])


def test_without_preprocessors_a_batch_is_moved_in_its_turn_and_each_tensor_once():
    """The pixels of all micro-batches of a step would fill the device."""
    meta, known = torch.device("meta"), {"epoch": 0, "step": 1, "total_steps": 9, "model": None}
    found = Processors(postprocessors=[Flip()]).prepare(batch(), device=meta, **known)
    assert not found.labels.is_meta and not any(x.is_meta for x in found.inputs.values())
    moved = found.to(meta)
    assert moved.inputs["mask"].is_meta and moved.labels is moved.context["target"]
    assert moved.inputs["mask"] is moved.context["forward_kwargs"]["mask"]
    assert moved.inputs["input"] is moved.context["original_batch"][0]["input"]
    assert Processors([Double()]).prepare(batch(), device=meta, **known).inputs["input"].is_meta


@pytest.mark.parametrize("rejection", [None, (None, Context())])
def test_a_rejected_batch_goes_no_further(rejection):
    seen = []
    processors = Processors(
        [Lambda(lambda b, c: rejection), Lambda(lambda b, c: seen.append(1) or (b, c))]
    )
    assert prepare(processors) is None
    assert not seen


@pytest.mark.parametrize("result, found", [(torch.ones(2, 2), "Tensor"), ((1, 2, 3), "3 values")])
def test_what_is_no_pair_is_named(result, found):
    # a tensor of two rows could be unpacked, and train on garbage
    with pytest.raises(TypeError, match=rf"wrong.process returned {found}; it must return"):
        prepare(Processors([Lambda(lambda b, c: result, name="wrong")]))
    post = Flip()
    post.process = lambda output, ctx: None
    processors = Processors(postprocessors=[post])
    prepared = prepare(processors)
    with pytest.raises(TypeError, match="only a batch can be rejected"):
        processors.finish(1, prepared)


def test_an_error_tells_in_which_processor():
    with pytest.raises(ZeroDivisionError) as caught:
        prepare(Processors([Lambda(lambda b, c: 1 / 0, name="broken")]))
    assert caught.value.__notes__ == ["in broken.process"]


def test_a_plain_dict_becomes_a_context_and_reaches_the_loss():
    post = Flip()
    post.process = lambda output, ctx: (output, {**ctx, "more": 1})
    processors = Processors([Lambda(lambda b, c: (b, {**c, "own": 2}))], [post])
    prepared = prepare(processors)
    assert type(prepared.context) is Context and prepared.context["own"] == 2
    processors.finish(prepared.inputs["input"], prepared)
    assert type(prepared.context) is Context and prepared.context["more"] == 1


def test_two_trivial_processors_cost_less_than_20_microseconds_a_call():
    class Before(PreProcessor):
        def process(self, batch, ctx):
            ctx["forward_kwargs"]["t"] = 1
            return batch, ctx

    class Behind(PostProcessor):
        def process(self, output, ctx):
            return output, ctx

    processors, given = Processors([Before(), Before()], [Behind(), Behind()]), batch()
    times = []
    gc.disable()
    for _ in range(2000):
        start = time.perf_counter()
        prepared = prepare(processors, given)
        processors.finish(prepared.inputs["input"], prepared)
        times.append(time.perf_counter() - start)
    gc.enable()
    # Both calls; the fastest tenth, for other processes share the machine.
    assert sorted(times)[200] < 40e-6


# -- contracts ------------------------------------------------------------------------------------

LOADER = "-> x:2:f, mask:1:f | ctx.target:1:i64"
MODEL = "x:2:f, t:1:i64 -> eps:2:f"


class Loader:
    contract = LOADER


def around(**changes):
    loss = CompositeLoss([(MSELoss(target_key="noise"), 1), (CrossEntropyCalculator(), 1)])
    return {"loader": Loader(), "model_contract": MODEL, "loss": loss, **changes}


def test_validation_covers_all_stages_and_parts():
    processors = Processors([Double()], [Flip()])
    assert not processors.validate(**around(), strict=True).unchecked
    with pytest.raises(ContractError) as caught:
        processors.validate(
            loader=Loader(),
            model_contract="x:3:f -> eps:2:f",
            loss=CompositeLoss([(MSELoss(target_key="nois"), 1), (MSELoss(output_index=1), 1)]),
        )
    told = str(caught.value)
    for name in ("model: x:3:f", "loss mse_loss: ctx.nois", "loss mse_loss_2: 1:n:f"):
        assert name in told
    picture = processors.picture(**around(model_contract=None, model=nn.Linear(2, 2)))
    assert re.search(r"model Linear +\(no contract: unchecked\)", picture)


def run(processors, given=None, output=None):
    prepared = prepare(processors, given)
    if prepared is None:
        return None
    return processors.finish(prepared.inputs["input"] if output is None else output, prepared)


def test_tensors_that_are_as_the_contracts_say_pass():
    processors = Processors([Double()], [Flip()])
    processors.check_tensors(**around(), every=True)
    run(processors), run(processors)


@pytest.mark.parametrize(
    "given, output, says",
    [
        (
            Batch({"input": torch.ones(3, 2, 1), "mask": torch.ones(3)}, torch.arange(3)),
            None,
            "loader gives x: expected rank 2, dtype f; found rank 3, dtype f32 (shape [3, 2, 1])",
        ),
        (
            Batch({"input": torch.ones(3, 2).long(), "mask": torch.ones(3)}, torch.arange(3)),
            None,
            "loader gives x: expected rank 2, dtype f; found rank 2, dtype i64",
        ),
        (
            Batch({"input": torch.ones(3, 2)}, torch.arange(3)),
            None,
            "loader gives mask: expected rank 1, dtype f; found nothing",
        ),
        (
            Batch({"input": torch.ones(3, 2), "mask": torch.ones(3)}, torch.arange(3).int()),
            None,
            "loader writes ctx.target: expected rank 1, dtype i64; found rank 1, dtype i32",
        ),
        (batch(), torch.ones(3), "model gives eps: expected rank 2, dtype f; found rank 1"),
        (batch(), (), "model gives eps: expected rank 2, dtype f; found nothing"),
        (batch(), ("text",), "model gives eps: expected rank 2, dtype f; found no tensor, but str"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_stage(given, output, says):
    processors = Processors([Double()], [Flip()])
    processors.check_tensors(**around())
    with pytest.raises(ContractError, match=re.escape(says)):
        run(processors, given, output)


def test_what_processors_write_and_losses_take_is_checked():
    class Lies(Double):
        def process(self, batch, ctx):
            batch, ctx = super().process(batch, ctx)
            ctx["noise"] = ctx["noise"][0]
            return batch, ctx

    processors = Processors([Lies()], [Flip()])
    processors.check_tensors(**around())
    with pytest.raises(ContractError) as caught:
        run(processors)
    assert str(caught.value) == (
        "preprocessor lies writes ctx.noise: expected rank n, dtype f (n is 2: preprocessor lies "
        "takes x); found rank 1, dtype f32 (shape [2])"
    )
    lies = Lies(contract="x:n:f -> x:n:f | ctx.forward_kwargs.t:1:i64")
    processors = Processors([lies], [Flip()])
    processors.check_tensors(**around())
    with pytest.raises(ContractError, match=r"loss mse_loss reads ctx.noise: expected rank n, .*2"):
        run(processors)


def test_the_first_batch_that_is_not_rejected_is_checked_and_no_other():
    reject = [True, False, False]
    once = Lambda(lambda b, c: None if reject.pop(0) else (b, c))
    processors = Processors([once, Double()], [Flip()])
    processors.check_tensors(**around())
    wrong = torch.ones(3)
    assert run(processors, None, wrong) is None
    with pytest.raises(ContractError, match="model gives eps"):
        run(processors, None, wrong)
    run(processors, None, wrong)

    processors = Processors([Double()], [Flip()])
    processors.check_tensors(**around(), every=True)
    for _ in range(2):
        with pytest.raises(ContractError, match="model gives eps"):
            run(processors, None, wrong)


def test_batches_of_a_window_are_checked_apart():
    """All batches of a window are prepared before the first goes through the model."""
    processors = Processors([Double()], [Flip()])
    loss = MSELoss(target_key="noise")
    processors.check_tensors(model_contract="x:n:f, t:1:i64 -> eps:n:f", loss=loss, every=True)
    window = [
        prepare(processors, Batch({"input": torch.ones(2, *[1] * n)}, torch.arange(2)))
        for n in (1, 2)
    ]
    for prepared in window:
        processors.finish(prepared.inputs["input"], prepared.to(CPU))
    prepared = prepare(processors)
    with pytest.raises(ContractError, match=r"expected rank n, dtype f \(n is 2: model takes x\)"):
        processors.finish(prepared.inputs["input"][0], prepared)


def outputs():
    from transformers.modeling_outputs import CausalLMOutput

    hidden, logits = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    plain = "hidden:3:f, logits:3:f"
    yield plain, (hidden, logits), 1
    yield plain, {"logits": logits, "hidden": hidden}, "logits"
    yield plain, SimpleNamespace(logits=logits, hidden=hidden), "logits"
    named = "logits:3:f, hidden_states:3:f"
    yield named, CausalLMOutput(logits=logits, hidden_states=hidden), "logits"


def test_outputs_by_name_and_by_position():
    for names, output, index in outputs():
        taker = Flip(contract="logits:3:f -> | ctx.sign:0:i")
        processors = Processors(postprocessors=[taker])
        loss = CrossEntropyCalculator(output_index=index, target_key="labels")
        processors.check_tensors(model_contract=f"x:2 -> {names}", loss=loss)
        prepared = prepare(processors)
        prepared.context["labels"] = torch.zeros(2, 3, dtype=torch.long)
        taker.process = lambda output, ctx: (output, {**ctx, "sign": 1})
        processors.finish(output, prepared)


def test_checks_work_without_any_processor():
    processors = Processors()
    processors.check_tensors(model_contract="x:2:f -> y:2:f", loss=MSELoss())
    assert processors
    prepared = prepare(processors)
    with pytest.raises(ContractError, match=r"mse_loss reads ctx.target: expected rank n"):
        processors.finish(prepared.inputs["input"], prepared)
