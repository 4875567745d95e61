"""Runs are found and read in whatever state they are; curves keep what matters."""

from __future__ import annotations

import json
import math
import os
import platform

import pytest

from ditty_di.config import ConfigError
from ditty_di.launch.rundir import RunDirectory
from ditty_di.report import charts, runs, search
from ditty_di.report.words import clock, number, size
from tests.report.runs import write_run, write_sweep


def read(folder, name="x") -> runs.Run:
    return runs.Run(RunDirectory(folder), name)


def test_runs_are_found_below_folders_in_natural_order_and_once(tmp_path):
    sweep = write_sweep(tmp_path / "multirun/a", 11)
    alone = write_run(tmp_path / "outputs/x/now")
    write_run(alone / "tasks/evaluate")  # of a task on the run
    (tmp_path / "outputs/notes").mkdir()
    found = [d.path for d in runs.find([tmp_path, sweep])]
    assert found == [*(sweep / str(n) for n in range(11)), alone]
    with pytest.raises(ConfigError, match="no run in this folder"):
        runs.require([tmp_path / "outputs/notes"], "run")
    with pytest.raises(ConfigError, match="no such folder"):
        runs.require([tmp_path / "nix"], "run")


def test_names_are_short_unless_they_would_be_equal(tmp_path):
    a, b = write_run(tmp_path / "a/0"), write_run(tmp_path / "b/0")
    name = lambda *folders: [r.name for r in runs.name_all(runs.find(folders), folders)]  # noqa: E731
    assert name(tmp_path / "a") == ["0"] and name(a) == ["a/0"]
    assert name(tmp_path / "a", tmp_path / "b") == [str(a), str(b)]


def test_a_status_says_whether_somebody_works_on_the_run(tmp_path):
    folder = write_run(tmp_path / "x", status=None)
    run = RunDirectory(folder)
    assert runs.status(run) == "stale"
    mine = {"role": "launcher", "pid": os.getpid(), "host": platform.node()}
    (folder / ".lock").write_text(json.dumps(mine) + "\n")
    assert runs.status(run) == "running"
    (folder / ".lock").write_text(json.dumps(mine | {"host": "elsewhere"}) + "\n")
    assert runs.status(run) == "running", "it wrote a moment ago"
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    assert runs.status(run) == "stale", "its machine has been silent for years"
    for content in ('{"half', "3\n", '{"pid": 3}\n'):
        (folder / ".lock").write_text(content)
        assert runs.status(run) == "stale"
    (folder / "result.json").write_text('{"status": "pruned"}')
    assert runs.status(run) == "pruned"


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "x")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": "one"}\n[1]\n{"step": 41, "loss": null}\n{"step": 42, "lo')
    for name in ("result.json", "environment.json", "config.yaml", "overrides.yaml"):
        (folder / name).write_text('{"a": [')
    run = read(folder)
    assert run.step == 41 and 2 < run.objective < 3 and run.last("loss") is None
    assert (run.result, run.environment, run.config, run.command, run.overrides) == ({},) * 5
    assert run.problems == [
        "lines of metrics.jsonl that cannot be read: 3",
        *(
            f"{name} cannot be read"
            for name in ("result.json", "environment.json", "config.yaml", "overrides.yaml")
        ),
    ]


def test_the_last_values_are_read_from_the_end(tmp_path):
    folder = write_run(tmp_path / "x", 4000)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 4001, "name": "s", "text": "says \\"loss\\""}\n{"step": 4002, "loss": 1'
        )
    last = runs.latest(RunDirectory(folder))
    assert last["step"] == 4000 and last["eta_seconds"] == 0.0
    assert last["validation/loss"] == pytest.approx(2.1, abs=0.01)
    assert runs.latest(RunDirectory(tmp_path / "nix")) == {}


