"""Ranks and tensors without any behind them, on which a training's own functions run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.tensor import debug
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ditty_di.compat import cpu_device
from ditty_di.data.options import require
from ditty_di.parallelize import context
from ditty_di.replaced import replaced

aten = torch.ops.aten


@contextmanager
def fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Play a rank of a process group that sends nothing; all ranks say what this one says.

    Args:
        world_size: number of ranks.
        rank: the one that is played.

    Raises:
        ValueError: this process has a process group.
    """
    require(not dist.is_initialized(), "plan: this process has a process group; use a fresh one")

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    def new_group(ranks: Any = None, **options: Any) -> Any:
        if ranks is not None and rank not in ranks:  # of thousands, this rank is in a few
            return dist.GroupMember.NON_GROUP_MEMBER
        return dist.new_group(ranks, **options)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            cpu_device(),
            replaced(vars(dist), "all_gather_object", all_gather_object),
            replaced(vars(device_mesh), "new_group", new_group),
        ):
            yield
    finally:
        dist.destroy_process_group()
        forget: Any = debug._clear_sharding_prop_cache  # of meshes whose groups are gone
        forget()


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Make tensors without values, on which models compute as on real ones."""
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, name, value in (
            # As a GPU's kernels work, which need no mask for it.
            (context, "causal_lower_right", lambda *sizes: None),
            (checkpoint_wrapper, "save_on_cpu", _saved_elsewhere),
            # Otherwise masks are made that a training goes without.
            (sys.modules.get("transformers.utils.import_utils"), "is_fake_tensor", lambda x: False),
        ):
            if module is not None:
                stack.enter_context(replaced(vars(module), name, value))
        if library := sys.modules.get("transformers.distributed.expert_parallel"):
            kind: Any = library.AllToAllEP
            stack.enter_context(_evenly_routed(kind))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def _saved_elsewhere(**ignored: Any) -> Any:
    """Return the hooks of `save_on_cpu` for a host whose memory does not count."""

    def pack(tensor: Tensor) -> Any:
        return (tensor.shape, tensor.dtype) if type(tensor) is FakeTensor else tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, dtype = packed
        return torch.empty(shape, dtype=dtype)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class WithoutValues(TorchDispatchMode):
    """Let code run on tensors without values: every element counts, and every number is 1.

    Operations on a `DTensor`, or another tensor that consists of tensors, come as those on its
    parts.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        if func is aten._local_scalar_dense.default:
            return self.number(args[0])
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return self.run(func, args, kwargs or {})

    def number(self, tensor: Tensor) -> int | float:
        """Return the value of a tensor of one element."""
        return 1.0 if tensor.is_floating_point() else 1

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of any other operation."""
        if func is aten._grouped_mm.default:  # torch knows its shapes for one dtype only
            factors = [x.to(torch.bfloat16) for x in args[:2]]
            return func(*factors, *args[2:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


class EvenParts(WithoutValues):
    """As `WithoutValues`, but integers are the sizes of the parts of a number, one after another.

    Args:
        total: the number.
        parts: how many.
    """

    def __init__(self, total: int, parts: int) -> None:
        super().__init__()
        sizes = [total // parts + (i < total % parts) for i in range(parts)]
        self._sizes = itertools.cycle(sizes)

    def number(self, tensor: Tensor) -> int | float:
        """Return the next size."""
        return super().number(tensor) if tensor.is_floating_point() else next(self._sizes)


class Attention(TorchFunctionMode):
    """Compute attention as a device does: fused, or as products and a softmax whose result stays.

    On CUDA no fused kernel takes grouped key and value heads in float32 (`sdp_utils.cpp` of torch).

    Args:
        grouped: names of the dtypes in which fused kernels take grouped heads.
    """

    def __init__(self, grouped: Collection[str]) -> None:
        super().__init__()
        self._grouped = {getattr(torch, name) for name in grouped}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        grouped = func is F.scaled_dot_product_attention and kwargs.get("enable_gqa")
        if grouped and args[0].dtype not in self._grouped and args[0].shape[1] != args[1].shape[1]:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _evenly_routed(kind: Any) -> Iterator[None]:
    """Let all ranks of transformers' expert parallelism get the same number of tokens."""
    ordinary = kind.__call__

    def call(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        with EvenParts(experts.numel(), self.ep_mesh.size()):  # sent, and then received, by rank
            result: Tensor = ordinary(self, hidden, experts, weights)
            return result

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = ordinary
