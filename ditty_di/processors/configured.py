"""A configured pipeline: its stages from the graph, and what is wrong with file and line."""

from __future__ import annotations

from typing import Any

from ditty_di._graph.errors import ConfigError, Problem, keys
from ditty_di.processors.chain import POST, PRE, Report, Stage, examine
from ditty_di.processors.stages import argument, pipeline
from ditty_di.processors.workflow import SPLIT_SEQUENCES


def check(graph: Any, root: str = "trainer", *, strict: bool = False) -> Report:
    """Follows the contracts of a trainer's pipeline through its nodes; builds nothing.

    Reads the slots dataloader, preprocessors, model, model_contract, postprocessors, loss_fn and
    runtime of `root`; one that is not there is empty.

    Raises:
        ConfigError: everything that does not fit, processors that the runtime's layout does not
            allow among it; `strict`, also what no contract proves.
    """
    chain = stages(graph, root)
    found = examine(chain)
    wrong = [(p.stage, str(p)) for p in (*found.problems, *(found.unproven if strict else ()))]
    if (argument(_slot(graph, root, "runtime"), "cp") or 1) > 1:
        wrong += [(s, f"{s}: {SPLIT_SEQUENCES}") for s in chain if s.kind in (PRE, POST)]
    if wrong:
        raise ConfigError(
            Problem(stage.key, message, written_at(graph, stage.key)) for stage, message in wrong
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
    return pipeline(
        loader=_slot(graph, root, "dataloader"),
        preprocessors=_slot(graph, root, "preprocessors") or (),
        model=_slot(graph, root, "model"),
        model_contract=_slot(graph, root, "model_contract"),
        postprocessors=_slot(graph, root, "postprocessors") or (),
        loss=_slot(graph, root, "loss_fn"),
        key=root,
    )


def _slot(graph: Any, root: str, name: str) -> Any:
    place, slots = graph.at(tuple(root.split(".")))
    return expanded(graph, (*place, name)) if name in slots else None


def expanded(graph: Any, place: tuple[Any, ...]) -> Any:
    """What is written at a place as plain mappings, lists and scalars, references replaced by what
    they refer to."""
    meant, value = graph.at(place)
    if isinstance(value, dict):
        return {key: expanded(graph, (*meant, key)) for key in value}
    if isinstance(value, list):
        return [expanded(graph, (*meant, index)) for index in keys(value)]
    return value
