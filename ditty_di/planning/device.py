"""The figures of a device and its links from which times are estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditty_di.messages import refuse

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device, and the links of the machines that hold several of them.

    Args:
        name: for people.
        memory_gib: memory that a process can allocate.
        tflops: peak of dense matrix products by dtype of the factors (names in torch).
        memory_gbps: bandwidth of the memory, in GB/s.
        per_node: devices of one machine.
        node_gbps: bandwidth between two devices of a machine in one direction, in GB/s.
        network_gbps: bandwidth of a device to other machines in one direction, in GB/s.
        torch_names: names of such a device in torch (`torch.cuda.get_device_name()`), by which a
            training finds its peak (`ditty_di.loggers.flops.peak`).
        grouped_attention: dtypes in which the device has a fused attention kernel for key and value
            heads that several query heads share (grouped-query attention).
        efficiency: share of all these peaks that programs are assumed to reach.
        headroom: share of the memory that is left to the driver, the communication library, the
            workspaces of kernels, and what the allocator cannot use.

    Raises:
        ValueError: a figure that is not above 0, or no peak for float32.
    """

    name: str
    memory_gib: float
    tflops: Mapping[str, float]
    memory_gbps: float
    per_node: int
    node_gbps: float
    network_gbps: float
    torch_names: Sequence[str] = ()
    grouped_attention: Sequence[str] = ("bfloat16", "float16")
    efficiency: float = 0.7
    headroom: float = 0.08

    @staticmethod
    def validate(*, tflops: Any = None, **figures: Any) -> None:
        """Raise ValueError for figures out of range."""
        grouped = figures.pop("grouped_attention", ())
        figures.pop("torch_names", None)
        wrong = [f"{k}={v}: write a number above 0" for k, v in figures.items() if _not_above_0(v)]
        for name in grouped:
            if not isinstance(getattr(torch, name, None), torch.dtype):
                wrong.append(f"grouped_attention: {name} is not a dtype of torch")
        for name, value in dict(tflops or {}).items():
            if not isinstance(getattr(torch, name, None), torch.dtype) or _not_above_0(value):
                wrong.append(f"tflops.{name}={value}: write a dtype of torch and a number above 0")
        if tflops is not None and "float32" not in tflops:
            wrong.append("tflops: add float32, which stands in for dtypes without a peak")
        refuse(wrong)

    def __post_init__(self) -> None:
        figures = {k: v for k, v in vars(self).items() if k != "name"}
        self.validate(**figures)

    @property
    def usable(self) -> float:
        """Bytes that the tensors of a training may take."""
        return self.memory_gib * GIB * (1 - self.headroom)

    def seconds(self, flops: float, dtype: torch.dtype, moved: float) -> float:
        """Return the time of an operation: of its arithmetic or its memory traffic (roofline).

        Williams et al. 2009, https://doi.org/10.1145/1498765.1498785.

        Args:
            flops: floating-point operations.
            dtype: dtype of the factors.
            moved: bytes read and written.
        """
        peak = self.tflops.get(str(dtype).removeprefix("torch."), self.tflops["float32"])
        return max(flops / (peak * 1e12), moved / (self.memory_gbps * 1e9)) / self.efficiency

    def link(self, ranks: Sequence[int]) -> str:
        """Return the slowest link between ranks that fill machine after machine.

        Args:
            ranks: of one group.
        """
        return "node" if len({rank // self.per_node for rank in ranks}) == 1 else "network"

    def transfer_seconds(self, kind: str, size: float, ranks: Sequence[int]) -> float:
        """Return the time of a collective by a ring, which uses the links of all ranks at once.

        A ring over machines leaves each by the adapters of all its ranks together. Factors are
        those of https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.

        Args:
            kind: such as `all_reduce`.
            size: bytes of its larger side on one rank.
            ranks: of the group.
        """
        n = len(ranks)
        if n == 1:
            return 0.0
        together = n / len({rank // self.per_node for rank in ranks})
        network = self.network_gbps * together
        speed = self.node_gbps if self.link(ranks) == "node" else min(self.node_gbps, network)
        hops = {"send": 1.0, "all_reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
        return hops * size / (speed * 1e9 * self.efficiency)


def _not_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not value > 0
