"""A configured pipeline: its stages from the graph, and what is wrong with file and line."""

from __future__ import annotations

from typing import Any

from ditty_di.config.errors import ConfigError, Problem, keys
from ditty_di.processors.chain import POST, PRE, Report, Stage, examine
from ditty_di.processors.stages import argument, is_node, pipeline
from ditty_di.processors.workflow import SPLIT_SEQUENCES
from ditty_di.protocols import CALLBACK_METHODS


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
    runtime = _slot(graph, root, "runtime")
    if (argument(runtime, "cp") or 1) > 1:
        wrong += [(s, f"{s}: {SPLIT_SEQUENCES}") for s in chain if s.kind in (PRE, POST)]
    problems = [Problem(s.key, message, written_at(graph, s.key)) for s, message in wrong]
    for name in ("preprocessors", "postprocessors"):
        for n, value in enumerate(_slot(graph, root, name) or ()):
            problems += _unfit(graph, f"{root}.{name}.{n}", value, ("process",))
    for name, value in (_slot(graph, root, "callbacks") or {}).items():
        if value is not None:
            problems += _unfit(graph, f"{root}.callbacks.{name}", value, CALLBACK_METHODS)
    if (argument(runtime, "pp") or 1) > 1 and not _slot(graph, root, "pipeline_fn"):
        message = "runtime.pp > 1 needs a function that splits the model"
        problems.append(Problem(f"{root}.pipeline_fn", message, graph.where(root) or ""))
    if problems:
        raise ConfigError(problems)
    return found


def _unfit(graph: Any, key: str, value: Any, methods: tuple[str, ...]) -> list[Problem]:
    """What is wrong with a value that has to become an object with these methods."""
    target = graph.locate(str(value["_target_"])) if is_node(value) else None
    lacking = [m for m in methods if isinstance(target, type) and not hasattr(target, m)]
    if target is not None and not lacking and not value.get("_partial_"):
        return []
    found = f"has no {', '.join(lacking)}" if lacking else "is no object of such a class"
    message = f"{value!r:.60}: {found}; write a node, as {{_target_: my_module.MyClass}}"
    return [Problem(key, message, written_at(graph, key))]


def written_at(graph: Any, key: str) -> str:
    """Where the stage at a key is written, references followed: its contract, else its target."""
    place: tuple[Any, ...] = ()
    for name in key.split("."):  # one by one, for each may be a reference
        place, node = graph.at((*place, int(name) if name.isdecimal() else name))
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
