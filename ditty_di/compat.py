"""Shims for differences between torch versions, and for torchtitan without an accelerator.

Importing this module applies them, so it must be imported before torchtitan. Each shim tests for
the capability, never for the version, and names the torch version that makes it obsolete.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed
import torch.distributed.fsdp
import torch.distributed.pipelining
import torchtitan.tools.utils  # noqa: F401  (so that `_cpu_device` finds it)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
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


def _cpu_device() -> None:
    """Needed by every version: torchtitan 0.3 falls back to "cuda" where there is no accelerator.

    Its modules copy the two names when they are imported, some perhaps before this one.
    """
    if torch.accelerator.is_available():
        return
    names = {"device_type": "cpu", "device_module": CPUModule("ditty_di.compat.cpu")}
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            vars(module).update({k: v for k, v in names.items() if k in vars(module)})


def _set_timeout() -> None:
    """Obsolete from torch 2.14: `torch.distributed.set_timeout` is public there."""
    if not hasattr(torch.distributed, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout

        def set_timeout(timeout: Any, group: Any = None) -> None:
            _set_pg_timeout(timeout, group)

        vars(torch.distributed)["set_timeout"] = set_timeout


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


def _low_bit_views_keep_their_dtype() -> None:
    """Needed by every version so far: a view of torchao's low-bit optimizer state loses its dtype.

    Sharded state of bfloat16 parameters then says float32 to some and bfloat16 to others.
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


class _Postponed:
    """A function or class whose module is imported when it is called or tested for instances."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @property
    def _real(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._real)


def _import_torchtitan_without_datasets() -> None:
    """Needed by every version: torchtitan 0.3's trainer imports `datasets`, pandas and pyarrow.

    That takes a quarter of its time, for text loaders; here it is imported when one of them reads.
    """
    names = {
        "datasets": ("Dataset", "load_dataset"),
        "datasets.distributed": ("split_dataset_by_node",),
    }
    absent = [module for module in names if module not in sys.modules]
    for module in absent:
        sys.modules[module] = ModuleType(module)
        vars(sys.modules[module]).update({name: _Postponed(module, name) for name in names[module]})
    try:
        from torchtitan.hf_datasets import text_datasets  # noqa: F401
    finally:
        for module in absent:
            del sys.modules[module]


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


def sum_gradients_on_gloo(model: torch.nn.Module) -> None:
    """Let FSDP2 sum gradients: gloo lacks the pre-multiplied sum that it uses by default.

    Needed by every version.

    Args:
        model: a model that FSDP2 has wrapped.
    """
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


_cpu_device()
_set_timeout()
_data_parallel_mesh_dims()
_pipeline_stage()
_integers_keep_their_dtype()
_low_bit_views_keep_their_dtype()
_muon_keeps_placements()
_one_sum_of_a_shared_weight()
_compile_flex_attention_when_built()
_import_torchtitan_without_datasets()
if PIPELINE_TAKES_MICROBATCHES:
    SPMD_BACKENDS = ("partial_dtensor", "full_dtensor", "spmd_types")
