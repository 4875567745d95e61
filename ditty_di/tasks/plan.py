"""Plan the cost of a training before a device is rented."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditty_di.batch import Batch
from ditty_di.config import BuildError, Graph
from ditty_di.io import write_json
from ditty_di.planning import Device, Recipe, report
from ditty_di.planning import plan as plan_recipe
from ditty_di.protocols import early_checks
from ditty_di.runtime import Runtime
from ditty_di.training.setup import weights_of


def _validate(*, world_size: Any = 1, seq_len: Any = None) -> None:
    """Raise ValueError for numbers below 1."""
    for name, value in (("world_size", world_size), ("seq_len", seq_len)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}={value}: write a number of at least 1")


@early_checks(validate=_validate)
def plan(
    graph: Graph,
    /,
    *,
    run: str,
    world_size: int,
    device: Device | None,
    seq_len: int | None = None,
    root: str = "trainer",
) -> dict[str, Any]:
    """Print memory, operations and traffic of a training, without its devices, data and weights.

    Args:
        graph: the configuration's graph.
        run: folder that gets `plan.json`.
        world_size: ranks.
        device: what a rank runs on.
        seq_len: tokens of a row; None takes the first micro-batch of the data, which must be here.
        root: key of the node with the training's components.

    Returns:
        `objective`, seconds for a million tokens (None if it does not fit), and `table`, columns
        for a sweep.

    Raises:
        ConfigError: the configuration cannot be used.
        ValueError: the layout does not fit the ranks or the model.
    """
    _validate(world_size=world_size, seq_len=seq_len)
    if device is None:
        raise ValueError("device=null: write what to plan for, such as device=h100-80gb")
    graph.check(root)
    made = plan_recipe(recipe(graph, root, seq_len), world_size=world_size, device=device)
    print(report.text(made))
    write_json(Path(run) / "plan.json", report.values(made))
    seconds = 1e6 / made.tokens_per_second
    return {
        "objective": seconds if made.fits else None,
        "tokens_per_second": made.tokens_per_second,
        "table": {
            "fits": "yes" if made.fits else "no",
            "peak_gib": made.worst.bytes / (1 << 30),
            "seconds_per_step": made.seconds,
        },
    }


def recipe(graph: Graph, root: str, seq_len: int | None) -> Recipe:
    """Return the parts of a training that a configuration describes.

    Args:
        graph: the configuration's graph.
        root: key of the node with the training's components.
        seq_len: tokens of a row; None takes the first micro-batch of the data.
    """
    argument = functools.partial(graph.argument, root)
    model = _model(graph, root)
    weights = weights_of(model, argument("weights"))
    return Recipe(
        model=model,
        batch=_batch(graph, root, seq_len),
        runtime=lambda: _again(graph).argument(root, "runtime") or Runtime(),
        saves_frozen=not hasattr(weights, "identity"),
        **{
            name: argument(name)
            for name in (
                *("loss_fn", "optimizer", "convert", "parallelize_fn", "pipeline_fn"),
                *("preprocessors", "postprocessors", "global_batch_size"),
            )
        },
    )


def _model(graph: Graph, root: str) -> nn.Module:
    """Return the model, without a tokenizer where there is none: `config.json` has the sizes."""
    try:
        return graph.build(f"{root}.model")
    except BuildError as error:
        problem = error.problems[0]
        if problem.key != "tokenizer":
            raise
    print(f"note: planned without the tokenizer: {problem.message.splitlines()[0]}")
    return _again(graph, tokenizer=None).build(f"{root}.model")


def _again(graph: Graph, **changes: Any) -> Graph:
    """Return the graph with nothing built yet, and some nodes replaced."""
    config = {**graph.resolve(), **changes}
    return Graph(config, graph.where, allow_targets=graph.allow_targets)


def _batch(graph: Graph, root: str, seq_len: int | None) -> Batch:
    """Return a micro-batch of token ids 0, or the first one of the data."""
    if seq_len is None:
        loader = graph.argument(root, "dataloader")
        loader = loader(dp_rank=0, dp_world_size=1) if callable(loader) else loader
        return Batch.of(next(iter(loader)))
    rows = graph.value(f"{root}.dataloader.micro_batch_size")
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    return Batch({"input": ids}, ids)
