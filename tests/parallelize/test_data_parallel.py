"""Recomputation, compiling and precision change how a step is computed, not what."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ditty_di import adapters, quantization
from ditty_di.fqn import canonical_fqn
from ditty_di.losses import skip_lm_head
from ditty_di.parallelize.activation_checkpointing import full, selective
from ditty_di.parallelize.data_parallel import shard
from ditty_di.precision.casting import release_copies
from ditty_di.runtime import Runtime
from tests.checkpoint.ranks import run as run_ranks
from tests.distributed.cases import make_trainer
from tests.precision import cases


@pytest.fixture
def runtime():
    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()


def run(**options):
    trainer, recorder = make_trainer(
        None, max_steps=4, dropout=0.1, parallelize_fn=partial(shard, **options)
    )
    trainer.train()
    return recorder.losses(), trainer


@pytest.mark.parametrize(
    "activation_checkpointing", [full, selective, partial(selective, recompute_every_nth_matmul=1)]
)
def test_recomputed_activations_give_the_same_losses_and_names(runtime, activation_checkpointing):
    plain, trainer = run()
    recomputed, wrapped = run(activation_checkpointing=activation_checkpointing)
    assert recomputed == plain
    names = [
        [canonical_fqn(n) for n, _ in t.model_parts[0].named_parameters()]
        for t in (trainer, wrapped)
    ]
    assert names[0] == names[1]


def test_every_second_block_is_recomputed(runtime):
    _, trainer = run(activation_checkpointing=full, checkpoint_every_n_blocks=2)
    wrapped = [
        hasattr(b, "_checkpoint_wrapped_module") for b in trainer.model_parts[0].model.layers
    ]
    assert wrapped == [True, False]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(runtime):
    def losses(**options):
        trainer, recorder = make_trainer(
            None, max_steps=4, parallelize_fn=partial(shard, **options)
        )
        trainer.train()
        return recorder.losses()

    assert losses(compile={}) == pytest.approx(losses(), abs=1e-4)


def test_compiled_checkpoints_save_the_input_alone_of_quantized_layers(runtime):
    """What an autograd function computes is recomputed too (not so on torch 2.11 by itself)."""
    layers = (nn.Sequential(nn.Linear(64, 64, bias=False), nn.SiLU()) for _ in range(4))
    block = nn.Sequential(*layers)  # the backward pass of SiLU needs its input
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    shard(
        quantization.nf4(model, skip=()),
        parallel_dims=runtime.parallel_dims,
        activation_checkpointing=full,
        compile={"backend": "aot_eager_decomp_partition"},
    )
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    inputs = torch.randn(512, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.blocks[0](inputs)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    activations = sum(size for where, size in saved.items() if where not in weights)
    tables = 4 * 256 * 2 * 4  # bytes: what values pairs of bits are, without bitsandbytes
    assert activations <= inputs.nbytes + tables
    output.sum().backward()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(runtime):
    (*losses,), trainer = run(param_dtype="bfloat16", reduce_dtype="float32")
    (*exact,), _ = run()
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.05)
    assert {p.dtype for p in trainer.model_parts[0].parameters()} == {torch.float32}


def test_copies_in_bfloat16_end_with_the_backward_pass_and_the_training(runtime):
    """What reads `module.weight` between steps must not see the values before the update."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    shard(model, parallel_dims=runtime.parallel_dims, param_dtype="bfloat16")
    output = model(torch.randn(4, 2))
    assert model[0].weight.dtype == torch.bfloat16  # for a loss that uses the head
    output.float().sum().backward()
    assert model[0].weight is model[0]._parameters["weight"]
    with torch.no_grad():
        model(torch.randn(4, 2))
    release_copies(model)
    assert model[1].bias is model[1]._parameters["bias"]
    copy.deepcopy(model)


def test_the_repeated_blocks_are_found_and_can_be_named(runtime):
    model = nn.ModuleDict(
        {
            "a": nn.ModuleList([nn.Linear(2, 2)]),
            "b": nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]),
        }
    )
    wrapped: list[nn.Module] = []

    def note(block):
        wrapped.append(block)
        return block

    shard(model["b"], parallel_dims=runtime.parallel_dims, activation_checkpointing=note)
    assert wrapped == list(model["b"])
    wrapped.clear()
    shard(model, parallel_dims=runtime.parallel_dims, activation_checkpointing=note, blocks="a")
    assert wrapped == list(model["a"])
    for path, message in (("c", "has no attribute"), ("a.0", "has no modules in it")):
        with pytest.raises(ValueError, match=message):
            shard(model, parallel_dims=runtime.parallel_dims, blocks=path)


def test_trainable_parameters_of_two_dtypes_in_a_unit_are_named(runtime):
    def build(dtype, frozen=False):
        block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=dtype))
        block[1].requires_grad_(not frozen)
        return nn.Sequential(nn.ModuleList([block]), nn.Linear(2, 2))

    def sharded(model):
        return shard(model, parallel_dims=runtime.parallel_dims, param_dtype="bfloat16")

    found = r"0\.0\.0\.weight \(torch\.float32\) and 0\.0\.1\.weight \(torch\.bfloat16\)"
    with pytest.raises(ValueError, match=found):
        sharded(build(torch.bfloat16))
    for frozen in (torch.bfloat16, torch.float16):
        sharded(build(frozen, frozen=True))


