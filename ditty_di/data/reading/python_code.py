"""Corpora and examples made from the standard library of the running Python, without network.

Sources are parsed, never imported. Everything depends on the Python version alone and is cached.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import os
import platform
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ditty_di.data import options
from ditty_di.data.cache import build_once, cache_folder, counted
from ditty_di.data.reading.corpus import Corpus, cached_corpus, distinct, split_documents
from ditty_di.data.reading.splits import content_hash

# Shorter texts ("Return self.", "See base class.") carry no information and repeat in variants.
_MIN_DOCUMENT_CHARS = 40
_MIN_SUMMARY_CHARS = 20
_TEST_FOLDERS = {"test", "tests", "idle_test"}
# Tables of numbers, and the text that `_topics` yields.
_NOT_PROGRAMS = {"encodings", "pydoc_data"}
_SPLITS = ("train", "val", "test")
_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LIBRARY = Path(sysconfig.get_path("stdlib"))
_NO_SOURCES = f"""\
the standard library in {_LIBRARY} has no Python sources with documentation. Use data of your own: \
data=text data.corpus.path=..., or data=jsonl data.path=..."""
_VERSION = f"{sys.implementation.name}-{platform.python_version()}"


def python_docs(
    cache_dir: str | os.PathLike[str] | None = None, validation_fraction: float = 0.05
) -> Corpus:
    """Return the language reference topics and the docstrings of the standard library.

    About 2 MB of English about Python. Each docstring follows a line that names it
    (`def json.dumps(obj, *, skipkeys=False, ...)`).

    Args:
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.
        validation_fraction: Fraction of the documents to hold out.

    Raises:
        ValueError: This Python has no source files.
    """
    options.fraction(validation_fraction=validation_fraction)

    def read() -> Corpus:
        found = chain((("", topic) for topic in _topics()), _docstrings())
        entries = counted(found, "reading the documentation of this Python", "texts")
        documents = distinct(entries, _MIN_DOCUMENT_CHARS)
        options.require(bool(documents), _NO_SOURCES)
        return split_documents(documents, validation_fraction)

    # v1: raise it when the same Python would give other documents.
    return cached_corpus(cache_dir, f"python-docs-{_VERSION}-{validation_fraction:g}-v1", read)


def python_code(cache_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """Return the sources of the standard library, and the language reference topics.

    About 10 MB, one document a module. The validation documents are the modules of
    `held_out_module`, the same whose functions `docstring_pairs` holds out.

    Args:
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: This Python has no source files.
    """

    def read() -> Corpus:
        sides: tuple[list[str], list[str]] = ([], [])
        for module, path in _modules():
            is_program = module.partition(".")[0] not in _NOT_PROGRAMS
            if is_program and _parse(path.read_bytes()) is not None:
                sides[held_out_module(module)].extend(filter(None, [_source(path).strip()]))
        options.require(bool(sides[0]), _NO_SOURCES)
        return Corpus([*_topics(), *sides[0]], sides[1])

    return cached_corpus(cache_dir, f"python-code-{_VERSION}-v1", read)


def docstring_pairs(max_chars: int = 1200, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder `train/ val/ test/*.jsonl` of functions and their summaries, to fine-tune on.

    Each line has `input` (a function's source without its docstring, dedented, and a line
    "# Summary:"), `output` (a space and the docstring's first line), `module` and `name`. The first
    of the functions with the same source or the same summary is kept. All functions of a module are
    in one split: `val` and `test` alternate between the modules of `held_out_module`.

    Args:
        max_chars: Longer sources are left out, in characters.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: This Python has no source files.
    """
    name = f"docstrings-{_VERSION}-{max_chars}-v1"
    return build_once(
        cache_folder(cache_dir) / "examples" / name, partial(_write_pairs, max_chars=max_chars)
    )


