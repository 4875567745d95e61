"""Plans equal what real trainings hold, compute and send."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed import pipelining
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ditty_di.batch import Batch
from ditty_di.data.loader import Loader
from ditty_di.data.tokens import TokenDataset
from ditty_di.loggers import flops
from ditty_di.losses import CrossEntropyLoss, LinearCrossEntropyLoss, RoutedLoss
from ditty_di.optim import grouped
from ditty_di.parallelize.activation_checkpointing import full, offload, selective
from ditty_di.parallelize.compose import parallelize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.stages import split as split_decoder
from ditty_di.planning import Recipe, plan, report
from ditty_di.planning.layers import kinds, with_blocks
from ditty_di.planning.meter import FLOPS
from ditty_di.planning.planner import fake_ranks
from ditty_di.planning.schedule import in_flight, order_of, pipeline_seconds
from ditty_di.runtime import Runtime
from tests.distributed.cases import make_trainer, optimizer, tokens
from tests.distributed.launch import launch
from tests.distributed.pipelined import Staged, split
from tests.parallelize.matrix import MODELS
from tests.planning.cases import BF16, CASES, COPIES, DEVICE, LAYERS, ROWS, SEQ, llama, muon, recipe


def planned(made: Recipe, world_size: int = 1):
    return plan(made, world_size=world_size, device=DEVICE)


def changed(name: str, ranks: int = 1, **changes) -> Recipe:
    return dataclasses.replace(recipe(name, ranks), **changes)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_are_those_of_real_ranks(ranks, tmp_path):
    several = {
        2: ["AdamW, tied", "tp", "QLoRA, tp", "cp", "ep", "pp"],
        4: ["8 bits", "LoRA", "hsdp", "ep, tp", "cp, tp"],
    }
    one = [name for name, (*_, degrees) in CASES.items() if degrees in ({}, COPIES)]
    names = one if ranks == 1 else several[ranks]
    for name, of_ranks in launch("planned", ranks, tmp_path, cases=names).items():
        assert len(of_ranks) == ranks
        for of_kinds in of_ranks:
            for kind, (ours, real) in of_kinds.items():
                assert ours == real > 0, f"{name}: {kind}"


def test_the_peak_is_that_of_torchs_tracker_on_real_ranks(tmp_path):
    """Forward and backward, without the optimizer's state; 1.4 % less than the tracker's here."""
    ours, theirs = launch("peaks", 2, tmp_path, name="SGD, bf16")
    assert ours == pytest.approx(theirs, rel=0.02)


def test_adafactor_is_planned_on_one_rank_and_refused_on_two_as_by_a_run():
    assert planned(changed("fused", optimizer=optimizer("Adafactor"))).fits
    with pytest.raises(ValueError, match="Adafactor cannot step on sharded parameters"):
        planned(changed("AdamW, tied", 2, optimizer=optimizer("Adafactor")), 2)


def test_gradients_stay_whole_between_micro_batches():
    """FSDP keeps gradients of the whole model until the last micro-batch: as much as one rank."""
    one, several = (
        planned(changed("AdamW, tied", 4, global_batch_size=16 * n), 4).worst for n in (1, 3)
    )
    whole = planned(recipe("AdamW, tied", 1)).worst.exact["gradients"]
    assert several.peak["gradients"] == pytest.approx(whole, rel=0.02)
    assert one.peak.get("gradients", 0) < whole / 2
    assert several.flops == 3 * one.flops


def test_of_experts_those_of_a_token_are_computed_and_reported_with_router_losses():
    made = changed("ep", loss_fn=RoutedLoss(CrossEntropyLoss(output="logits")))
    plan = planned(made)
    assert plan.active_parameters < plan.parameters
    experts = 4 * 4 * 3 * 32 * 32  # of all layers
    assert plan.parameters - plan.active_parameters == experts // 2
    vectors = sum(p.numel() for p in made.model.parameters() if p.dim() == 1)
    products = flops.per_token([made.model]) - 6 * vectors
    # And the scores of attention, whose backward pass computes them again.
    scores = 14 * 4 * 32 * SEQ
    assert plan.worst.flops == (products + scores) * ROWS * SEQ
    line = f"{plan.parameters:,} parameters, {plan.active_parameters:,} of them active for a token"
    assert line in report.text(plan)
    assert "of them active" not in report.text(planned(recipe("AdamW, tied", 1)))


# -- few blocks ------------------------------------------------------------------------------------


def by_layer(named):
    """AdamW with a group for each block: none of them is like another, so all are run."""
    groups = [{"match": rf"layers\.{n}\."} for n in range(LAYERS)]
    return grouped(named, optimizer=partial(torch.optim.AdamW, lr=1e-2), groups=groups)


@pytest.mark.parametrize("rows", [16, 32], ids=["a micro-batch", "two micro-batches"])
def test_few_blocks_tell_what_all_of_them_take(rows):
    few, everything = (
        planned(changed("AdamW, tied", 4, optimizer=one, global_batch_size=rows), 4).worst
        for one in (optimizer("AdamW"), by_layer)
    )
    # An update by groups has other temporary tensors and times; other seconds are rounded.
    seconds = ("compute", "exposed", "overlapped")
    few_seconds, all_seconds = ([getattr(one, s) for s in seconds] for one in (few, everything))
    assert few_seconds == pytest.approx(all_seconds, rel=1e-9)
    zero = dict.fromkeys((*seconds, "update"), 0.0)
    assert dataclasses.replace(few, **zero) == dataclasses.replace(everything, **zero)
    assert few.bytes > few.exact["parameters"] + few.exact["optimizer"]


def test_blocks_of_a_kind_share_shapes_settings_and_the_optimizers_treatment():
    class Block(nn.Module):
        def __init__(self, kind: str, size: int = 4) -> None:
            super().__init__()
            self.layer_type, self.linear = kind, nn.Linear(size, size)

    model = nn.Module()
    model.layers = nn.ModuleList(
        [Block("full"), Block("sliding"), Block("full"), Block("sliding"), Block("full", 8)]
    )
    assert kinds(model, {}) == [[0, 2], [1, 3], [4]]
    special = {id(model.layers[2].linear.weight): 1}
    assert kinds(model, special) == [[0], [1, 3], [2], [4]]
    cut = with_blocks(model, blocks=[1, 4])
    assert [block.layer_type for block in cut.layers] == ["sliding", "full"]
    assert all(p.is_meta for p in cut.parameters()) and len(model.layers) == 5


def test_a_copy_on_meta_is_tied_and_its_configuration_has_the_blocks_that_are_left():
    model = llama()
    model.config.layer_types = [f"kind {n}" for n in range(LAYERS)]
    cut = with_blocks(model, blocks=[0, 3])
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert cut.config.layer_types == ["kind 0", "kind 3"] and cut.model.config is cut.config
    assert len(model.config.layer_types) == LAYERS


# -- operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallelize_fn": partial(shard, activation_checkpointing=full)},
        {"parallelize_fn": partial(BF16, activation_checkpointing=selective)},
        {"global_batch_size": 2 * ROWS},
        {"loss_fn": LinearCrossEntropyLoss(chunk_tokens=50)},
        {"optimizer": muon},
    ],
    ids=["plain", "recomputed", "selective", "accumulated", "chunked", "Muon"],
)
def test_operations_are_those_that_torch_counts(changes):
    model = partial(llama, attn_implementation="eager")  # torch does not count the CPU's attention
    made = changed("AdamW, tied", **{"model": model(), **changes})
    slots = {key: value for key, value in changes.items() if key != "global_batch_size"}
    trainer, _ = make_trainer(
        None,
        model=model(),
        rows=made.global_batch_size or ROWS,
        accumulation=(made.global_batch_size or ROWS) // ROWS,
        dataloader=partial(Loader, TokenDataset(tokens(), SEQ), micro_batch_size=ROWS),
        max_steps=1,
        **slots,
    )
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    trainer.close()
    trainer.runtime.close()
    assert planned(made).worst.flops == counter.get_total_flops() > 0


def test_attention_on_a_cpu_counts_as_on_a_gpu():
    shape = (2, 4, 64, 16)
    query = torch.empty(shape, device="meta")
    forward, backward = (
        FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")]
        for name in ("", "_backward")
    )
    assert forward(query, query, query) == sdpa_flop_count(shape, shape, shape)
    assert backward(query, query, query, query) == sdpa_backward_flop_count(*[shape] * 4)


# -- traffic ---------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Blocks of two matrices, which two ranks share by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32)) for _ in range(6)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def columns_and_rows(model, /, *, parallel_dims):
    if parallel_dims.tp_enabled:
        styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, parallel_dims.get_mesh("tp"), styles)
    return shard(model, parallel_dims=parallel_dims)


def test_tensor_parallel_halves_the_operations_and_sums_each_block():
    x, labels = torch.zeros(8, 32), torch.zeros(8, dtype=torch.int64)

    def of(tp: int):
        made = Recipe(
            model=Wide(),
            loss_fn=CrossEntropyLoss(),
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            runtime=partial(Runtime, tp=tp),
            batch=Batch({"input": x.requires_grad_()}, labels),
            parallelize_fn=columns_and_rows,
        )
        return planned(made, 4).worst

    one, two = of(1), of(2)
    assert two.flops == one.flops / 2
    sums = {key: size for key, size in two.traffic.items() if "over tp" in key}
    # A sum of the output of each block forward, and of the gradient of its input backward.
    assert sums["all_reduce over tp (node)"] == pytest.approx(2 * 6 * x.numel() * 4, rel=0.01)
    assert two.exposed > 0 == one.exposed
    # Four ranks share all of it, whichever way, but biases that all of tp have.
    weights = one.exact["parameters"] * 4
    assert weights / 4 < two.exact["parameters"] < weights / 3.8
    gathers = {key: size for key, size in one.traffic.items() if "all_gather over fsdp" in key}
    assert gathers.keys() == {"all_gather over fsdp (network)"}, "four ranks of two machines"


def test_context_and_expert_parallelism_send_keys_values_and_tokens():
    hidden, tokens_of_a_rank = 32, ROWS * SEQ
    key_value_bytes = tokens_of_a_rank * 2 * 2 * 8 * 4  # both, of 2 heads of 8 float32 each
    routed_bytes = tokens_of_a_rank * 2 * hidden * 4  # to 2 experts
    for model, name, kind, size in (
        # Forward keys and values are gathered; there and back, in both passes, tokens are sent.
        ("Llama", "cp", "all_gather over cp (node)", key_value_bytes),
        ("Qwen3-MoE", "ep", "all_to_all over ep (node)", 4 * routed_bytes),
    ):
        made = changed(
            "AdamW, tied",
            model=MODELS[model].build({}, None),
            runtime=partial(Runtime, **{name: 2}),
            parallelize_fn=parallelize,
        )
        traffic, layers = planned(made, 2).worst.traffic, made.model.config.num_hidden_layers
        assert traffic[kind] == pytest.approx(layers * size, rel=0.001), "and how many go where"
        assert "reduce_scatter over fsdp (node)" in traffic


def test_activations_on_the_host_leave_the_device():
    plain, offloaded = (
        planned(changed("AdamW, tied", parallelize_fn=partial(shard, activation_checkpointing=f)))
        for f in (None, offload)
    )
    assert offloaded.worst.flops == plain.worst.flops
    assert offloaded.worst.peak["activations"] < plain.worst.peak["activations"] / 2


def test_a_compiled_update_needs_no_memory_of_its_own():
    """Eager, the update of a matrix in 8 bits takes some twenty tensors of its size."""
    made = Recipe(
        model=Wide(),
        loss_fn=CrossEntropyLoss(),
        optimizer=optimizer("AdamW8bit"),
        runtime=Runtime,
        batch=Batch({"input": torch.zeros(1, 32)}, torch.zeros(1, dtype=torch.int64)),
        parallelize_fn=columns_and_rows,
    )
    worst = planned(made).worst
    held = sum(worst.exact[kind] for kind in ("parameters", "gradients", "optimizer"))
    assert held < worst.bytes < 1.2 * held and worst.update > 0


# -- pipelines -------------------------------------------------------------------------------------


def test_stages_are_planned_with_the_micro_batches_in_flight():
    ids = torch.zeros(4, 32, dtype=torch.int64)

    def of(micro_batches: int):
        made = Recipe(
            model=Staged(),
            loss_fn=CrossEntropyLoss(),
            optimizer=partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
            runtime=partial(Runtime, pp=2),
            batch=Batch({"input": ids}, ids),
            pipeline_fn=partial(split, n_microbatches=micro_batches),
            global_batch_size=4 * micro_batches,
        )
        return planned(made, 2)

    two, four = of(2), of(4)
    sizes = [(64 * 32 + 32 * 33) * 4, (32 * 33 + 64 * 33) * 4]
    for position, size in enumerate(sizes):
        exact = four.positions[position].exact
        assert {exact[kind] for kind in ("parameters", "gradients", "optimizer")} == {size}
    output = 4 * 32 * 32 * 4
    for made in (two, four):  # whatever their number, two are in flight in the first stage
        held = [position.peak["activations"] / (3 * output) for position in made.positions]
        assert held == pytest.approx([2, 1], rel=0.02)
    assert four.positions[0].traffic["send over pp (node)"] == 2 * 4 * output
    assert four.seconds < 2 * two.seconds, "stages work at the same time"
    assert "position 1" in report.text(four)


def test_stages_of_the_same_tensors_with_other_modules_are_planned_apart():
    class Twice(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(self.mlp(x))

    model = MODELS["Llama"].build({}, None)
    model.model.layers[2].mlp = Twice(model.model.layers[2].mlp)
    made = changed(
        "pp",
        model=model,
        runtime=partial(Runtime, pp=4),
        pipeline_fn=partial(split_decoder, layers=[1, 1, 1, 1]),
        global_batch_size=4 * ROWS,
    )
    _, once, twice, _ = planned(made, 4).positions
    assert twice.exact == once.exact and twice.flops > 1.3 * once.flops


@pytest.mark.parametrize("micro_batches", [4, 8])
@pytest.mark.parametrize("name", ["ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B"])
def test_a_schedule_takes_the_time_of_its_passes_and_its_bubble(name, micro_batches):
    ranks, per_rank = 4, 2 if "Interleaved" in name else 1
    with fake_ranks(ranks):
        stages = [
            pipelining.PipelineStage(nn.Linear(1, 1), n * ranks, ranks * per_rank, "cpu")
            for n in range(per_rank)
        ]
        kind = getattr(pipelining, name)
        schedule = kind(stages if per_rank > 1 else stages[0], micro_batches)
        order = order_of(schedule, micro_batches)
    numbers = range(ranks * per_rank)
    seconds = pipeline_seconds(order, dict.fromkeys(numbers, 1.0), dict.fromkeys(numbers, 2.0))
    # Narayanan et al. 2021, arXiv:2104.04473, section 2.2: the bubble is (p - 1) / (v m).
    assert seconds == 3.0 * per_rank * micro_batches + 3.0 * (ranks - 1)
    flying = [in_flight(order[rank], dict.fromkeys(numbers, 1)) for rank in range(ranks)]
    if name == "ScheduleGPipe":
        assert flying == [micro_batches] * ranks
    elif name == "Schedule1F1B":
        assert flying == [4, 3, 2, 1]


# -- what does not fit -----------------------------------------------------------------------------


def test_what_to_change_first_is_about_the_largest_kind_of_memory():
    small = dataclasses.replace(DEVICE, memory_gib=1e-4)
    made = plan(recipe("AdamW, tied", 1), world_size=1, device=small)
    assert not made.fits
    largest = max(made.worst.peak, key=made.worst.peak.get)
    assert report.change_first(made)[0].startswith(f"{largest}: ")
    assert "does not fit" in report.text(made)


@pytest.mark.parametrize(
    "changes, ranks, message",
    [
        ({}, 0, "world_size=0: write the number of ranks"),
        ({"runtime": partial(Runtime, tp=3)}, 4, "does not divide 4 ranks"),
        (
            {"runtime": partial(Runtime, tp=4), "parallelize_fn": parallelize},
            *(4, "runtime.tp=4: 2 key-value heads; tp fits 1, 2"),
        ),
        ({"parallelize_fn": None}, 2, "2 data-parallel ranks need a function"),
        (
            {"runtime": partial(Runtime, pp=2), "pipeline_fn": None},
            *(2, "pp > 1 needs a function that splits"),
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        planned(changed("AdamW, tied", ranks, **changes), ranks)
    assert not torch.distributed.is_initialized()


def test_rows_that_do_not_divide_are_planned_and_noted():
    made = planned(changed("AdamW, tied", 4, global_batch_size=8), 4)
    assert made.micro_batches == 1 and "global_batch_size=16" in made.notes[0]


@pytest.mark.parametrize(
    "figures, message",
    [
        ({"memory_gib": 0}, "memory_gib=0"),
        ({"tflops": {"bfloat16": 1}}, "add float32"),
        ({"tflops": {"float32": 1, "bf16": 1}}, "tflops.bf16=1: write a dtype"),
    ],
)
def test_figures_of_a_device_are_checked(figures, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DEVICE, **figures)
