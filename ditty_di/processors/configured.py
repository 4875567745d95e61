"""A configured pipeline: its stages from the graph, and what is wrong with file and line."""

from __future__ import annotations

from typing import Any

from ditty_di._graph.errors import ConfigError, Problem, keys
from ditty_di.processors.chain import Report, Stage, examine
from ditty_di.processors.stages import pipeline


def check(graph: Any, root: str = "trainer", *, strict: bool = False) -> Report:
    """Follows the contracts of a trainer's pipeline through its nodes; builds nothing.

    Reads the slots dataloader, preprocessors, model, model_contract, postprocessors and loss_fn of
    `root`; one that is not there is empty.

    Raises:
        ConfigError: everything that does not fit; `strict`, also what no contract proves.
    """
    found = report(graph, root)
    if problems := [*found.problems, *(found.unproven if strict else ())]:
        raise ConfigError(
            Problem(p.stage.key, str(p), written_at(graph, p.stage.key)) for p in problems
        )
    return found


def written_at(graph: Any, key: str) -> str:
    """Where the stage at a key is written, references followed: its contract, else its target."""
    names = [int(name) if name.isdecimal() else name for name in key.split(".")]
    place, node = graph.at(tuple(names))
    inner = [name for name in ("contract", "_target_") if isinstance(node, dict) and name in node]
    return graph.where(".".join(map(str, (*place, *inner[:1])))) or ""


def report(graph: Any, root: str = "trainer") -> Report:
    """What `check` finds, whatever it is."""
    return examine(stages(graph, root))


def stages(graph: Any, root: str = "trainer") -> list[Stage]:
    """The stages of a trainer's pipeline, from its nodes."""
    place, slots = graph.at(tuple(root.split(".")))

    def slot(name: str) -> Any:
        return expanded(graph, (*place, name)) if name in slots else None

    return pipeline(
        loader=slot("dataloader"),
        preprocessors=slot("preprocessors") or (),
        model=slot("model"),
        model_contract=slot("model_contract"),
        postprocessors=slot("postprocessors") or (),
        loss=slot("loss_fn"),
        key=root,
    )


def expanded(graph: Any, place: tuple[Any, ...]) -> Any:
    """What is written at a place as plain mappings, lists and scalars, references replaced by what
    they refer to."""
    meant, value = graph.at(place)
    if isinstance(value, dict):
        return {key: expanded(graph, (*meant, key)) for key in value}
    if isinstance(value, list):
        return [expanded(graph, (*meant, index)) for index in keys(value)]
    return value
