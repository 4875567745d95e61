"""Check that rows per step and the parallel layout divide among the ranks of this machine."""

from __future__ import annotations

from ditty_di.config import ConfigError, Graph, Problem


def problems(graph: Graph, root: str = "trainer") -> list[Problem]:
    """Return what does not divide among the ranks that the launcher is told to start."""

    def number(key: str, default: int) -> int:
        try:
            value = graph.value(key)
        except ConfigError:
            return default
        return value if type(value) is int else default

    nproc = number("launcher.nproc", 0)
    if nproc < 1 or root not in graph:  # one a GPU, or wrong, which its own check reports
        return []
    from ditty_di.runtime import data_degrees  # with torch, which a trainer imports anyway

    cp, tp, pp = (number(f"{root}.runtime.{name}", 1) for name in ("cp", "tp", "pp"))
    replicate = number(f"{root}.runtime.dp_replicate", 1)
    shard = number(f"{root}.runtime.dp_shard", -1)
    try:
        replicate, shard = data_degrees(replicate, shard, cp * tp * pp, nproc)
    except ValueError as error:
        key = "runtime.dp_shard" if graph.history("runtime.dp_shard") else "launcher.nproc"
        return [Problem(key, str(error), graph.where(key))]
    ranks = replicate * shard
    total = number(f"{root}.global_batch_size", 0)
    rows = number(f"{root}.dataloader.batch_size", 0)
    if total < 1 or rows < 1 or total % rows or not total % (rows * ranks):
        return []  # the trainer itself reports what is wrong on one rank
    message = (
        f"global_batch_size={total} is not a multiple of {ranks} ranks x {rows} rows "
        "(data.loader.batch_size) a micro-batch"
    )
    return [Problem("launcher.nproc", message, graph.where("launcher.nproc"))]
