"""Tasks that look at the data: preview, stats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ditty_di.batch import Batch
from ditty_di.data.look import DocumentStatistics, documents, is_text, named_sources, render_rows
from ditty_di.data.options import at_least, require
from ditty_di.io import write_json, write_text
from ditty_di.protocols import DataLoader, DataLoaderFactory, early_checks


def _validate(*, number: Any = 1, max_chars: Any = 1, rows: Any = 1) -> None:
    """Raise ValueError for a number below 1."""
    given = {"number": number, "max_chars": max_chars, "rows": rows}
    at_least(1, **{name: n for name, n in given.items() if isinstance(n, int)})


@early_checks(validate=_validate)
def preview(
    *,
    dataloader: DataLoaderFactory | DataLoader,
    tokenizer: PreTrainedTokenizerBase | None = None,
    number: int = 1,
    max_chars: int = 2000,
) -> dict[str, Any]:
    """Print the first micro-batches as training gets them: rows, documents, padding, loss mask.

    Args:
        dataloader: a loader, or a factory that takes this rank's coordinates.
        tokenizer: decodes token ids; None prints shapes only.
        number: micro-batches to print.
        max_chars: characters of a document at most.

    Returns:
        `micro_batches`, the number printed.

    Raises:
        ValueError: a number below 1.
    """
    _validate(number=number, max_chars=max_chars)
    loader = dataloader(dp_rank=0, dp_world_size=1) if callable(dataloader) else dataloader
    printed = 0
    for loaded in islice(loader, number):
        batch = Batch.of(loaded)
        print(f"micro-batch {printed}: {_shapes(batch.inputs)}, labels {_shapes(batch.labels)}")
        printed += 1
        if tokenizer is None or not is_text(batch.inputs, batch.labels):
            continue
        names = getattr(loader, "source_names", ())
        for row, text in enumerate(
            render_rows(batch.inputs, batch.labels, tokenizer, max_chars=max_chars)
        ):
            print(f" row {row}{_source(batch, row, names)}")
            print(text)
    return {"micro_batches": printed}


@early_checks(validate=_validate)
def stats(
    *,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 10_000,
    output: str | None = None,
) -> dict[str, Any]:
    """Print statistics of a dataset's documents by source: lengths, tokens, duplicates, oddities.

    Args:
        dataset: rows of token ids, see `ditty_di.data.look.documents`.
        tokenizer: decodes the ids.
        rows: rows to read, from the first.
        output: a .json file for all numbers, with a picture of the lengths beside it (.svg).

    Returns:
        `sources`: the report of each (`DocumentStatistics.report`), and `rows`, how many were read.

    Raises:
        ValueError: a number below 1, or rows of something else than token ids.
    """
    _validate(rows=rows)
    found: dict[str, DocumentStatistics] = defaultdict(lambda: DocumentStatistics(tokenizer))
    for source, ids, trained in documents(dataset, rows, tokenizer):
        found[source].add(ids, trained)
    require(bool(found), "the dataset has no document")
    reports = {source or "all": statistics.report() for source, statistics in found.items()}
    read = min(rows, len(dataset))
    print(f"{read} of {len(dataset)} rows")
    for source, report in reports.items():
        print(f"{source}:")
        print("\n".join(f"  {line}" for line in _lines(report)))
    if output is not None:
        write_json(Path(output), {"rows": read, "sources": reports})
        write_text(Path(output).with_suffix(".svg"), _picture(reports))
    return {"rows": read, "sources": reports}


def _shapes(value: Any) -> str:
    """Return dtype and shape of every tensor of a micro-batch."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shapes(part)}" for key, part in value.items())
    return type(value).__name__


def _source(batch: Batch, row: int, names: Sequence[str]) -> str:
    """Return the source of a row, or those of its tokens in the loss; empty without any."""
    sources = batch.context.get("source")
    if sources is None:
        return ""
    of_row = sources[row]
    if isinstance(of_row, Tensor) and of_row.dim():
        of_row = of_row[batch.labels[row] >= 0]
    return f", source {named_sources(of_row, names)}"


def _lines(report: dict[str, Any]) -> list[str]:
    documents, tokens = report["documents"], report["tokens"]
    length, histogram = report["length"], report["length_histogram"]
    most = max(histogram.values())
    bars = [
        f"  {low:>8} {'#' * round(40 * count / most)} {count}" for low, count in histogram.items()
    ]
    odd = ", ".join(f"{name} ({n})" for name, n in report["odd_characters"].items())
    common = ", ".join(f"{name!r} ({n})" for name, n in report["common_tokens"].items())
    return [
        f"{documents} documents ({report['duplicates']} duplicates), {tokens} tokens, "
        f"{report['tokens_in_loss']} in the loss",
        f"{report['characters_per_token']:.2f} characters a token, compression "
        f"{report['compression']:.2f}, {report['tokens_never_used']} tokens never used",
        f"tokens a document: median {length['median']:.0f}, 95 % {length['p95']:.0f}, "
        f"longest {length['max']:.0f}; documents by length, from:",
        *bars,
        f"commonest tokens: {common}",
        f"odd characters: {odd or 'none'}",
    ]


def _picture(reports: dict[str, dict[str, Any]]) -> str:
    """Return an SVG of the length histograms, one above the other."""
    parts, top = [], 0
    for source, report in reports.items():
        histogram = report["length_histogram"]
        most = max(histogram.values())
        parts.append(f'<text x="10" y="{top + 20}">{escape(source)}: documents by tokens</text>')
        for n, (low, count) in enumerate(histogram.items()):
            height, x = 100 * count / most, 10 + 50 * n
            parts.append(
                f'<rect x="{x}" y="{top + 145 - height:.1f}" width="40" height="{height:.1f}"/>'
                f'<text x="{x}" y="{top + 160}">{low}</text>'
                f'<text x="{x}" y="{top + 140 - height:.1f}">{count}</text>'
            )
        top += 180
    width = 20 + 50 * max(len(r["length_histogram"]) for r in reports.values())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 300)}" height="{top}" '
        f'font-family="sans-serif" font-size="11" fill="#456">\n' + "\n".join(parts) + "\n</svg>\n"
    )