def test_a_job_that_did_not_start_has_what_its_sweep_gave_it(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", 1)
    (sweep / "1").mkdir()
    (sweep / "1/result.json").write_text('{"status": "failed", "error": "no such data"}')
    line = {"folder": "sweep/1", "overrides": ["a.b=2", "hydra.x=1"]}
    (sweep / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    assert read(sweep / "1").overrides == {"a.b": "2"}


# -- curves ----------------------------------------------------------------------------------------


def test_few_points_show_every_peak_and_every_gap(tmp_path):
    folder = write_run(tmp_path / "x", 10_000)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    entry = {e["step"]: e for e in entries if "loss" in e}
    entry[5003]["loss"], entry[7001]["loss"], entry[8000]["loss"] = 99.0, -5.0, None
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (loss, *_) = charts.charts([read(folder)], 400)
    training, held_out = loss["series"]
    steps, values = training["raw"]
    assert len(steps) <= 400 + 3 and steps[0] == 1 and steps[-1] == 10_000
    assert steps == sorted({*steps})
    shown = dict(zip(steps, values, strict=True))
    assert (shown[5003], shown[7001], shown[8000]) == (99.0, -5.0, None)
    assert held_out["held_out"] and len(held_out["raw"][0]) == 4 and "smooth" not in held_out


def test_a_smoothed_curve_lies_in_the_middle_and_does_not_lag(tmp_path):
    run = read(write_run(tmp_path / "x"))
    for n in range(1, 1001):  # a straight line with an alternating error
        run.series["slope"][0].append(n)
        run.series["slope"][1].append(n + 100 * (-1) ** n)
    chart = next(c for c in charts.charts([run], 2000) if c["title"] == "slope")
    steps, values = chart["series"][0]["smooth"]
    inside = [(s, v) for s, v in zip(steps, values, strict=True) if 100 < s < 900]
    assert inside and max(abs(v - s) for s, v in inside) < 8


def test_runs_that_are_compared_have_one_metric_a_chart(tmp_path):
    compared = [read(write_run(tmp_path / str(n), seed=n), str(n)) for n in range(2)]
    for run in compared:
        run.series["loss/code"] = run.series["loss/wiki"] = run.series["loss"]
    found = {chart["title"]: chart for chart in charts.charts(compared, 2000)}
    assert {"Loss", "Loss by source: code", "Loss by source: wiki", "Throughput"} <= found.keys()
    assert [(s["run"], s["held_out"]) for s in found["Loss"]["series"]] == [
        *((0, False), (1, False), (0, True), (1, True))
    ]
    (alone,) = [c for c in charts.charts(compared[:1], 2000) if c["title"] == "Loss by source"]
    assert [series["label"] for series in alone["series"]] == ["code", "wiki"]


# -- a search --------------------------------------------------------------------------------------


def test_what_was_varied_is_found_and_the_key_that_matters_is_the_most_important(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", 12)
    found = [read(sweep / str(n), str(n)) for n in range(12)]
    found[3].directory.overrides.write_text("overrides: [optimizer.kind=adamw, seed=1]")
    keys = search.varied(found)
    assert list(keys) == ["optimizer.lr", "optimizer.kind", "seed"]
    assert keys["optimizer.lr"][3] is None and keys["seed"][3] == 1
    rates, kinds = keys["optimizer.lr"][4:], keys["optimizer.kind"][4:]
    scores = [run.objective for run in found[4:]]
    shares, method = search.importance({"kind": kinds, "rate": rates}, scores)
    assert list(shares) == ["rate", "kind"] and shares["rate"] > 0.7 and method
    assert search._explained(kinds, scores) < 0.2 < 0.8 < search._explained(rates, scores)
    assert search._explained(kinds, [1.0] * 8) == 0.0


def test_axes_are_linear_logarithmic_or_in_order_of_names():
    log = search.axis([1e-4, None, 1e-2])
    assert log["positions"] == [0.0, None, 1.0] and len(log["ticks"]) == 2
    wide = search.axis([1e-4, 3e-4, 2e-3, 5e-3, 8e-3, 1e-1])
    assert wide["positions"][3] == pytest.approx(math.log(50) / math.log(1000))
    assert search.axis([1.0, 2.0, 3.0])["positions"] == [0.0, 0.5, 1.0]
    assert search.axis([2, 2])["positions"] == [0.0, 0.0]
    names = search.axis(["b", "a", "b"])
    assert names == {"positions": [0.75, 0.25, 0.75], "ticks": [[0.25, "a"], [0.75, "b"]]}


def test_numbers_are_written_for_people():
    assert [number(v) for v in (None, math.nan, 7.291312, 0.0003125, 14600.4, 12)] == [
        *("-", "-", "7.2913", "0.0003125", "14,600", "12")
    ]
    assert [clock(s) for s in (None, 42, 60, 200, 18720, 183600)] == [
        *("-", "42 s", "1 min", "3 min 20 s", "5 h 12 min", "2 d 3 h")
    ]
    assert [size(n) for n in (3, 1500, 2.5e9)] == ["3 bytes", "1.5 kB", "2.5 GB"]
