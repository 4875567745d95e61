"""Router losses: those of a loop over sequences, however the rows are split."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ditty_di.batch import Batch
from ditty_di.data.collate import PaddedCollate, PaddingFreeCollate
from ditty_di.losses import (
    CompositeLoss,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    RoutedLoss,
    RouterLoss,
    UncertaintyWeightedLoss,
)
from ditty_di.losses.routing import routed_tokens
from ditty_di.models.causal_lm import from_config
from ditty_di.models.dense_moe import DenseMoEConfig
from ditty_di.models.routers import routers
from ditty_di.models.weights import hugging_face, initialize, materialize
from ditty_di.parallelize.activation_checkpointing import full, selective
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.fits import Degrees, Parts, fits
from ditty_di.parallelize.stages import split
from ditty_di.training.setup import prepare_model
from ditty_di.training.validation import Validator
from tests.models.families import CAUSAL, RARE, config
from tests.models.tiny import CPU

BALANCE, Z, INFORMATION = 0.5, 0.25, 0.75
LENGTHS = (9, 16, 5, 12)
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "deepseek_v3", "gpt_oss"),
    "qwen3_next",
)
#: Whose routers do not return the experts that they choose.
SILENT = ("jetmoe", "llama4_text")


def filled(model):
    materialize(model, CPU)
    initialize(model, device=CPU, seed=1, init=hugging_face)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def moe(kind="qwen3_moe", **changes):
    torch.manual_seed(3)
    return filled(from_config(config(kind, CAUSAL[kind] | changes), attn_implementation="eager"))


def documents(count=4):
    """Rows whose prompts and ends have no labels, and the third one none at all."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, length in enumerate(LENGTHS[:count]):
        ids = torch.randint(3, 97, (length + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[: 2 * n] = -100
        labels[length - n :] = -100
        rows.append(({"input": ids[:-1]}, labels))
    return rows


def router_losses(logits, chosen, used):
    """Balance, z and information of the tokens of one sequence, times their number."""
    p = logits[used].float().softmax(-1)
    experts, tokens = p.shape[1], len(p)
    went = torch.zeros(experts)
    for token in chosen[used].tolist():
        for expert in token:
            went[expert] += 1
    balance = sum(went[i] / tokens * p[:, i].mean() for i in range(experts)) * experts
    z = sum(logits[used].float().exp().sum(-1).log() ** 2) / tokens
    mean = p.mean(0)
    information = -(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()
    return balance * tokens, z * tokens, information * tokens


def used_of(labels):
    """How many tokens count: those up to the last label."""
    return max((n + 1 for n, label in enumerate(labels.tolist()) if label != -100), default=0)


def by_hand(model, rows, *, information=0.0):
    """Cross-entropy and router losses of rows that the model sees one by one."""
    seen = []

    def see(router, args, output, *, index):
        logits = output[index]
        two_dimensional = (x for x in output if x is not logits and getattr(x, "ndim", 0) == 2)
        chosen = [x for x in two_dimensional if not x.is_floating_point()]
        seen.append((logits, chosen[0] if chosen else logits.topk(2).indices))

    hooks = [
        module.register_forward_hook(partial(see, index=index))
        for _, module, index in routers(model)
    ]
    ce, labels, routed, tokens = 0.0, 0, [0.0, 0.0, 0.0], 0
    for inputs, targets in rows:
        seen.clear()
        logits = model(inputs["input"][None]).logits[0]
        ce = ce + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        labels += int((targets != -100).sum())
        used = used_of(targets)
        tokens += used
        for router_logits, chosen in seen if used else ():
            found = router_losses(router_logits, chosen, slice(used))
            routed = [a + b / len(seen) for a, b in zip(routed, found, strict=True)]
    for hook in hooks:
        hook.remove()
    balance, z, mutual = (value / tokens for value in routed)
    return ce / labels + BALANCE * balance + Z * z - information * mutual


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, loss_fn, micro_batches):
    """The sum of the parts of the loss, and of each metric."""
    batches = [Batch.of(one) for one in micro_batches]
    count = sum(loss_fn.num_valid(batch) for batch in batches).float()
    total, metrics = 0.0, {}
    for batch in batches:
        keywords = {k: v for k, v in batch.inputs.items() if k != "input"}
        loss, own = loss_fn(model(batch.inputs["input"], **keywords), batch, count)
        total = total + loss
        metrics = {key: metrics.get(key, 0.0) + value for key, value in own.items()}
    return total, metrics


def loss_of(model, inner=None, **options):
    inner = CrossEntropyLoss(output="logits") if inner is None else inner
    loss_fn = RoutedLoss(inner, **{"balance": BALANCE, "z": Z, **options})
    return loss_fn.prepare_model(model), loss_fn


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        options = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
        torch.testing.assert_close(found[name], value, **options, msg=lambda m, n=name: f"{n}: {m}")


# -- the same numbers as by hand -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, *SILENT])
def test_gradients_of_every_parameter_are_those_of_a_loop_by_hand(kind):
    model, rows = moe(kind), documents(2)
    expected = by_hand(model, rows, information=INFORMATION)
    gradient = gradients(expected, model)
    model, loss_fn = loss_of(model, information=INFORMATION)
    found, _ = run(model, loss_fn, [PaddedCollate()(rows)])
    torch.testing.assert_close(found, expected)
    assert_same(gradients(found, model), gradient)
    router = next(name for name, p in model.named_parameters() if p.shape[0] == 4 and p.dim() == 2)
    assert gradient[router].abs().sum() > 0


def test_one_row_of_one_layer_has_the_balance_of_transformers():
    model, loss_fn = loss_of(moe(num_hidden_layers=1))
    (inputs, _) = documents(1)[0]
    batch = Batch({"input": inputs["input"][None]}, inputs["input"][None])
    _, metrics = loss_fn(model(inputs["input"][None]), batch, loss_fn.num_valid(batch).float())
    output = model(inputs["input"][None], output_router_logits=True)
    theirs = load_balancing_loss_func(output.router_logits, 4, 2)
    torch.testing.assert_close(metrics["router/balance"], theirs)


@pytest.mark.parametrize(
    "batches",
    [
        [[0, 1, 2, 3]],
        [[0], [1], [2], [3]],
        [[3, 0], [None, 2, 1]],
    ],
)
@pytest.mark.parametrize("collate", [PaddedCollate(pad_to_multiple_of=4), PaddingFreeCollate()])
@pytest.mark.parametrize("chunked", [False, True])
def test_any_split_of_the_rows_gives_the_loss_of_each_row_alone(batches, collate, chunked):
    model, rows = moe(), documents()
    expected = by_hand(model, rows, information=INFORMATION)
    gradient = gradients(expected, model)
    inner = LinearCrossEntropyLoss(chunk_tokens=3) if chunked else None
    model, loss_fn = loss_of(model, inner, information=INFORMATION)
    given = [collate([None if i is None else rows[i] for i in some]) for some in batches]
    found, metrics = run(model, loss_fn, given)
    torch.testing.assert_close(found, expected)
    assert_same(gradients(found, model), gradient)
    whole = run(model, loss_fn, [PaddedCollate()(rows)])[1]
    assert_same(metrics, whole)


def test_micro_batches_without_a_label_have_no_part_and_gradients_of_zero():
    model, loss_fn = loss_of(moe())
    ids = torch.arange(3, 11)[None]
    batch = Batch({"input": ids}, torch.full_like(ids, -100))
    assert loss_fn.num_valid(batch).tolist() == [0, 0]
    loss, metrics = loss_fn(model(ids), batch, torch.tensor([4.0, 5.0]))
    assert loss == 0 and metrics["router/load"].sum() == 0
    assert not any(value.any() for value in gradients(loss, model).values())


def test_sigmoids_are_normalized():
    model, loss_fn = loss_of(moe("deepseek_v3"), balance=1.0, z=0.0, sigmoid=True)
    ids = documents(1)[0][0]["input"][None]
    seen = []
    (_, router, _), *_ = routers(model)
    router.register_forward_hook(lambda m, args, output: seen.append(output))
    batch = Batch({"input": ids}, ids)
    _, metrics = loss_fn(model(ids), batch, loss_fn.num_valid(batch).float())
    logits, _, chosen = seen[0]
    scores = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    went = F.one_hot(chosen, 4).sum((0, 1)) / len(logits)
    torch.testing.assert_close(metrics["router/balance"], 4 * (went * scores.mean(0)).sum())


# -- which tokens count ----------------------------------------------------------------------------


def test_tokens_count_up_to_the_last_label_of_their_document():
    labels = torch.tensor([[-100, 5, -100, -100, 7, 8], [-100] * 6])
    ids = torch.zeros_like(labels)
    rows = routed_tokens(Batch({"input": ids}, labels), -100)
    assert rows.tolist() == [[True] * 6, [False] * 6]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)
    packed = routed_tokens(Batch({"input": ids, "position_ids": positions}, labels), -100)
    assert packed.tolist() == [[True, True, False, False, True, True], [False] * 6]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)
    padded = routed_tokens(Batch({"input": ids, "attention_mask": mask}, labels), -100)
    assert padded[0].tolist() == [False] + [True] * 5
    assert routed_tokens(Batch({"input": ids}, torch.zeros(2)), -100).all()


