"""Shims for differences between torch versions, and for torchtitan without an accelerator.

Importing this module applies them, so it must be imported before torchtitan. Each shim tests for
the capability, never for the version, and names the torch version that makes it obsolete.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed
import torch.distributed.fsdp
import torch.distributed.pipelining
import torchtitan.tools.utils  # noqa: F401  (so that `_cpu_device` finds it)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _ComputationType
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

#: SPMD backends of torchtitan that work on this torch: `partial_dtensor` everywhere. Below 2.14,
#: `spmd_types` refuses FSDP parameters and `full_dtensor` logs the loss times the dp degree.
SPMD_BACKENDS: tuple[str, ...] = ("partial_dtensor",)

#: Whether a pipeline schedule's `step` takes lists of micro-batches (2.14 and newer).
PIPELINE_TAKES_MICROBATCHES: bool = (
    "arg_mbs" in inspect.signature(PipelineScheduleSingle.step).parameters
)


class CPUModule(ModuleType):
    """Add to `torch.cpu` the few functions that torchtitan calls on any device module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """Return 0, the only device."""
        return 0

    def get_device_name(self, device: Any = None) -> str:
        """Return "cpu"."""
        return "cpu"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        """Return a name and the machine's memory in bytes."""
        pages = os.sysconf("SC_PHYS_PAGES")
        return SimpleNamespace(name="cpu", total_memory=pages * os.sysconf("SC_PAGE_SIZE"))

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Return no statistics."""
        return {}


def _use_cpu() -> list[tuple[dict[str, Any], str, Any]]:
    """Set the device to the CPU in all modules that copied it when imported; return what it was."""
    names = {"device_type": "cpu", "device_module": CPUModule("ditty_di.compat.cpu")}
    before = []
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan.") or name == "ditty_di.runtime":
            own = vars(module)
            before += [(own, key, own[key]) for key in names.keys() & own.keys()]
            own.update({key: value for key, value in names.items() if key in own})
    return before


@contextmanager
def cpu_device() -> Iterator[None]:
    """Let torchtitan and `Runtime` use the CPU within the context, also beside an accelerator."""
    before = _use_cpu()
    try:
        yield
    finally:
        for own, key, value in before:
            own[key] = value


def _cpu_device() -> None:
    """Needed by every version: without an accelerator torchtitan 0.3 falls back to "cuda"."""
    if not torch.accelerator.is_available():
        _use_cpu()


def _set_timeout() -> None:
    """Obsolete from torch 2.14: `torch.distributed.set_timeout` is public there."""
    if not hasattr(torch.distributed, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout

        vars(torch.distributed)["set_timeout"] = _set_pg_timeout


def _data_parallel_mesh_dims() -> None:
    """Obsolete from torch 2.12: torchtitan only needs the name to import where it is missing."""
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):

        @dataclass(frozen=True)
        class DataParallelMeshDims:
            shard: Any = None
            replicate: Any = None

        vars(torch.distributed.fsdp)["DataParallelMeshDims"] = DataParallelMeshDims


def _pipeline_stage() -> None:
    """Obsolete from torch 2.12: `PipelineStage` takes `get_mesh` there."""
    stage = torch.distributed.pipelining.PipelineStage
    if "get_mesh" not in inspect.signature(stage.__init__).parameters:

        class PipelineStage(stage):  # type: ignore[valid-type,misc]
            def __init__(self, *args: Any, get_mesh: Any = None, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        vars(torch.distributed.pipelining)["PipelineStage"] = PipelineStage


def _integers_keep_their_dtype() -> None:
    """Obsolete from torch 2.13: FSDP2's mixed precision gathers integers as `param_dtype`.

    Their shards would need gradients, which integers cannot have.
    Quantized weights are integers. Where torch does it itself, this changes nothing.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    def parameter(data: torch.Tensor, requires_grad: bool = True) -> torch.nn.Parameter:
        floats = data.is_floating_point() or data.is_complex()
        return torch.nn.Parameter(data, requires_grad=requires_grad and floats)

    init_shard: Any = inspect.unwrap(FSDPParam._init_sharded_param)
    if "requires_grad_" in init_shard.__code__.co_names:  # asked for afterwards
        vars(_fsdp_param)["nn"] = SimpleNamespace(Module=torch.nn.Module, Parameter=parameter)

    init = FSDPParam.init_dtype_attrs

    def init_dtype_attrs(self: FSDPParam, mp_policy: Any) -> None:
        init(self, mp_policy)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    vars_of: Any = FSDPParam
    vars_of.init_dtype_attrs = init_dtype_attrs


