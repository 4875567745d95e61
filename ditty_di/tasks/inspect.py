"""Tasks that look at a configuration, or at two runs: check, explain, graph, diff.

Each is a root node that is a partial: it is called with the graph, in the parent process, builds
nothing and needs no torch of its own.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ditty_di.cli import ranks
from ditty_di.config import ConfigError, Difference, Graph, Node, Problem, difference, flatten
from ditty_di.console import status
from ditty_di.messages import columns, first_of


def check(
    graph: Graph, /, *, root: str = "trainer", strict: bool = False, rehearse: bool = True
) -> None:
    """Check everything that `root`, the launcher and the export reach; print what was checked.

    Imports every target and binds every signature. The contracts of a pipeline are followed, and it
    is drawn.

    Args:
        graph: the configuration's graph.
        root: key of the node to check; one with a `loss_fn` is a pipeline.
        strict: also refuse what no contract proves.
        rehearse: let each node try what it can try cheaply (`ditty_di.protocols`), such as reading
            the first records, and print the warnings.

    Raises:
        ConfigError: all problems at once, one line each.
    """
    status("importing what the configuration names (torch and torchtitan take seconds) ...")
    others = [key for key in ("launcher", "export") if key in graph]
    checked = graph.check(root, *others)
    problems = ranks.problems(graph, root)
    for key in others:
        value = graph.value(key)
        if isinstance(value, dict) and "_target_" not in value:
            message = "is a mapping without a _target_, and a callable is wanted"
            problems.append(Problem(key, message, graph.where(".".join([key, *list(value)[:1]]))))
    if problems:
        raise ConfigError(problems)
    print(f"ok: {len(checked.nodes)} nodes from {root}, each imported and its arguments bound")
    for key, protocol in checked.slots.items():
        print(f"  {key} fits the slot that completes it: {protocol}")
    if checked.unread:
        print(f"  imported only, because they have no signature: {', '.join(checked.unread)}")
    if "loss_fn" in graph.value(root):
        from ditty_di.contracts import from_config
        from ditty_di.contracts.render import render

        report = from_config.check(graph, root, strict=strict)
        print(f"the pipeline of {root}, with what each stage takes -> gives:")
        print(textwrap.indent(render(report), "  "))
    tried = graph.rehearse(root, ranks.known_degrees(graph, root)) if rehearse else ()
    for warning in (*ranks.warnings(graph, root), *tried):
        print(f"warning: {warning}")


def explain(graph: Graph, /, *, key: str) -> None:
    """Print a key's value and everything that set it, the last of which counts.

    Args:
        graph: the configuration's graph.
        key: dotted key.
    """
    written, value = graph.explain(key)
    print(f"{key} = {_text(value)}" + (f"   (from {_text(written)})" if written != value else ""))
    history = graph.history(key)
    width = max((len(setting.where) for setting in history), default=0)
    for n, (where, text, chosen_by) in enumerate(history):
        marks = [f"chosen by {chosen_by}"] if chosen_by else []
        marks += ["overridden below"] if n < len(history) - 1 else []
        print(f"  {where:{width}}  {text}" + (f"   ({', '.join(marks)})" if marks else ""))
    if not history:
        print(f"  set with {graph.where(key) or 'the configuration that was given'}")


def graph(graph: Graph, /, *, root: str = "trainer", format: str = "tree") -> None:
    """Print the nodes that `root` reaches.

    Args:
        graph: the configuration's graph.
        root: key of the first node.
        format: "tree", which marks shared objects, or "dot" for Graphviz.

    Raises:
        ConfigError: another format.
    """
    formats: dict[str, Callable[[Graph, str], str]] = {"tree": tree, "dot": dot}
    if format not in formats:
        raise ConfigError(f"format={format}: write one of {', '.join(formats)}")
    print(formats[format](graph, root))


def tree(graph: Graph, root: str) -> str:
    """Return the nodes below `root` as an indented tree; a shared object is drawn once."""
    nodes, shared = graph.nodes(root), graph.shared(root)
    lines: list[str] = []
    drawn: dict[str, str] = {}

    def draw(node: Node, name: str, at: str, first: str, rest: str) -> None:
        if node.key in drawn:
            lines.append(f"{first}{name} -> {node.key}, shared")
            return
        drawn[node.key] = at
        others = [use for use in shared.get(node.key, ()) if use != at]
        mark = f"   -> shared, also at {first_of(others)}" if others else ""
        partial = " (partial)" if node.partial else ""
        called = name if at == node.key or name == node.key else f"{name} = {node.key}"
        lines.append(f"{first}{called}: {node.target}{partial}{mark}")
        for n, (argument, key) in enumerate(node.arguments, 1):
            last = n == len(node.arguments)
            corner, side = ("└── ", "    ") if last else ("├── ", "│   ")
            draw(nodes[key], argument, f"{node.key}.{argument}", rest + corner, rest + side)

    for node in nodes.values():
        if node.key not in drawn:  # the root itself, or the nodes in it when it is no node
            draw(node, node.key, node.key, "", "")
    return "\n".join(lines)


def dot(graph: Graph, root: str) -> str:
    """Return the nodes below `root` for Graphviz; shared objects are filled, partials dashed."""
    nodes, shared = graph.nodes(root), graph.shared(root)
    lines = ["digraph {", "  rankdir=LR; node [shape=box];"]
    for node in nodes.values():
        styles = ["filled"] * (node.key in shared) + ["dashed"] * node.partial
        style = f", style={_quoted(','.join(styles))}" if styles else ""
        label = _quoted(f"{node.key}\n{node.target}")
        lines.append(f"  {_quoted(node.key)} [label={label}{style}];")
    for node in nodes.values():
        for argument, key in node.arguments:
            lines.append(f"  {_quoted(node.key)} -> {_quoted(key)} [label={_quoted(argument)}];")
    return "\n".join([*lines, "}"])


def diff(
    graph: Graph, /, *, a: str, b: str, ignore: Sequence[str] = (), root: str = "trainer"
) -> None:
    """Print what differs between two run directories: configuration, environment, result.

    Keys that can change the numbers come first.

    Args:
        graph: unused; every task of this module takes it.
        a: the first run directory.
        b: the second run directory.
        ignore: keys that cannot change the numbers, each with everything below it.
        root: key of the node whose keys can.

    Raises:
        ConfigError: a folder is not a run directory.
    """
    runs = [_Run(name, folder) for name, folder in (("a", a), ("b", b))]
    print("\n".join(f"{run.name}: {run.folder}" for run in runs))
    old, new = (run.graph.resolve() for run in runs)
    changed = difference(old, new)
    numbers = difference(old, new, ignore, only=runs[0].reads(root) | runs[1].reads(root))
    _section("can change the numbers", numbers)
    _section("other keys", [change for change in changed if change not in numbers])
    _section("environment", difference(*(run.json("environment.json") for run in runs)))
    results = [flatten(run.json("result.json")) for run in runs]
    if any(results):
        names = [*results[0], *(name for name in results[1] if name not in results[0])]
        rows = [["result", "a", "b"]]
        rows += [[name, *(_text(r.get(name, "")) for r in results)] for name in names]
        print(columns(rows))


class _Run:
    """What a run directory says about itself."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder = name, Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{name}={folder}: there is no such folder")
        if not (self.folder / "resolved.yaml").is_file():
            inside = sorted(path.parent for path in self.folder.glob("**/resolved.yaml"))
            hint = f"; runs in it: {', '.join(map(str, inside[:5]))}" if inside else ""
            raise ConfigError(f"{name}={folder} is no run: it has no resolved.yaml{hint}")
        self.graph = Graph.load(self.folder / "resolved.yaml")

    def reads(self, root: str) -> set[str]:
        """Return the keys that `root` reads, and those that it reads them from."""
        graphs = [self.graph]
        if (self.folder / "config.yaml").is_file():
            graphs.append(Graph.load(self.folder / "config.yaml"))
        try:
            return set().union(*(g.reads(root) for g in graphs))
        except ConfigError:  # a run of another task has no such root
            return set()

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the run; empty when the run did not write it."""
        path = self.folder / name
        if not path.is_file():
            print(f"{self.name} has no {name}")
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"cannot read {path}: it is not a JSON object")
        return found


def _section(title: str, changes: list[Difference]) -> None:
    rows = [[f"  {key}", _text(old), "->", _text(new)] for key, old, new in changes]
    print(f"{title}: {len(changes) or 'no'} difference{'s' * (len(changes) != 1)}")
    if rows:
        print(columns(rows))


def _text(value: Any) -> str:
    """Return a value as YAML would show it on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return value if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
