"""One self-contained HTML page about runs."""

from __future__ import annotations

import hashlib
import json
import secrets
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ditty_di.config import ABSENT, difference
from ditty_di.config.errors import ConfigError
from ditty_di.io import read_json
from ditty_di.report import charts, search
from ditty_di.report.runs import Run
from ditty_di.report.words import clock, number, size

_HERE = Path(__file__).parent
#: Steps of a sample that are shown, and runs with a column of their own in the differences.
_SAMPLES, _COLUMNS = 12, 6
_PACKAGES = ("ditty_di", "torch", "torchtitan", "transformers", "peft", "datasets")


def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script.

    Raises:
        ConfigError: the package that brings them is missing.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigError(
            "task=report draws with Vega-Lite, which vl-convert-python brings: "
            "pip install 'ditty_di[report]'"
        ) from error
    bundle: Any = vl_convert.javascript_bundle  # whose annotation demands an argument
    # A script ends at the first "</script", also inside of a string.
    return bundle().replace("</script", "<\\/script")


def render(runs: Sequence[Run], title: str, *, points: int, ignore: Collection[str] = ()) -> str:
    """Return the page.

    Args:
        runs: the runs; in a comparison the best comes first.
        title: of the page.
        points: of a curve that are drawn, see `charts.charts`.
        ignore: keys that cannot change the numbers; they come last in the differences.
    """
    runs = sorted(runs, key=_rank) if len(runs) > 1 else runs
    keys = search.varied(runs) if len(runs) > 1 else {}
    data = {"charts": charts.charts(runs, points), "runs": [run.name for run in runs]}
    sweep = _sweep(runs, keys)
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True)
    environment.filters |= {"number": number, "clock": clock}
    return environment.get_template("page.html").render(
        title=title,
        runs=runs,
        cards=_cards(runs),
        counts=Counter(run.status for run in runs).most_common(),
        rows=[_row(run) for run in runs],
        keys=keys,
        sweep=sweep,
        samples=[(run, _samples(run)) for run in runs if run.texts],
        differences=_differences(runs, ignore),
        columns=len(runs) <= _COLUMNS,
        lineage=[_lineage(run) for run in runs],
        logged=max((len(steps) for run in runs for steps, _ in run.series.values()), default=0),
        drawn=points // len(runs),
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=_version(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        library=library(),
        nonce=secrets.token_hex(16),
        data=json.dumps(data | {"sweep": sweep}, allow_nan=False).replace("<", "\\u003c"),
    )


def _version() -> str:
    try:
        return metadata.version("ditty_di")
    except metadata.PackageNotFoundError:  # run from a folder of source
        return ""


def _rank(run: Run) -> tuple[bool, float]:
    """Return a key: finished runs by objective, then the others by theirs."""
    objective = run.objective
    return run.status != "finished", float("inf") if objective is None else objective


# -- figures --------------------------------------------------------------------------------------


def _cards(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return (label, figure, addition) of the key figures at the top."""
    if len(runs) == 1:
        row, run = _row(runs[0]), runs[0]
        at = run.result.get("objective_step")
        whole = f"of {number(row['max_steps'])}" if row["max_steps"] else ""
        found = [
            ("objective", number(row["objective"]), f"step {number(at)}" if at else ""),
            ("steps", number(row["step"]), whole),
            ("throughput", number(row["speed"]), "tokens/s"),
            ("peak memory", number(row["memory"]), "GiB"),
            ("time", clock(row["seconds"]), ""),
        ]
        if run.status == "running" and (left := run.last("eta_seconds")) is not None:
            found.append(("remaining", clock(left), ""))
    else:
        best = runs[0]
        seconds = [row["seconds"] for row in map(_row, runs) if row["seconds"]]
        found = [
            ("runs", str(len(runs)), ""),
            ("best objective", number(best.objective), f"run {best.name}"),
            ("time of all", clock(sum(seconds)) if seconds else "-", ""),
        ]
    return [card for card in found if card[1] != "-"]


def _row(run: Run) -> dict[str, Any]:
    """Return the figures of a run for the table."""
    speeds = [v for v in run.series["tokens_per_second"][1] if v] if run.series else []
    usual = statistics.median(speeds) if speeds else None
    memory = [v for v in run.series["memory_gib"][1] if v] if run.series else []
    return {
        "objective": run.objective,
        "step": run.step,
        "max_steps": run.max_steps,
        "speed": run.result.get("tokens_per_second") or usual,
        "memory": run.result.get("peak_memory_gib") or max(memory, default=None),
        "seconds": run.result.get("seconds") or run.result.get("train_seconds"),
    }


def _sweep(runs: Sequence[Run], keys: dict[str, list[Any]]) -> dict[str, Any] | None:
    """Return the axes and importances of a search; None where nothing was searched."""
    shown = [n for n, run in enumerate(runs) if run.objective is not None]
    objectives = [float(runs[n].objective or 0.0) for n in shown]
    own = {key: [values[n] for n in shown] for key, values in keys.items()}
    own = {key: values for key, values in own.items() if len({*values}) > 1}
    if not own or len(shown) < 2:
        return None
    found, method = search.importance(own, objectives)
    axes = [{"name": key, **search.axis(values)} for key, values in own.items()]
    return {
        "runs": shown,
        "axes": [*axes, {"name": "objective", **search.axis(objectives)}],
        "values": [[*(v[n] for v in own.values()), y] for n, y in enumerate(objectives)],
        "importance": found,
        "method": method,
    }


# -- texts and origins ----------------------------------------------------------------------------


def _samples(run: Run) -> list[tuple[str, int, list[tuple[int, str]]]]:
    """Return name, number of logged texts, and the texts that are shown: first, last, between."""
    found = []
    for name, texts in run.texts.items():
        last = len(texts) - 1
        kept = sorted({round(last * n / (_SAMPLES - 1)) for n in range(_SAMPLES)})
        found.append((name, len(texts), [texts[n] for n in kept]))
    return found


def _differences(runs: Sequence[Run], ignore: Collection[str]) -> list[dict[str, Any]]:
    """Return the keys of the configurations that are not equal, those that count first.

    Each has its `values` by run, and by value the names of the `runs` that have it.
    """
    known = [run for run in runs if run.config]
    keys = {change.key for run in known[1:] for change in difference(known[0].config, run.config)}
    found = []
    for key in sorted(keys - {"run"}, key=lambda key: (_below(key, ignore), key)):
        values = [_text(run.config.get(key, ABSENT)) if run.config else "" for run in runs]
        by_value: dict[str, list[str]] = defaultdict(list)
        for run, value in zip(runs, values, strict=True):
            by_value[value].append(run.name)
        entry = {"key": key, "values": values, "runs": by_value, "minor": _below(key, ignore)}
        found.append(entry)
    return found


def _below(key: str, above: Collection[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in above)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)


def _lineage(run: Run) -> list[tuple[str, str]]:
    """Return (what, value) about where a run comes from, and what it has left."""
    about, git = run.environment, run.environment.get("git") or {}
    hardware, packages = about.get("hardware") or {}, about.get("packages") or {}
    gpus = Counter(filter(None, hardware.get("gpus") or ()))
    commit = git.get("commit", "") + (", with uncommitted changes" if git.get("dirty") else "")
    machine = [hardware.get("host"), hardware.get("cpu"), *(f"{n} x {g}" for g, n in gpus.items())]
    versions = [f"{name} {packages[name]}" for name in _PACKAGES if name in packages]
    rows = [
        ("folder", str(run.directory)),
        ("error", str(run.result.get("error") or "")),
        ("stopped", str(run.result.get("stopped") or "")),
        ("files", "; ".join(run.problems)),
        ("started", about.get("date")),
        ("command", about.get("command")),
        ("in", about.get("folder")),
        ("commit", commit),
        ("machine", ", ".join(map(str, filter(None, machine)))),
        ("versions", ", ".join([f"Python {about['python']}", *versions] if about else [])),
        ("sweep", str(run.directory.sweep() or "")),
        *_sources(run),
        *_checkpoints(run),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _sources(run: Run) -> list[tuple[str, str]]:
    """Return what was read: models, checkpoints and data that the configuration names."""
    names = ("path", "paths", "repo", "folder", "pretrained_model_name_or_path", "revision")
    found = []
    for key, value in run.config.items():
        section, _, name = key.partition(".")
        if (
            section in ("model", "weights", "tokenizer", "data", "adapter", "validator")
            and name.rpartition(".")[2] in names
            and isinstance(value, str)
            and "${" not in value
        ):
            manifest = Path(run.environment.get("folder") or ".", value, "manifest.json")
            found.append((key, value + (f", {_digest(manifest)}" if manifest.is_file() else "")))
    return found


def _checkpoints(run: Run) -> list[tuple[str, str]]:
    """Return the whole checkpoints, newest first, with the digests of their manifests."""
    found = []
    for file in sorted(run.directory.path.glob("checkpoints/step-*/manifest.json"), reverse=True):
        manifest = read_json(file)
        if isinstance(manifest, dict):
            whole = sum((manifest.get("files") or {}).values())
            text = f"{size(whole)}, {_digest(file)}"
            found.append((f"checkpoint {manifest.get('step')}", text))
    return found[:10]


def _digest(file: Path) -> str:
    return f"manifest SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
