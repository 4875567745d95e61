"""The model card: a README that tells what was trained, how, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditty_di.export.record import RunRecord

#: Parts of the configuration that the card shows, as what it calls them.
_SECTIONS = {
    "data.corpus": "corpus",
    "data.train": "training data",
    "quantize": "base quantised by",
    "adapter": "adapter",
    "loss": "loss",
    "optimizer": "optimizer",
    "lr_scheduler": "schedule",
    "parallelize": "layout",
}
_NUMBERS = ("global_batch_size", "epochs", "seed")
_PACKAGES = ("torch", "transformers", "peft", "torchao", "bitsandbytes", "ditty_di")
_SECRET = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_OPEN_MODEL = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
_OPEN_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained("{base}"{revision})
tokenizer = AutoTokenizer.from_pretrained("{name}")
{grown}model = PeftModel.from_pretrained(base, "{name}")
"""
_GROWN = """\
if len(tokenizer) > base.get_input_embeddings().num_embeddings:
    base.resize_token_embeddings(len(tokenizer))
"""


def write_card(
    folder: Path,
    record: dict[str, Any],
    *,
    run: str | None,
    license: str | None = None,
    name: str | None = None,
) -> None:
    """Writes `README.md` with the Hub's metadata into an exported folder.

    Args:
        record: `kind` ("model", "adapter" or "merged") and, as far as there are any, `base`,
            `revision`, `drift` (see `drift.Drift`) of the export.
        run: the run directory; what it does not say is left out.
        name: `user/name`, where the folder will be.
    """
    from huggingface_hub import ModelCardData

    known = RunRecord(run)
    source = "weights" if known.at("weights") else "model"  # a model brings its own weights
    base = record.get("base") or known.at(f"{source}.path")
    revision = record.get("revision") or known.at(f"{source}.revision")
    seq2seq = bool(_config(folder).get("is_encoder_decoder")) or bool(record.get("seq2seq"))
    adapter = record["kind"] == "adapter"
    data = ModelCardData(
        base_model=_on_hub(base),
        datasets=_on_hub(known.at("data.path")),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text2text-generation" if seq2seq else "text-generation",
        license=license,
        tags=["ditty_di", *(["adapter"] if adapter else [])],
    )
    place = name or folder.name.strip(".").removesuffix(".new")
    title = name.rpartition("/")[2] if name else known.at("name") or place
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        _what(record["kind"], _shown(base), revision),
        _usage(adapter, place, base, revision, seq2seq),
        *_losses(known),
        *_drift(record),
        *_table("Training", _training(known)),
        *_table("Versions", _versions(known)),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _on_hub(name: Any) -> str | None:
    """A name that the Hub may know, and that is nothing on this machine."""
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    return None


def _what(kind: str, base: str | None, revision: str | None) -> str:
    at = f" at revision `{revision}`" if revision else ""
    start = {
        "adapter": f"Adapters for `{base}`{at}",
        "merged": f"`{base}`{at} with adapters merged into its weights",
        "model": f"`{base}`{at}, fine-tuned" if base else "A model trained from scratch",
    }[kind]
    return f"{start}, trained with ditty_di.\n"


def _usage(adapter: bool, name: str, base: Any, revision: str | None, seq2seq: bool) -> str:
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    if adapter:
        at = f', revision="{revision}"' if revision else ""
        where = _on_hub(base) or f"path/to/{_shown(base)}"
        text = _OPEN_ADAPTER.format(auto=auto, name=name, base=where, revision=at, grown=_GROWN)
    else:
        text = _OPEN_MODEL.format(auto=auto, name=name)
    return f"## Use\n\n```python\n{text}```\n"


def _losses(known: RunRecord) -> list[str]:
    rows = []
    for name, called in (
        ("validation/loss", "held-out loss"),
        ("validation/perplexity", "held-out perplexity"),
        ("loss", "training loss"),
    ):
        found = known.first_and_last(name)
        if found:
            (then, before), (now, after) = found
            first = f"{before:.4f} (step {then})" if then < now else ""
            rows.append(f"| {called} | {first} | {after:.4f} (step {now}) |")
    if not rows:
        return []
    return ["## Losses\n\n| | first | last |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"]


def _drift(record: dict[str, Any]) -> list[str]:
    drift = record.get("drift")
    if not drift:
        return []
    rows = "".join(
        f"| {name.replace('_', ' ')} | {one['max_abs']:.2g} | {one['mean_abs']:.2g} "
        f"| {one['kl']:.2g} |\n"
        for name, one in drift["from"].items()
    )
    return [
        f"## What merging changed\n\nLogits of the merged model against others, on "
        f"{drift['tokens']} tokens of {drift['rows']} rows:\n\n| against | largest difference "
        f"| mean difference | KL divergence (nats) |\n| --- | --- | --- | --- |\n{rows}"
    ]


def _training(known: RunRecord) -> Iterator[tuple[str, str]]:
    if steps := known.first_and_last("loss"):
        yield "steps", str(steps[1][0])
    for name in _NUMBERS:
        if (value := known.at(name)) is not None:
            yield name.replace("_", " "), str(value)
    for key, called in _SECTIONS.items():
        if (value := known.at(key)) is not None and (text := describe(known, value)):
            yield called, f"`{text}`"


def _versions(known: RunRecord) -> Iterator[tuple[str, str]]:
    if python := known.environment.get("python"):
        yield "python", str(python)
    packages: Any = known.environment.get("packages")
    if isinstance(packages, dict):
        yield from ((name, str(packages[name])) for name in _PACKAGES if name in packages)


def _table(title: str, rows: Iterator[tuple[str, str]]) -> list[str]:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    if not lines:
        return []
    return [f"## {title}\n\n| | |\n| --- | --- |\n" + "\n".join(lines) + "\n"]


def describe(known: RunRecord, value: Any, depth: int = 0) -> str:
    """A part of a configuration as one line of Python-like text: `AdamW(lr=0.001)`.

    Deeper than two constructors no arguments are shown, no secrets, and of absolute paths the last
    name.
    """
    value = known.value(value)
    if isinstance(value, dict):
        target = _called(str(value.get("_target_", "")))
        if depth > 2:
            return f"{target}(...)"
        pairs = {
            name: describe(known, part, depth + 1)
            for name, part in value.items()
            if not str(name).startswith("_") and known.value(part) is not None
        }
        shown = ", ".join(f"{n}={t}" for n, t in pairs.items() if not _SECRET.search(str(n)))
        return f"{target}({shown})"
    if isinstance(value, list):
        return f"[{', '.join(describe(known, part, depth + 1) for part in value)}]"
    return _shown(value) or ""


def _called(target: str) -> str:
    """A constructor's name without its module, a class method's with its class."""
    owner, name = ["", *target.split(".")][-2:]
    return f"{owner}.{name}" if owner[:1].isupper() else name


def _shown(value: Any) -> str | None:
    """A value as text; folders of this machine are no business of the card's readers."""
    if value is None:
        return None
    text = " ".join(str(value).split())
    path = Path(text)
    return path.name if path.is_absolute() else text
