"""Device, process group, mesh and seeds: set up first, closed last."""

from __future__ import annotations

import os
import random
import signal
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ditty_di.compat as compat
from ditty_di.config.early import validated
from ditty_di.console import LAUNCHED
from ditty_di.launch.signals import StopSignals, announce
from ditty_di.messages import refuse, too_low
from ditty_di.seed import set_run_seed

# isort: split
import torchtitan.distributed.utils as dist_utils
from torchtitan.config import DebugConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_module, device_type


@validated
class Runtime:
    """Rank, device, mesh and seeds of this process, and whether it was asked to stop.

    An existing process group is used, and left alone when the runtime closes; otherwise one is made
    (gloo on CPU, NCCL with gloo beside it on CUDA), also for one rank, so that no other code has to
    check.

    Args:
        seed: seeds Python, NumPy and torch; pipeline stages get different seeds, all other ranks
            the same, because the sampling order already differs between data-parallel ranks.
        dp_replicate: number of replicas (DDP, HSDP); -1 is what the world size leaves.
        dp_shard: number of shards (FSDP2); -1 is what the world size leaves. Only one of the two
            may be -1.
        cp: context-parallel degree.
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
        ep: expert-parallel degree.
        spmd_backend: how torchtitan describes sharding; `partial_dtensor` runs on every torch.
        deterministic: use deterministic kernels only; slower.
        init_timeout: seconds that a collective may take until the first step is done.
        train_timeout: seconds that a collective may take afterwards.
        threads: CPU threads of this process; None is torch's default.

    Raises:
        ValueError: the layout does not fit the world size, or the backend does not fit this torch.
    """

    @staticmethod
    def validate(
        *,
        seed: int = 0,
        dp_replicate: int = 1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        threads: int | None = None,
        spmd_backend: str = "partial_dtensor",
        init_timeout: float = 300.0,
        train_timeout: float = 100.0,
    ) -> None:
        """Raise ValueError for arguments out of range, or a backend that this torch lacks."""
        if spmd_backend not in compat.SPMD_BACKENDS:
            works = " or ".join(map(repr, compat.SPMD_BACKENDS))
            raise ValueError(
                f"runtime.spmd_backend={spmd_backend!r} does not work on torch "
                f"{torch.__version__}; use {works}, or torch 2.14 or newer"
            )
        wrong = [*too_low(0, seed=seed), *too_low(1, cp=cp, tp=tp, pp=pp, ep=ep, threads=threads)]
        wrong += [
            f"{name}={value} must be at least 1, or -1 for what the world size leaves"
            for name, value in (("dp_replicate", dp_replicate), ("dp_shard", dp_shard))
            if value < 1 and value != -1
        ]
        wrong += [
            f"{name}={value} must be above 0, in seconds"
            for name, value in (("init_timeout", init_timeout), ("train_timeout", train_timeout))
            if not value > 0
        ]
        refuse(wrong)

    def __init__(
        self,
        *,
        seed: int = 0,
        dp_replicate: int = 1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        spmd_backend: str = "partial_dtensor",
        deterministic: bool = False,
        init_timeout: float = 300.0,
        train_timeout: float = 100.0,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if dist.is_initialized():
            self.world_size = dist.get_world_size()
        replicate, shard = data_degrees(dp_replicate, dp_shard, cp * tp * pp, self.world_size)
        _require_ranks_for_experts(ep, shard * cp * tp)
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = self._pick_device()
        self._owns_process_group = not dist.is_initialized()
        if self._owns_process_group:
            self._init_process_group(init_timeout)
        self.rank = dist.get_rank()
        self.train_timeout = train_timeout
        self.parallel_dims = ParallelDims(
            dp_replicate=replicate,
            dp_shard=shard,
            cp=cp,
            tp=tp,
            pp=pp,
            ep=ep,
            world_size=self.world_size,
            spmd_backend=spmd_backend,  # type: ignore[arg-type]
        )
        dist_utils.set_spmd_backend(spmd_backend)
        self.dp_world_size, self.dp_rank = 1, 0
        if self.parallel_dims.dp_enabled:
            batch = self.parallel_dims.get_mesh("batch")
            self.dp_world_size, self.dp_rank = batch.size(), batch.get_local_rank()

        self.seed = seed
        set_run_seed(seed)
        seed_everything(seed)
        with warnings.catch_warnings():
            # DTensor warns that it has no random operators on a CPU mesh; nothing here uses them.
            warnings.filterwarnings("ignore", message="DTensor", category=UserWarning)
            dist_utils.set_determinism(
                self.parallel_dims,
                self.device,
                DebugConfig(seed=seed, deterministic=deterministic),
                distinct_seed_mesh_dims=["pp"],
            )
        self._stop_requested = False
        self._signals = StopSignals(self._asked)

    # -- stopping ----------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """Make SIGTERM, SIGINT and SIGHUP request a stop; a second Ctrl-C interrupts."""
        self._signals.install()

    def _asked(self, number: signal.Signals) -> None:
        if LAUNCHED not in os.environ:
            announce(number)
        self.request_stop()

    def release_signals(self) -> None:
        """Restore the signal handlers from before `catch_signals`."""
        self._signals.restore()

    def request_stop(self) -> None:
        """Request an orderly stop at the next step; one rank is enough."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Return whether this rank was asked to stop, by a signal or `request_stop`."""
        return self._stop_requested

    # -- collectives on the CPU: they do not wait for the device -------------------------------

    def sum(self, values: list[float]) -> list[float]:
        """Return sums over the data-parallel ranks, in float64 (exact for counts up to 2**53).

        Args:
            values: this rank's numbers.
        """
        if self.world_size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        # Ranks that differ only in tp, cp or pp hold the same values, so each was added repeatedly.
        return (total / (self.world_size // self.dp_world_size)).tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank.

        Args:
            flag: this rank's flag.
        """
        return self.sum([float(flag)])[0] > 0 if self.world_size > 1 else flag

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank.

        Args:
            value: any object that can be pickled; used on rank 0.
        """
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of the data-parallel ranks in their order, on every rank.

        Of ranks that differ only in tp, cp or pp the first one that is true counts, or the last.

        Args:
            value: any object that can be pickled.
        """
        if self.world_size == 1:
            return [value]
        of_ranks: dict[int, Any] = {}
        for rank, other in gathered((self.dp_rank, value)):
            of_ranks[rank] = of_ranks.get(rank) or other
        return [of_ranks[rank] for rank in sorted(of_ranks)]

    # -- setup and shutdown --------------------------------------------------------------------

    def close(self) -> None:
        """Restore signal handlers, and destroy a process group that this runtime made."""
        self.release_signals()
        set_run_seed(None)
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()

    def _pick_device(self) -> torch.device:
        if device_type == "cpu":
            return torch.device("cpu")
        count = device_module.device_count()
        if count > 1 and self.local_rank >= count:
            raise ValueError(
                f"rank {self.rank} wants {device_type}:{self.local_rank} but this machine shows "
                f"{count}; start at most {count} ranks here (launcher.nproc={count})"
            )
        # A launcher may show each process only its own device: then that one is number 0.
        device = torch.device(device_type, 0 if count == 1 else self.local_rank)
        device_module.set_device(device)
        return device

    def _init_process_group(self, timeout: float) -> None:
        # torchtitan runs its mesh bookkeeping in thread-local state, which backward would not see
        # from other threads.
        torch.autograd.set_multithreading_enabled(False)
        limit = timedelta(seconds=timeout)
        backend = "gloo"
        if self.device.type != "cpu":
            default = dist.Backend.default_device_backend_map[self.device.type]
            backend = f"cpu:gloo,{self.device.type}:{default}"
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        where = {} if "WORLD_SIZE" in os.environ else alone
        dist.init_process_group(backend, timeout=limit, **where)


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks of a process group, on each of them.

    Args:
        value: any object that can be pickled.
        group: None is that of all ranks.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices.

    Args:
        seed: any int.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _require_ranks_for_experts(ep: int, ranks: int) -> None:
    if ranks % ep:
        fit = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ValueError(
            f"runtime.ep={ep} does not divide the {ranks} ranks of dp_shard * cp * tp, among which "
            f"experts are split; ep fits {fit}"
        )


def data_degrees(replicate: int, shard: int, rest: int, world_size: int) -> tuple[int, int]:
    """Return (dp_replicate, dp_shard) without -1, for a layout that uses all ranks.

    Args:
        replicate: `dp_replicate` as given.
        shard: `dp_shard` as given.
        rest: product of the other degrees, cp * tp * pp.
        world_size: number of ranks.

    Raises:
        ValueError: the layout does not fit the number of ranks.
    """
    asked = f"dp_replicate={replicate}, dp_shard={shard}, cp*tp*pp={rest}"
    if replicate == -1 and shard == -1:
        raise ValueError(f"runtime: {asked}: only one of dp_replicate and dp_shard can be -1")
    fixed = rest * (shard if replicate == -1 else replicate)
    if replicate == -1 or shard == -1:
        if fixed < 1 or world_size % fixed:
            raise ValueError(
                f"runtime: {asked} does not divide {world_size} ranks; use a multiple of {fixed} "
                f"ranks (launcher.nproc={max(fixed, 1)}) or other degrees"
            )
        left = world_size // fixed
        replicate, shard = (left, shard) if replicate == -1 else (replicate, left)
    if replicate * shard * rest != world_size:
        raise ValueError(
            f"runtime: {asked} needs {replicate * shard * rest} ranks but there are {world_size}; "
            f"start that many (launcher.nproc={replicate * shard * rest}) or change the degrees"
        )
    return replicate, shard