# -- metrics ---------------------------------------------------------------------------------------


def test_load_and_entropy_of_a_step_are_those_of_all_its_tokens():
    model, loss_fn = loss_of(moe(), per_expert=True)
    rows = documents()
    seen = []
    found = [router for _, router, _ in routers(model)]
    for n, router in enumerate(found):
        router.register_forward_hook(lambda m, args, output, n=n: seen.append((n, output)))
    _, metrics = run(model, loss_fn, [PaddedCollate()([row]) for row in rows])
    went, entropy, tokens = torch.zeros(2, 4), 0.0, 0
    for call, (layer, (logits, _, chosen)) in enumerate(seen):
        labels = rows[call // 2][1]
        used = used_of(labels)
        tokens += used / 2
        went[layer] += F.one_hot(chosen[:used], 4).sum((0, 1))
        p = logits[:used].softmax(-1)
        entropy = entropy - (p * p.log()).sum() / 2
    reported = loss_fn.summarize(metrics)
    ratios = went / went.mean(1, keepdim=True)
    torch.testing.assert_close(reported["router/load_max"], ratios.max())
    torch.testing.assert_close(reported["router/entropy"], (entropy / tokens).detach())
    for layer in range(2):
        for expert in range(4):
            name = f"router/load/{layer}/{expert}"
            torch.testing.assert_close(reported[name], ratios[layer, expert])
    assert "router/load" not in reported
    few = loss_of(moe())[1].summarize(metrics)
    assert {key for key in few if "/load" in key} == {"router/load_max"}


def test_a_validation_has_the_loss_of_the_tokens_alone(runtime):
    model, loss_fn = loss_of(moe())
    loss_fn.train()
    rows = [PaddedCollate()([row]) for row in documents()]

    def evaluate(loss, batches, count):
        for batch in batches:
            value, metrics = loss(model(batch.inputs["input"]), batch, count)
            yield {**metrics, "loss": value}

    class Rows(list):
        batch_size = 1

    validator = Validator(
        Rows(rows),
        eval_interval=1,
        perplexity=True,
        model_parts=[model],
        evaluate=evaluate,
        loss_fn=loss_fn,
        runtime=runtime,
    )
    found = validator.validate(0)
    plain = RoutedLoss(CrossEntropyLoss(output="logits"), balance=0, z=0)
    plain.prepare_model(model)
    expected, _ = run(model, plain, rows)
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found["router/balance"] > 1 and found["router/loss"] == 0
    assert loss_fn.training and loss_fn.part_router.training


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
@pytest.mark.parametrize("checkpointing", [full, selective])
def test_copies_of_the_model_are_recorded_and_what_is_computed_again_is_not(
    runtime, kind, checkpointing
):
    model, rows = moe(kind), documents()
    expected = by_hand(model, rows)
    gradient = gradients(expected, model)
    model, loss_fn = loss_of(model)
    copied = copy.deepcopy(model)
    shard(copied, parallel_dims=runtime.parallel_dims, activation_checkpointing=checkpointing)
    found, _ = run(copied, loss_fn, [PaddedCollate()([row]) for row in rows])
    torch.testing.assert_close(found, expected)
    recomputed = gradients(found, copied)
    wrapper = "._checkpoint_wrapped_module"
    assert_same({n.replace(wrapper, ""): g for n, g in recomputed.items()}, gradient)
    batch = Batch.of(PaddedCollate()(rows))
    with pytest.raises(ValueError, match="no router of the model was recorded"):
        loss_fn.part_router(None, batch, torch.tensor(1.0))  # once for each forward pass


def test_adapters_train_with_router_losses():
    import peft

    from ditty_di.adapters import apply_adapter
    from ditty_di.adapters import initialize as initialize_adapters

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapter = partial(apply_adapter, config=lora)
    model = from_config(config("qwen3_moe", CAUSAL["qwen3_moe"]), adapter=adapter)
    materialize(model, CPU)
    initialize(model, device=CPU, seed=1, init=hugging_face)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    initialize_adapters(model, names, device=CPU)
    expected = gradients(by_hand(model, documents(2)), model)
    model, loss_fn = loss_of(model)
    found, _ = run(model, loss_fn, [PaddedCollate()(documents(2))])
    assert_same(gradients(found, model), expected)
    assert expected and all("lora" in name for name in expected)


def test_a_model_without_routers_and_layouts_that_split_rows_or_layers_are_refused(caplog):
    loss_fn = RoutedLoss(CrossEntropyLoss(output="logits"))
    dense = from_config(config("llama", CAUSAL["llama"]))
    experts = from_config(config("mixtral", CAUSAL["mixtral"] | {"output_router_logits": True}))

    def problems(model, **degrees):
        return fits(Parts(model, loss_fn), Degrees(**degrees))

    (sentence,) = problems(dense)
    assert sentence.startswith("loss_fn: LlamaForCausalLM has no router")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router"):
        prepare_model(dense, None, loss_fn)
    assert problems(experts, dp_shard=4) == problems(experts, ep=2) == []
    for axis in ("tp", "pp"):
        (sentence,) = problems(experts, **{axis: 2})
        assert sentence.startswith(f"runtime.{axis}=2: router losses need")
    quiet = from_config(config("mixtral", CAUSAL["mixtral"]))
    in_stages = Parts(quiet, loss_fn, pipeline_fn=partial(split, schedule="1F1B"))
    assert fits(in_stages, Degrees(pp=2)) == []
    learned = UncertaintyWeightedLoss([(loss_fn, 1.0)])
    assert fits(dataclasses.replace(in_stages, loss_fn=learned), Degrees(pp=2))
    assert fits(Parts(dense, CompositeLoss([(loss_fn, 1.0)])), Degrees())
    # Its own router loss would be dropped without a word.
    prepare_model(experts, None, CrossEntropyLoss(output="logits"))
    assert "router_aux_loss_coef is not applied" in caplog.text
    caplog.clear()
    prepare_model(experts, None, loss_fn)
    assert not caplog.text


def test_a_router_whose_choice_is_not_known_is_refused_before_the_first_step():
    loss_fn = RoutedLoss(CrossEntropyLoss(output="logits"))
    for kind in ("dbrx", *SILENT, "kimi_linear"):
        model = from_config(config(kind, (CAUSAL | RARE)[kind]))
        found = fits(Parts(model, loss_fn), Degrees())
        assert len(found) == (kind == "dbrx"), kind
        assert fits(Parts(prepare_model(model, None, loss_fn), loss_fn), Degrees()) == found
    model = from_config(config("dbrx", CAUSAL["dbrx"]))
    (sentence,) = fits(Parts(filled(model), loss_fn), Degrees())
    assert sentence.startswith(
        "loss_fn: the router transformer.blocks.0.ffn.router does not choose"
    )


@pytest.mark.parametrize("name", ["balance", "z", "information"])
def test_factors_are_not_negative(name):
    with pytest.raises(ValueError, match=rf"^{name}=-1: write 0 or more"):
        RouterLoss(**{name: -1})


# -- a mixture that is trained densely -------------------------------------------------------------


def test_information_of_a_dense_mixture_has_the_gradients_of_a_loop_by_hand():
    torch.manual_seed(3)
    model = filled(from_config(dense_config()))
    expected = by_hand(model, documents(2), information=INFORMATION)
    gradient = gradients(expected, model)
    model, loss_fn = loss_of(model, information=INFORMATION)
    found, metrics = run(model, loss_fn, [PaddedCollate()(documents(2))])
    torch.testing.assert_close(found, expected)
    assert_same(gradients(found, model), gradient)
    assert metrics["router/information"] > 0


def dense_config():
    return DenseMoEConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_experts=4,
        inference_top_k=2,
        bos_token_id=None,
        eos_token_id=None,
    )
