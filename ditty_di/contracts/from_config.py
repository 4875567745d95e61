"""Check the pipeline of a configuration; problems name the file and line."""

from __future__ import annotations

from typing import Any

from ditty_di.config.errors import ConfigError, Problem, keys
from ditty_di.contracts.check import Report, examine
from ditty_di.contracts.stages import POST, PRE, SPLIT_SEQUENCES, Stage, argument, is_node, pipeline
from ditty_di.protocols import CALLBACK_METHODS


def check(graph: Any, root: str = "trainer", *, strict: bool = False) -> Report:
    """Check the contracts of a trainer's pipeline, and its components, without building them.

    Args:
        graph: the configuration.
        root: key of the trainer, whose slots dataloader, preprocessors, model, model_contract,
            postprocessors, loss_fn, callbacks and runtime are read; a missing one is empty.
        strict: refuse what no contract proves.

    Raises:
        ConfigError: everything that does not fit, each with the line to change.
    """
    chain = stages(graph, root)
    report = examine(chain)
    wrong = [(p.stage, str(p)) for p in (*report.problems, *(report.unproven if strict else ()))]
    runtime = _slot(graph, root, "runtime")
    if (argument(runtime, "cp") or 1) > 1:
        wrong += [(s, f"{s}: {SPLIT_SEQUENCES}") for s in chain if s.kind in (PRE, POST)]
    problems = [Problem(s.key, message, _written_at(graph, s.key)) for s, message in wrong]
    components: list[tuple[str, Any, tuple[str, ...]]] = [
        (f"{root}.{slot}.{n}", value, ("process",))
        for slot in ("preprocessors", "postprocessors")
        for n, value in enumerate(_slot(graph, root, slot) or ())
    ]
    components += [
        (f"{root}.callbacks.{name}", value, CALLBACK_METHODS)
        for name, value in (_slot(graph, root, "callbacks") or {}).items()
        if value is not None
    ]
    for key, value, methods in components:
        if message := _unfit(graph, value, methods):
            problems.append(Problem(key, message, _written_at(graph, key)))
    if (argument(runtime, "pp") or 1) > 1 and not _slot(graph, root, "pipeline_fn"):
        message = "runtime.pp > 1 needs a function that splits the model"
        problems.append(Problem(f"{root}.pipeline_fn", message, graph.where(root) or ""))
    if problems:
        raise ConfigError(problems)
    return report


def stages(graph: Any, root: str = "trainer") -> list[Stage]:
    """Return the stages of a trainer's pipeline.

    Args:
        graph: the configuration.
        root: key of the trainer.
    """
    return pipeline(
        loader=_slot(graph, root, "dataloader"),
        preprocessors=_slot(graph, root, "preprocessors") or (),
        model=_slot(graph, root, "model"),
        model_contract=_slot(graph, root, "model_contract"),
        postprocessors=_slot(graph, root, "postprocessors") or (),
        loss=_slot(graph, root, "loss_fn"),
        key=root,
    )


def _written_at(graph: Any, key: str) -> str:
    """Return file and line of a stage's contract, or else of its target; follow references."""
    path: tuple[Any, ...] = ()
    for name in key.split("."):  # one by one, because each may be a reference
        path, node = graph.at((*path, int(name) if name.isdecimal() else name))
    inner = [name for name in ("contract", "_target_") if isinstance(node, dict) and name in node]
    return graph.where(".".join(map(str, (*path, *inner[:1])))) or ""


def _unfit(graph: Any, value: Any, methods: tuple[str, ...]) -> str:
    """Return why a value does not become an object with these methods, or an empty string."""
    target = graph.locate(str(value["_target_"])) if is_node(value) else None
    missing = [m for m in methods if isinstance(target, type) and not hasattr(target, m)]
    if target is not None and not missing and not value.get("_partial_"):
        return ""
    found = f"has no {', '.join(missing)}" if missing else "is not an object with these methods"
    return f"{value!r:.60}: {found}; write a node, as {{_target_: my_module.MyClass}}"


def _slot(graph: Any, root: str, name: str) -> Any:
    path, slots = graph.at(tuple(root.split(".")))
    return _expanded(graph, (*path, name)) if name in slots else None


def _expanded(graph: Any, path: tuple[Any, ...]) -> Any:
    """Return what is written at a path, references replaced by what they refer to."""
    resolved, value = graph.at(path)
    if isinstance(value, dict):
        return {key: _expanded(graph, (*resolved, key)) for key in value}
    if isinstance(value, list):
        return [_expanded(graph, (*resolved, index)) for index in keys(value)]
    return value
