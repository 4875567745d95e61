"""What methods inherited from torchtitan's Trainer read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    steps: int = 0
    disable_cuda_graphs: bool = True
    spmd_backend: str = "partial_dtensor"
    context_parallel_load_balancer: str | None = None
    context_parallel_ptrr_mask_key: str | None = None


@dataclass(frozen=True)
class InheritedConfig:
    """All that they read from `self.config`."""

    training: Section = field(default_factory=Section)
    parallelism: Section = field(default_factory=Section)