def gathered_after_forward():
    """Which layers are whole after a forward pass, with and without resharding."""
    runtime = Runtime()
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 4))

    def gathered(reshard):
        one = copy.deepcopy(model)
        one.forward = lambda x: one[1](one[0][1](one[0][0](x)))
        shard(
            one,
            parallel_dims=runtime.parallel_dims,
            param_dtype="float64",
            reshard_after_forward=reshard,
        )
        output = one(torch.randn(2, 4))
        after = [not isinstance(m.weight, DTensor) for m in (*one[0], one[1])]
        output.sum().backward()
        assert all(isinstance(p, DTensor) and p.grad is not None for p in one.parameters())
        return after

    return gathered(True), gathered(False)


def test_only_the_outermost_unit_stays_gathered_until_backward():
    """Its output head is used by the loss, after its forward pass."""
    for resharded, kept in run_ranks(gathered_after_forward, 2):
        assert resharded == [False, False, True]
        assert kept == [True, True, True]


def test_a_model_that_is_sharded_in_part_is_refused(runtime):
    def only_the_blocks(model, *, parallel_dims):
        for block in model.model.layers:
            fully_shard(block, mesh=parallel_dims.get_mesh("fsdp"))
        return model

    with pytest.raises(ValueError, match=r"2 trainable parameters are plain .*'model\.embed"):
        make_trainer(None, parallelize_fn=only_the_blocks)


def test_on_one_rank_nothing_is_sharded(runtime):
    for options in ({}, cases.BF16):
        _, trainer = run(**options)
        assert not hasattr(trainer.model_parts[0], "unshard")


def fsdp(model, *, parallel_dims, activation_checkpointing=None, param_dtype="bfloat16"):
    """Mixed precision by FSDP2 itself."""
    for i, block in enumerate(list(model.get_submodule(BLOCKS[type(model).__name__]))):
        if activation_checkpointing is not None:
            block = activation_checkpointing(block)
            model.get_submodule(BLOCKS[type(model).__name__]).register_module(str(i), block)
        fully_shard(block, mesh=parallel_dims.get_mesh("fsdp"), mp_policy=policy(param_dtype))
    fully_shard(model, mesh=parallel_dims.get_mesh("fsdp"), mp_policy=policy(param_dtype))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return model


BLOCKS = {
    "LlamaForCausalLM": "model.layers",
    "PeftModel": "base_model.model.model.layers",
    "PeftModelForCausalLM": "base_model.model.model.layers",
}


def policy(dtype):
    return MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)


def copies(model):
    """Adapters and modules that are trained whole, in float32 on a base of 16 bits."""
    names = {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}
    return adapters.apply_adapter(model, config=LoraConfig(r=4, **names))


@pytest.mark.parametrize(
    "model, options",
    [
        (cases.llama, {}),
        (cases.llama, {"activation_checkpointing": full}),
        (cases.llama, {"head": skip_lm_head}),
        (partial(cases.llama, "bfloat16", adapter=cases.lora), {}),
        (
            partial(cases.llama, "bfloat16", adapter=cases.lora),
            {"activation_checkpointing": selective},
        ),
        (partial(cases.llama, adapter=cases.lora), {}),
        (partial(cases.llama, "bfloat16", adapter=copies), {}),
        (partial(cases.llama, "bfloat16", adapter=cases.lora, quantize=quantization.nf4), {}),
    ],
    ids=["full", "recomputed", "deferred", "lora", "lora-selective", "lora-32", "copies", "nf4"],
)
def test_one_rank_casts_to_the_losses_of_fsdp_bit_for_bit(runtime, model, options):
    def losses(parallelize, **more):
        transforms = {name: options[name] for name in options if name == "head"}
        rest = {name: options[name] for name in options if name != "head"}
        trainer, recorder = make_trainer(
            None,
            max_steps=4,
            accumulation=2,
            model=model(**transforms),
            parallelize_fn=partial(parallelize, **rest, **more),
        )
        trainer.train()
        sharded = hasattr(trainer.model_parts[0], "unshard")
        parameters = [p.detach() for p in trainer.model_parts[0].parameters()]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
        return recorder.losses(), whole, sharded

    got, parameters, sharded = losses(shard, **cases.BF16)
    expected, others, by_fsdp = losses(fsdp)
    assert (sharded, by_fsdp) == (False, True)
    assert got == expected and len(set(got)) == 4
    assert all(map(torch.equal, parameters, others))


@pytest.mark.slow
def test_adapters_in_bfloat16_under_fsdp_with_recomputation():
    losses, _ = run_ranks(cases.combinations, 2, "plain", "full", "selective", timeout=300)
    assert losses["full"] == losses["selective"] == losses["plain"]


@pytest.mark.slow
def test_adapters_in_bfloat16_under_fsdp_compiled_and_recomputed():
    """A fused kernel rounds to bfloat16 less often than the operators that it replaces."""
    (losses,) = run_ranks(cases.combinations, 1, "plain", "compiled", timeout=500)
    assert losses["compiled"] == pytest.approx(losses["plain"], abs=0.01)
