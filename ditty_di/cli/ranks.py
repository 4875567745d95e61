"""Check that rows per step and the parallel layout divide among the ranks of the launcher."""

from __future__ import annotations

import math

from ditty_di.config import ConfigError, Graph, Problem
from ditty_di.launch.local import gpu_count


def problems(graph: Graph, root: str = "trainer") -> list[Problem]:
    """Return what does not divide among the ranks that the launcher is told to start."""
    each = (_problems(graph, root, ranks) for ranks in _world_sizes(graph))
    return next(filter(None, each), [])


def warnings(graph: Graph, root: str = "trainer") -> list[str]:
    """Return what does not divide among the ranks that this machine would start by itself.

    They are not errors: the run may be meant for a machine with other ranks.
    """
    if "launcher" not in graph or graph.value("launcher.nproc") is not None:
        return []
    ranks = max(gpu_count(), 1)
    here = f"launcher.nproc=null is {ranks} rank{'s' * (ranks > 1)} on this machine: "
    return [f"{here}{problem.message}" for problem in _problems(graph, root, ranks)]


def _world_sizes(graph: Graph) -> list[int]:
    """Return the numbers of ranks that the launcher may start; empty if it does not say."""
    nproc = _number(graph, "launcher.nproc", 0)
    most = _number(graph, "launcher.max_nodes", _number(graph, "launcher.nodes", 1))
    least = _number(graph, "launcher.min_nodes", most)
    return [nproc * nodes for nodes in range(least, most + 1)] if nproc >= 1 else []


def _number(graph: Graph, key: str, default: int) -> int:
    try:
        value = graph.value(key)
    except ConfigError:
        return default
    return value if type(value) is int else default


def known_degrees(graph: Graph, root: str = "trainer") -> dict[str, int]:
    """Return the data-parallel degrees by key, where -1 follows from the launcher's ranks.

    Raises:
        ValueError: the degrees do not use all ranks.
    """
    sizes = _world_sizes(graph) if root in graph else []
    return _degrees(graph, root, sizes[0]) if len(sizes) == 1 else {}


def _degrees(graph: Graph, root: str, nproc: int) -> dict[str, int]:
    from ditty_di.runtime import data_degrees  # with torch, which a trainer imports anyway

    cp, tp, pp = (_number(graph, f"{root}.runtime.{name}", 1) for name in ("cp", "tp", "pp"))
    keys = [f"{root}.runtime.{name}" for name in ("dp_replicate", "dp_shard")]
    replicate, shard = (_number(graph, key, n) for key, n in zip(keys, (1, -1), strict=True))
    return dict(zip(keys, data_degrees(replicate, shard, cp * tp * pp, nproc), strict=True))


def _problems(graph: Graph, root: str, nproc: int) -> list[Problem]:
    if nproc < 1 or root not in graph:  # one a GPU, or wrong, which its own check reports
        return []
    try:
        replicate, shard = _degrees(graph, root, nproc).values()
    except ValueError as error:
        key = "runtime.dp_shard" if graph.history("runtime.dp_shard") else "launcher.nproc"
        return [Problem(key, str(error), graph.where(key))]
    ranks = replicate * shard
    total = _number(graph, f"{root}.global_batch_size", 0)
    rows = _number(graph, f"{root}.dataloader.micro_batch_size", 0)
    streams = _number(graph, f"{root}.dataloader.dataset.streams", 0)
    found = []
    if streams >= 1 and streams % ranks:
        found.append(
            f"streams={streams} of the data is not a multiple of the {ranks} data-parallel ranks"
        )
    # The trainer itself reports rows that are wrong on one rank.
    if total >= 1 and rows >= 1 and not total % rows and total % (rows * ranks):
        other = f"global_batch_size={rows * ranks}"
        if not total % ranks:  # smaller micro-batches leave the numbers as they are
            other = f"data.loader.micro_batch_size={math.gcd(total // ranks, rows)}"
        found.append(
            f"global_batch_size={total} is not a multiple of {ranks} ranks x {rows} rows "
            f"(data.loader.micro_batch_size) a micro-batch; write {other}"
        )
    where = graph.where("launcher.nproc")
    return [Problem("launcher.nproc", message, where) for message in found]
