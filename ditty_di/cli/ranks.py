"""Check that rows per step and the parallel layout divide among the ranks of this machine."""

from __future__ import annotations

from typing import Any

from ditty_di.config import ConfigError, Graph, Problem


def problems(graph: Graph, root: str = "trainer") -> list[Problem]:
    """Return what does not divide among the ranks that the launcher is told to start."""
    nproc = _number(graph, "launcher.nproc", 0)
    if nproc < 1 or root not in graph:  # one a GPU, or wrong, which its own check says
        return []
    from ditty_di.runtime import data_degrees  # with torch, which a trainer imports anyway

    degrees = {n: _number(graph, f"{root}.runtime.{n}", 1) for n in ("cp", "tp", "pp")}
    rest = degrees["cp"] * degrees["tp"] * degrees["pp"]
    replicate = _number(graph, f"{root}.runtime.dp_replicate", 1)
    shard = _number(graph, f"{root}.runtime.dp_shard", -1)
    try:
        replicate, shard = data_degrees(replicate, shard, rest, nproc)
    except ValueError as error:
        key = "runtime.dp_shard" if graph.history("runtime.dp_shard") else "launcher.nproc"
        return [Problem(key, str(error), graph.where(key))]
    ranks = replicate * shard
    total = _number(graph, f"{root}.global_batch_size", 0)
    rows = _number(graph, f"{root}.dataloader.batch_size", 0)
    if total < 1 or rows < 1 or total % rows or not total % (rows * ranks):
        return []  # too few of one rank are the trainer's to tell
    message = (
        f"global_batch_size={total} is not a multiple of {ranks} ranks x {rows} rows "
        "(data.loader.batch_size) a micro-batch"
    )
    return [Problem("launcher.nproc", message, graph.where("launcher.nproc"))]


def _number(graph: Graph, key: str, default: int) -> int:
    try:
        value: Any = graph.value(key)
    except ConfigError:
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) else default
