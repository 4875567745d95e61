"""A corpus of program text: the sources of the running Python's standard library."""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ditty_di.data.cache import build_once, cache_folder
from ditty_di.data.corpus import Corpus, held_out_module, modules, parse, topics

# Raise it when python_code() would give other documents from the same Python.
_FORMAT = 1
# Tables of numbers, and the text that `topics` yields.
_NO_PROGRAMS = {"encodings", "pydoc_data"}


def python_code(cache_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """One document a module of the standard library, and the language reference's topics.

    About 10 MB, without network; sources are read, never imported. The validation documents are
    the modules of `held_out_module`, the same whose functions `docstring_pairs` holds out: a model
    trained on this corpus has seen none of those. Depends on the Python version alone, and is
    cached by it.

    Raises `ValueError` when this Python carries no source files.
    """
    version = f"{sys.implementation.name}-{platform.python_version()}"
    path = build_once(
        cache_folder(cache_dir) / "corpora" / f"python-code-{version}-v{_FORMAT}.json", _build
    )
    return Corpus(**json.loads(path.read_text(encoding="utf-8")))


def _build(path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    corpus = Corpus([text for _, text in topics(library)], [])
    found = False
    for module, source in _sources(library):
        found = True
        (corpus.validation if held_out_module(module) else corpus.train).append(source)
    if not found:
        raise ValueError(
            f"the standard library in {library} has no Python sources. Use a corpus of your own: "
            "data=text data.corpus.path=..."
        )
    path.write_text(json.dumps(vars(corpus)), encoding="utf-8")


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    for module, path in modules(library):
        if module.partition(".")[0] in _NO_PROGRAMS or parse(path) is None:
            continue  # the second: files that are broken on purpose
        try:
            source = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            continue
        if source:
            yield module, source
