"""Write the model card: what was trained, how, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ditty_di.export.run_info import RunInfo
from ditty_di.io import read_json

#: Keys of the configuration that the card shows, and their names in the card.
_SECTIONS = {
    "data.corpus": "corpus",
    "data.train": "training data",
    "quantize": "base quantized by",
    "adapter": "adapter",
    "loss": "loss",
    "optimizer": "optimizer",
    "lr_scheduler": "schedule",
    "parallelize": "layout",
}
_LOSSES = {
    "validation/loss": "held-out loss",
    "validation/perplexity": "held-out perplexity",
    "loss": "training loss",
}
_NUMBERS = ("global_batch_size", "epochs", "seed")
_PACKAGES = ("torch", "transformers", "peft", "torchao", "bitsandbytes", "ditty_di")
_SECRET = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: Path,
    record: dict[str, Any],
    *,
    run: str | None,
    license: str | None = None,
    name: str | None = None,
) -> None:
    """Write `README.md` with the Hub's metadata into an exported folder.

    Args:
        folder: the exported folder; its `config.json` is read if there is one.
        record: `kind` ("model", "adapter" or "merged") and, where known, `base`, `revision`,
            `seq2seq`, `auto` (the class of transformers that opens it), `pipeline_tag`, `library`
            and `logit_diff` (logit differences) of the export.
        run: the run directory; what it does not say is left out.
        license: a name that the Hub knows.
        name: `user/name` on the Hub, if the folder will be uploaded.
    """
    known = RunInfo(run)
    source = "weights" if known.at("weights") else "model"  # a model brings its own weights
    base = record.get("base") or known.at(f"{source}.path")
    revision = record.get("revision") or known.at(f"{source}.revision")
    config = read_json(folder / "config.json") or {}
    seq2seq = bool(config.get("is_encoder_decoder")) or bool(record.get("seq2seq"))
    auto, tag = "AutoModelForCausalLM", "text-generation"
    if seq2seq:
        auto, tag = "AutoModelForSeq2SeqLM", "text2text-generation"
    adapter = record["kind"] == "adapter"
    place = name or folder.name.strip(".").removesuffix(".new")
    data = ModelCardData(
        base_model=_on_hub(base),
        datasets=_on_hub(known.at("data.path")),
        library_name="peft" if adapter else record.get("library", "transformers"),
        pipeline_tag=record.get("pipeline_tag") or tag,
        license=license,
        tags=["ditty_di", *(["adapter"] if adapter else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        title=name.rpartition("/")[2] if name else known.at("name") or place,
        summary=_summary(record["kind"], _shown(base), revision),
        adapter=adapter,
        auto=record.get("auto") or auto,
        processor=(folder / "processor_config.json").exists(),
        name=place,
        base=_on_hub(base) or f"path/to/{_shown(base)}",
        revision=revision,
        losses=list(_losses(known)),
        logit_diff=record.get("logit_diff"),
        training=list(_training(known)),
        versions=list(_versions(known)),
    )
    (folder / "README.md").write_text(f"{card.content}\n", encoding="utf-8")


def _on_hub(name: Any) -> str | None:
    """Return a name that may be on the Hub and is not a path on this machine, else None."""
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    return None


def _summary(kind: str, base: str | None, revision: str | None) -> str:
    at = f" at revision `{revision}`" if revision else ""
    return {
        "adapter": f"Adapters for `{base}`{at}",
        "merged": f"`{base}`{at} with adapters merged into its weights",
        "model": f"`{base}`{at}, fine-tuned" if base else "A model trained from scratch",
    }[kind]


def _losses(known: RunInfo) -> Iterator[tuple[str, str, str]]:
    for metric, name in _LOSSES.items():
        if found := known.first_and_last(metric):
            (then, before), (now, after) = found
            first = f"{before:.4f} (step {then})" if then < now else ""
            yield name, first, f"{after:.4f} (step {now})"


def _training(known: RunInfo) -> Iterator[tuple[str, str]]:
    if steps := known.first_and_last("loss"):
        yield "steps", str(steps[1][0])
    for name in _NUMBERS:
        if (value := known.at(name)) is not None:
            yield name.replace("_", " "), str(value)
    for key, name in _SECTIONS.items():
        if (value := known.at(key)) is not None and (text := describe(known, value)):
            yield name, f"`{text}`"


def _versions(known: RunInfo) -> Iterator[tuple[str, str]]:
    packages = known.environment.get("packages")
    found = {"python": known.environment.get("python")}
    if isinstance(packages, dict):
        found |= {name: packages.get(name) for name in _PACKAGES}
    return ((name, str(version)) for name, version in found.items() if version)


def describe(known: RunInfo, value: Any, depth: int = 0) -> str:
    """Return a part of a configuration as one line of Python-like text: `AdamW(lr=0.001)`.

    Secrets are left out, of absolute paths only the last name is shown, and arguments only down to
    two nested constructors.

    Args:
        known: the run whose references are followed.
        value: the part of its configuration.
        depth: number of constructors around it.
    """
    value = known.value(value)
    if isinstance(value, list):
        return f"[{', '.join(describe(known, part, depth + 1) for part in value)}]"
    if not isinstance(value, dict):
        return _shown(value) or ""
    target = _called(str(value.get("_target_", "")))
    if depth > 2:
        return f"{target}(...)"
    shown = (
        f"{name}={describe(known, part, depth + 1)}"
        for name, part in value.items()
        if not str(name).startswith("_") and not _SECRET.search(str(name))
        if known.value(part) is not None
    )
    return f"{target}({', '.join(shown)})"


def _called(target: str) -> str:
    """Return a constructor's name without its module; that of a classmethod with its class."""
    owner, name = ["", *target.split(".")][-2:]
    return f"{owner}.{name}" if owner[:1].isupper() else name


def _shown(value: Any) -> str | None:
    """Return a value as text, without the folders of an absolute path."""
    if value is None:
        return None
    text = " ".join(str(value).split())
    path = Path(text)
    return path.name if path.is_absolute() else text