def labeled_functions(packages: int = 10, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder of functions and the packages that they are from, to classify.

    Each line has `text` (the source of a function of `docstring_pairs`) and `label`, the package of
    the standard library that it is from, one of those with the most functions. There are no splits:
    functions of the same modules are for training and held out.

    Args:
        packages: Number of packages.
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: This Python has no source files.
    """

    def write(folder: Path, pairs: Path) -> None:
        found = [pair for split in _SPLITS for pair in _pairs_of(pairs, split)]
        counts = Counter(map(_package, found))
        chosen = sorted(counts, key=lambda name: (-counts[name], name))[:packages]
        rows = [{"text": _code(p), "label": _package(p)} for p in found if _package(p) in chosen]
        _write_rows(folder, "train", rows)

    return _made_of_pairs(f"labels-{packages}", write, cache_dir)


def described_functions(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder `train/ val/ test/*.jsonl` of summaries and functions, for embeddings.

    Each line has `anchor` (the first line of a docstring) and `positive` (the source of its
    function without it), those of `docstring_pairs`.

    Args:
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: This Python has no source files.
    """

    def described(pair: dict[str, str]) -> dict[str, Any]:
        return {"anchor": pair["output"].strip(), "positive": _code(pair)}

    return _made_of_pairs("described", partial(_write_each, described), cache_dir)


def tagged_functions(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder `train/ val/ test/*.jsonl` of functions in tokens with tags.

    Each line has the `tokens` of a function of `docstring_pairs`, and as `tags` what each of them
    is: attribute, call, comment, definition, keyword, name, number, operator or string.

    Args:
        cache_dir: Cache folder; None: `$DITTY_DI_CACHE`, or `~/.cache/ditty_di`.

    Raises:
        ValueError: This Python has no source files.
    """
    return _made_of_pairs("tags", partial(_write_each, _tagged), cache_dir)


def held_out_module(name: str) -> bool:
    """Return whether a module, such as `json.decoder`, is held out: one in ten, by its hash."""
    return content_hash(name) < 2**64 // 10


def _modules() -> Iterator[tuple[str, Path]]:
    """Yield name and file of each module, in the same order on every machine."""
    for path in sorted(_LIBRARY.rglob("*.py"), key=lambda path: path.relative_to(_LIBRARY).parts):
        parts = path.relative_to(_LIBRARY).with_suffix("").parts
        # Without site-packages, which is in the same folder, and the library's own tests.
        if parts[0] in sys.stdlib_module_names and not _TEST_FOLDERS.intersection(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _parse(source: str | bytes) -> ast.Module | None:
    """Return the tree of a source; None for files that are broken on purpose (templates, tests)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _topics() -> Iterator[str]:
    """Yield the texts behind `help("topic")`: one literal dict in one source file."""
    path = _LIBRARY / "pydoc_data" / "topics.py"
    tree = _parse(path.read_bytes()) if path.is_file() else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield text.strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    for module, path in _modules():
        if (tree := _parse(path.read_bytes())) is not None:
            yield from _docstrings_in(tree, module)


def _docstrings_in(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        body = (ast.get_docstring(node) or "").strip()
        if options.encodable(body):
            yield _header(node, name), body
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, _SCOPES) else name
        yield from _docstrings_in(child, inner)


def _header(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {name}({ast.unparse(node.args)})"
    return f"module {name}"


# --- functions and their summaries ---------------------------------------------------------------


def _write_pairs(folder: Path, max_chars: int) -> None:
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in _SPLITS}
    seen: set[str] = set()
    held_out: dict[str, str] = {}
    for module, path in _modules():
        split = "train"
        if held_out_module(module):
            split = held_out.setdefault(module, ("val", "test")[len(held_out) % 2])
        for name, source, summary in _functions(path, max_chars):
            if not {source, summary} & seen:
                seen |= {source, summary}
                pair = {"input": f"{source}\n\n# Summary:", "output": f" {summary}"}
                splits[split].append({**pair, "module": module, "name": name})
    options.require(bool(splits["train"]), _NO_SOURCES)
    for split, rows in splits.items():
        _write_rows(folder, split, rows)


def _made_of_pairs(
    name: str, write: Callable[[Path, Path], None], cache_dir: str | os.PathLike[str] | None
) -> Path:
    """Return a cached folder that `write` makes of that of `docstring_pairs`."""
    pairs = docstring_pairs(cache_dir=cache_dir)
    # v1: raise it when the same pairs would give other rows.
    target = cache_folder(cache_dir) / "examples" / f"{name}-{pairs.name}-v1"
    return build_once(target, lambda folder: write(folder, pairs))


def _pairs_of(folder: Path, split: str) -> list[dict[str, str]]:
    lines = (folder / split / "functions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / split).mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / split / "functions.jsonl").write_text(text, encoding="utf-8")


def _write_each(
    row_of: Callable[[dict[str, str]], dict[str, Any]], folder: Path, pairs: Path
) -> None:
    for split in _SPLITS:
        _write_rows(folder, split, [row_of(pair) for pair in _pairs_of(pairs, split)])


def _package(pair: dict[str, str]) -> str:
    return pair["module"].partition(".")[0]


def _code(pair: dict[str, str]) -> str:
    return pair["input"].removesuffix("\n\n# Summary:")


def _tagged(pair: dict[str, str]) -> dict[str, list[str]]:
    """Return the tokens of a pair's function, and their tags."""
    kinds = {
        tokenize.OP: "operator",
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
    }
    found = tokenize.generate_tokens(io.StringIO(_code(pair)).readline)
    tokens = [token for token in found if token.string.strip()]
    words = [token.string for token in tokens]
    tags: list[str] = []
    for token, before, following in zip(tokens, ["", *words], [*words[1:], ""], strict=False):
        tag = kinds.get(token.type, "name")
        if token.type == tokenize.NAME:
            if keyword.iskeyword(token.string):
                tag = "keyword"
            elif before in ("def", "class"):
                tag = "definition"
            elif following == "(":
                tag = "call"
            elif before == ".":
                tag = "attribute"
        tags.append(tag)
    return {"tokens": words, "tags": tags}


def _functions(path: Path, max_chars: int) -> Iterator[tuple[str, str, str]]:
    """Yield name, source without docstring, and summary of each function that has one."""
    tree, lines = _parse(path.read_bytes()), _source(path).splitlines()
    for node in ast.walk(tree) if tree and lines else []:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue  # nothing but a docstring
        summary = _summary(ast.get_docstring(node) or "")
        if len(summary) < _MIN_SUMMARY_CHARS or not options.encodable(summary):
            continue
        docstring = node.body[0]
        kept = lines[node.lineno - 1 : docstring.lineno - 1]
        kept += lines[docstring.end_lineno or docstring.lineno : node.end_lineno]
        source = textwrap.dedent("\n".join(kept)).strip("\n")
        # Leaves out `def f(): "doc"; body`, whose lines cannot be separated.
        alone = _parse(source) if kept and len(source) <= max_chars else None
        if alone is not None and len(alone.body) == 1:
            yield node.name, source, summary


def _summary(docstring: str) -> str:
    """Return the first line if it is a sentence or a paragraph by itself, else ""."""
    first, _, rest = docstring.strip().partition("\n")
    whole = not rest.strip() or not rest.split("\n", 1)[0].strip() or first.endswith(".")
    return re.sub(r"\s+", " ", first).strip() if whole else ""