@functools.cache
def low_bit_views_keep_their_dtype() -> None:
    """Needed by every version so far: a view of torchao's low-bit optimizer state loses its dtype.

    Sharded state of bfloat16 parameters then says float32 to some and bfloat16 to others. It is
    called where such an optimizer is built, because importing torchao takes a third of a second.
    """
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    view = torch.ops.aten.view.default
    for state in (OptimState4bit, OptimState8bit, OptimStateFp8):
        own = state._ATEN_OP_TABLE[state][view]

        def with_dtype(func: Any, types: Any, args: Any, kwargs: Any, own: Any = own) -> Any:
            out = own(func, types, args, kwargs)
            # Changes what it looks like, and copies nothing.
            to = args[0].dtype
            return out if out.dtype == to else torch.ops.aten._to_copy.default(out, dtype=to)

        state._ATEN_OP_TABLE[state][view] = with_dtype


def _muon_keeps_placements() -> None:
    """Needed by every version so far: Muon adds a whole update to a sharded matrix in place.

    DTensor takes a dimension of one for broadcast and refuses that: a head of one row.
    """
    from torch.distributed.tensor import DTensor
    from torch.optim import _muon

    orthogonalised = _muon._zeropower_via_newtonschulz

    def as_the_gradient(grad: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        update = orthogonalised(grad, *args, **kwargs)
        if isinstance(grad, DTensor) and isinstance(update, DTensor):
            update = update.redistribute(placements=grad.placements)
        return update

    vars(_muon)["_zeropower_via_newtonschulz"] = as_the_gradient


def _one_sum_of_a_shared_weight() -> None:
    """Sum the gradients of a shared weight (a tied embedding) in `param_dtype` always.

    Needed from torch 2.15 on: its FSDP2 adds the gradients of a weight's several uses in float32 in
    the first micro-batch of an optimizer step, and in `param_dtype` in the others.

    Before it, and here, all are added in `param_dtype`: losses do not depend on how a window is cut
    into micro-batches or on whether FSDP runs at all. Over micro-batches float32 stays.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    group: Any = FSDPParamGroup
    if not hasattr(group, "_set_unsharded_grad_dtypes"):
        return
    defer, post_forward = group._set_unsharded_grad_dtypes, group.post_forward

    def as_computed(self: Any) -> None:
        for fsdp_param in self._fsdp_params_with_wider_grad_dtype:
            param = getattr(fsdp_param, "_unsharded_param", None)
            if param is not None and param.requires_grad:
                param.grad_dtype = None

    def set_dtypes(self: Any, defer_upcast: bool) -> None:
        defer(self, defer_upcast)
        if defer_upcast:  # what follows the backward pass casts new gradients
            as_computed(self)

    def after_forward(self: Any, *args: Any) -> Any:
        output = post_forward(self, *args)
        as_computed(self)  # a loss that uses the output head comes before the group's backward
        return output

    group._set_unsharded_grad_dtypes, group.post_forward = set_dtypes, after_forward


def _compile_flex_attention_when_built() -> None:
    """Needed by every version: torchtitan 0.3 compiles two functions when it is imported.

    That imports inductor, a quarter of the trainer's import; here the first such module does it.
    """
    now = torch.compile
    torch.compile = lambda model=None, **options: (  # type: ignore[assignment]
        model if model in (flex_attention, create_block_mask) else now(model, **options)
    )
    try:
        from torchtitan.models.common import attention
    finally:
        torch.compile = now
    flex: Any = attention.FlexAttention
    init = flex.__init__

    @functools.wraps(init)
    def compile_once(self: Any, *args: Any, **kwargs: Any) -> None:
        flex.__init__ = init
        if flex._compiled_flex_attn is flex_attention:
            flex._compiled_flex_attn = torch.compile(flex_attention, options=flex.inductor_configs)
            vars(attention)["_compiled_create_block_mask"] = torch.compile(create_block_mask)
        init(self, *args, **kwargs)

    flex.__init__ = compile_once


def _checkpointed_functions_are_recomputed() -> None:
    """Obsolete from torch 2.12, which has no `tag_nodes`.

    Before it, compiled code saves what an `autograd.Function` computes in a checkpointed block, for
    it marks only the nodes of the outer graph for recomputation: 23 GiB for Llama 3.1 8B with
    quantized linear layers and 4096 tokens.
    """
    from torch._higher_order_ops.wrap import TagActivationCheckpoint

    tag_outer = getattr(TagActivationCheckpoint, "tag_nodes", None)
    if tag_outer is None:
        return

    def tag_nodes(graph: torch.fx.GraphModule, is_sac: bool) -> torch.fx.GraphModule:
        tag_outer(graph, is_sac)
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.autograd_function_apply:
                forward: Any = graph.get_submodule(node.args[0].target)
                for inner in forward.graph.nodes:
                    marks = ("ac_graph_id", "recompute")
                    inner.meta.update({mark: node.meta[mark] for mark in marks})
        return graph

    vars_of: Any = TagActivationCheckpoint
    vars_of.tag_nodes = staticmethod(tag_nodes)


def sum_gradients_on_gloo(model: torch.nn.Module) -> None:
    """Let FSDP2 sum gradients: gloo lacks the pre-multiplied sum that it uses by default.

    Needed by every version.

    Args:
        model: a model that FSDP2 has wrapped.
    """
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def run_micro_batches(
    schedule: Any, inputs: list[dict[str, Any]], *, backward: bool, first: bool, last: bool
) -> list[torch.Tensor] | None:
    """Run a pipeline schedule on micro-batches, and return their losses; None without a last stage.

    Obsolete from torch 2.14: `step` and `eval` take lists of micro-batches there.

    Args:
        schedule: torch's, whose loss gets the number of a micro-batch, `[1]`, as the target.
        inputs: arguments of the model for each micro-batch; `"input"` is the positional one.
        backward: whether gradients are computed.
        first: whether this rank has the first stage.
        last: whether this rank has the last stage.
    """
    losses: list[torch.Tensor] | None = [] if last else None
    micro_batches = {
        "arg_mbs": [(one["input"],) for one in inputs] if first else None,
        "kwarg_mbs": [{k: v for k, v in one.items() if k != "input"} for one in inputs],
        "target_mbs": list(torch.arange(len(inputs)).split(1)) if last else None,
        "losses": losses,
        "return_outputs": False,
    }
    if PIPELINE_TAKES_MICROBATCHES:
        run = schedule.step if backward else schedule.eval
        run(**micro_batches)
        return losses
    before, schedule._has_backward = schedule._has_backward, backward
    single = isinstance(schedule, PipelineScheduleSingle)
    try:
        for stage in [schedule._stage] if single else schedule._stages:
            stage.has_backward = backward
            stage.clear_runtime_states()
        schedule._step_microbatches(**micro_batches)
    finally:
        schedule._has_backward = before
    return losses


def forward_only(schedule: Any) -> None:
    """Leave the backward passes out of a pipeline schedule of several stages a rank.

    Needed by every version: where two stages that follow each other are on one rank, `eval` expects
    gradients of the second.

    Args:
        schedule: torch's; it is changed.
    """
    kept = {
        _ComputationType[name] for name in ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
    }
    order = schedule.pipeline_order_with_comms
    for rank, actions in order.items():
        order[rank] = [action for action in actions if action.computation_type in kept]


_cpu_device()
_set_timeout()
_data_parallel_mesh_dims()
_pipeline_stage()
_integers_keep_their_dtype()
_muon_keeps_placements()
_one_sum_of_a_shared_weight()
_compile_flex_attention_when_built()
_checkpointed_functions_are_recomputed()
if PIPELINE_TAKES_MICROBATCHES:
    SPMD_BACKENDS = ("partial_dtensor", "full_dtensor", "spmd_types")
