"""Count what one rank computes, sends and holds, operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.fake_collectives import (  # also lets fake tensors be sent
    CollectiveOp,
    collective_ops,
    sync_ops,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ditty_di.planning.device import Device
from ditty_di.planning.fakes import WithoutValues
from ditty_di.replaced import replaced

aten = torch.ops.aten

#: Kinds of memory, in the order of a report.
KINDS = (
    *("parameters", "buffers", "gradients", "optimizer", "inputs", "activations"),
    *("head and loss", "gathered parameters", "communication", "temporary"),
)
#: Names of the groups whose collectives run beside operations; others delay what comes next.
DATA_PARALLEL = ("fsdp", "efsdp", "dp_shard", "dp_replicate", "batch", "loss")
#: Operations that read and write nothing.
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "prim::device")
#: Parts of collectives' names in c10d, in its functional form and in DTensor.
_COLLECTIVES = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all"),
}
#: Operations of FSDP: the argument whose memory has a kind of its own.
_OF_FSDP = {
    "fsdp::split_with_sizes_copy": ("out", "gathered parameters"),
    "fsdp::chunk_cat": ("out", "communication"),
    "c10d::_allgather_base_": (0, "communication"),
    "c10d::_reduce_scatter_base_": (0, "gradients"),
}


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the operations of the scores and of their product with the values."""
    batch, heads, rows, size = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (size + value.shape[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *a: Any, **k: Any) -> int:
    """Return the operations of the scores again, and of two products for each of forward's."""
    batch, heads, rows, size = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (3 * size + 2 * value.shape[-1])


def _grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Return the operations of products in which each row of `left` has one matrix."""
    return 2 * left.numel() * right.shape[-1]


#: Operations that torch's own counter may leave out: attention on a CPU, products of experts.
FLOPS: dict[Any, Any] = {
    packet: formula
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
        ("_grouped_mm", _grouped),
    )
    if (packet := getattr(aten, name, None)) is not None and packet not in flop_registry
}


class Meter(WithoutValues):
    """Count operations, traffic and live memory of this rank within the context.

    Args:
        device: estimates times.
        groups: names of process groups, by their own name and by their ranks, such as
            `{(0, 1): ["cp", "fsdp"]}`.

    Attributes:
        counts: by key: `("flop",)`; `("seconds", way)` with `way` `forward` or `backward`;
            `("traffic", "all_gather over fsdp (node)")` in bytes; `("transfer", group, way)` in
            seconds.
        live: bytes by kind (`KINDS`).
        moments: for each moment, `live` when it was largest.
        held: `live` when the first backward pass began.
    """

    def __init__(self, device: Device, groups: Mapping[Any, list[str]]) -> None:
        super().__init__()
        self.device, self.groups = device, groups
        self.counts: Any = Counter()
        self.live: Counter[str] = Counter()
        self.moments: dict[Any, Counter[str]] = {}
        self.held: Counter[str] = Counter()
        self._moment: Any = ()
        self._forward_kind = "activations"
        #: storage -> ([kind, bytes], a reference that calls when it is freed)
        self._known: Any = WeakIdKeyDictionary()
        self._resize: Any = None
        self._in_kernel = False

    # ------------------------------------------------------------------------------- memory
    def track(self, tensors: Any, kind: str, *, known: bool = True) -> None:
        """Count the memory of tensors as one of `KINDS`.

        Args:
            tensors: a tensor, or a structure of them.
            kind: the kind.
            known: whether memory that is counted already changes its kind.
        """
        for part in (p for x in tree_leaves(tensors) if isinstance(x, Tensor) for p in parts_of(x)):
            storage = part.untyped_storage()
            if (found := self._known.get(storage)) is None:
                entry = [kind, 0]
                freed = weakref.ref(storage, partial(self._freed, entry))
                self._known[storage] = entry, freed
                self._change(entry, kind, storage.nbytes())
            elif known:
                self._change(found[0], kind, found[0][1])

    def _change(self, entry: list[Any], kind: str, size: Any) -> None:
        self.live[entry[0]] -= entry[1]
        self.live[kind] += size
        entry[:] = kind, size

    def _freed(self, entry: list[Any], storage: Any) -> None:
        self._change(entry, entry[0], 0)

    def rename(self, old: str, new: str) -> None:
        """Count all live memory of a kind as another kind."""
        for entry, _ in list(self._known.values()):
            if entry[0] == old:
                self._change(entry, new, entry[1])

    def enter(self, moment: Any, kind: str = "activations") -> None:
        """Begin a moment of any name, in whose forward passes memory is of a kind."""
        self._moment, self._forward_kind = moment, kind
        self._note()

    def _note(self) -> None:
        highest = self.moments.get(self._moment)
        if highest is None or self.live.total() > highest.total():
            self.moments[self._moment] = Counter(self.live)

    def _resized(self, storage: Any, size: int) -> Any:
        result = self._resize(storage, size)
        if (found := self._known.get(storage)) is not None:
            self._change(found[0], found[0][0], storage.nbytes())
            self._note()
        return result

    def __enter__(self) -> Meter:
        # FSDP frees and allocates whole parameters by resizing their storage.
        storage: Any = torch.UntypedStorage
        self._resize = storage.resize_
        storage.resize_ = lambda own, size: self._resized(own, size)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        storage: Any = torch.UntypedStorage
        storage.resize_ = self._resize

    # --------------------------------------------------------------------------- operations
    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count functions that are given to `torch.compile` as one kernel each.

        It reads and writes its arguments once and needs no other memory, as inductor's kernels for
        element-wise code do, such as the update of torchao's optimizers.
        """

        def compile(function: Any = None, **options: Any) -> Any:
            return self._kernel if function is None else self._kernel(function)

        with replaced(vars(torch), "compile", compile):
            yield

    def _kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._in_kernel = True
            try:
                out = function(*args, **kwargs)
            finally:
                self._in_kernel = False
            self.track(out, self._forward_kind, known=False)
            moved = sum(nbytes(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.counts["seconds", "forward"] += self.device.seconds(0, torch.float32, 2 * moved)
            return out

        return call

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and count it."""
        if self._in_kernel:
            return super().run(func, args, kwargs)
        backward = in_backward()
        way = "backward" if backward else "forward"
        if backward and not self.held:
            self.held = Counter(self.live)
        out = super().run(func, args, kwargs)
        if func in collective_ops:
            if func not in sync_ops:
                self._sent(func, out, args, way)
        elif not func.is_view and not _name(func).startswith(_FREE):
            self._computed(func, out, args, kwargs, way)
        recomputed = backward and torch.is_grad_enabled()
        kind = "temporary" if backward and not recomputed else self._forward_kind
        self.track(out, kind, known=False)
        if (special := _OF_FSDP.get(_name(func))) is not None:
            where, kind = special
            self.track(args[where] if isinstance(where, int) else kwargs[where], kind)
        self._note()
        return out

    def _computed(self, func: Any, out: Any, args: Any, kwargs: Any, way: str) -> None:
        packet, flops = func._overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in FLOPS:
            flops = FLOPS[packet](*args, **kwargs)
        tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        dtype = next((x.dtype for x in tensors.values()), torch.float32)
        self.counts["flop",] += flops
        self.counts["seconds", way] += self.device.seconds(
            flops, dtype, sum(map(nbytes, tensors.values()))
        )

    def _sent(self, func: Any, out: Any, args: Any, way: str) -> None:
        name, group = _name(func), CollectiveOp.get_process_group(func, args)
        parts = ((kind, part) for kind, own in _COLLECTIVES.items() for part in own)
        short = name.partition("::")[2]
        kind = next((kind for kind, part in parts if part in short), short.strip("_"))
        ranks = dist.get_process_group_ranks(group)
        size = max(nbytes(x) for x in tree_leaves((args, out)) if isinstance(x, Tensor))
        names = self.groups.get(group.group_name) or self.groups.get(tuple(ranks)) or ["other"]
        # One group may serve several purposes.
        data = [name for name in names if name in DATA_PARALLEL]
        chosen = data if name in _OF_FSDP and data else names
        self.send(kind, size, ranks, chosen[0], way)

    def send(self, kind: str, size: float, ranks: list[int], group: str, way: str) -> None:
        """Count a collective.

        Args:
            kind: such as `all_reduce`.
            size: bytes of its larger side on one rank.
            ranks: those of the group.
            group: name of the group.
            way: `forward` or `backward`.
        """
        self.counts["traffic", f"{kind} over {group} ({self.device.link(ranks)})"] += size
        self.counts["transfer", group, way] += self.device.transfer_seconds(kind, size, ranks)


@cache
def _name(func: Any) -> str:
    return str(func._schema.name)


def in_backward() -> bool:
    """Return whether a backward pass is running, in which blocks may be recomputed."""
    return torch._C._current_graph_task_id() != -1


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: itself, or this rank's parts."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    inner = [getattr(tensor, name) for name in flatten()[0]]
    return [part for one in inner if isinstance(one, Tensor) for part in parts_of(one)]


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of this rank's part of a tensor."""
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))
