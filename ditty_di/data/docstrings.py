"""Examples to fine-tune on that every Python carries: a function's source, and what it does."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ditty_di.data.cache import build_once, cache_folder
from ditty_di.data.corpus import encodable, held_out_module, modules, parse

# Raise it when docstring_pairs() would give other pairs from the same Python.
_FORMAT = 1
_PROMPT = "\n\n# Summary:"
# Shorter summaries ("See base class.") say nothing of the function.
_MIN_SUMMARY_CHARS = 20


def docstring_pairs(max_chars: int = 1200, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A folder `train/ val/ test/*.jsonl` of functions of the standard library and their summaries.

    Each line has `input` (a function's source without its docstring, dedented, and a line
    "# Summary:"), `output` (a space and the docstring's first paragraph's first line), `module`
    and `name`. Sources of more than `max_chars` characters are left out, and of functions with
    the same source or the same summary the first stays. Modules are parsed, never imported.

    The functions of a module lie in one split: those of `held_out_module` in `val` and `test` by
    turns of modules, so what is held out comes from modules that training never sees.

    Depends on the Python version alone, needs no network, and is cached.

    Raises `ValueError` when this Python carries no source files.
    """
    version = f"{sys.implementation.name}-{platform.python_version()}"
    name = f"docstrings-{version}-{max_chars}-v{_FORMAT}"
    return build_once(
        cache_folder(cache_dir) / "examples" / name, lambda aside: _build(aside, max_chars)
    )


def _build(folder: Path, max_chars: int) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    seen: set[str] = set()
    held_out: dict[str, str] = {}
    for module, path in modules(library):
        split = "train"
        if held_out_module(module):
            split = held_out.setdefault(module, ("val", "test")[len(held_out) % 2])
        for pair in _pairs(path, module):
            source, summary = pair["input"], pair["output"]
            if len(source) > max_chars or {source, summary} & seen:
                continue
            seen |= {source, summary}
            splits[split].append({**pair, "input": source + _PROMPT, "output": f" {summary}"})
    if not splits["train"]:
        raise ValueError(
            f"the standard library in {library} has no Python sources with documentation. "
            "Use examples of your own: data.path=my_folder"
        )
    for split, pairs in splits.items():
        (folder / split).mkdir(parents=True)
        with (folder / split / "functions.jsonl").open("w", encoding="utf-8") as stream:
            for pair in pairs:
                stream.write(json.dumps(pair) + "\n")


def _pairs(path: Path, module: str) -> Iterator[dict[str, str]]:
    tree = parse(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return
    for node in ast.walk(tree) if tree else []:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue  # nothing but a docstring
        summary = _summary(ast.get_docstring(node) or "")
        if len(summary) < _MIN_SUMMARY_CHARS or not encodable(summary):
            continue
        docstring = node.body[0]
        kept = lines[node.lineno - 1 : docstring.lineno - 1]
        kept += lines[docstring.end_lineno or docstring.lineno : node.end_lineno]
        source = textwrap.dedent("\n".join(kept)).strip("\n")
        # Not `def f(): "doc"; body`, and nothing whose end on a shared line was cut wrongly.
        if kept and _parses(source):
            yield {"input": source, "output": summary, "module": module, "name": node.name}


def _summary(docstring: str) -> str:
    """The first line, when it is a sentence or a paragraph by itself."""
    first, _, rest = docstring.strip().partition("\n")
    whole = not rest.strip() or not rest.split("\n", 1)[0].strip() or first.endswith(".")
    return re.sub(r"\s+", " ", first).strip() if whole else ""


def _parses(source: str) -> bool:
    try:
        return len(ast.parse(source).body) == 1
    except (SyntaxError, ValueError):
        return False
