"""Data: corpora, datasets of records, tokenization, packing, collate functions and the loader."""

import ast
from pathlib import Path

from ditty_di.postponed import exports

# Imported on first use, as of a stub of SPEC 1: a process that tokenizes needs no torch.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_EXPORTS = {
    alias.name: str(node.module)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

__all__ = [*_EXPORTS]

__getattr__, __dir__ = exports(globals(), _EXPORTS)
