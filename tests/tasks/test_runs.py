"""Tasks about runs: the best command of a sweep, a table of all, and `run=` of such tasks."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from ditty_di.config import ConfigError
from ditty_di.launch.rundir import RunDirectory
from ditty_di.report.runs import Run
from ditty_di.tasks.report import best
from ditty_di.tasks.watch import Watcher, table, watch
from tests.report.runs import write_run, write_sweep
from tests.toy import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_the_best_command_is_one_that_can_be_typed(folder: Folder) -> None:
    folder("--multirun", "hydra.sweep.dir=swept", "value=3,1,2", "note='a, (b)'")
    out, _ = folder("task=best", "sweep=swept")
    comments, (command,) = out.splitlines()[:-1], out.splitlines()[-1:]
    assert all(line.startswith("#") for line in comments)
    assert "objective 1" in comments[0] and comments[1] == "# swept/1"
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "ditty_di"] and "value=1" in words
    folder(*words[3:])
    repeated = json.loads((folder.run() / "result.json").read_text())
    assert repeated["objective"] == 1.0
    assert "note: a, (b)" in (folder.run() / "config.yaml").read_text()


def test_only_finished_runs_can_be_the_best(tmp_path, capsys, monkeypatch):
    sweep = write_sweep(tmp_path / "a sweep", 3)
    for n, status in enumerate(["failed", "pruned"]):
        result = {"status": status, "objective": 0.1, "step": 3}
        (sweep / str(n) / "result.json").write_text(json.dumps(result))
    best(None, sweep=str(sweep))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("# objective 2.2 at step 40, the lowest of 1 finished")
    assert out[-1].startswith(f"cd '{sweep}' && python -m ditty_di ")
    monkeypatch.chdir(sweep)
    (sweep / "2/config.yaml").write_text("allow_targets: [torch.load]\n")
    best(None, sweep=str(sweep))
    out = capsys.readouterr().out.splitlines()
    assert "allow_targets=[torch.load]" in out[2] and out[3].startswith("python -m ditty_di ")


def test_without_a_finished_run_there_is_one_sentence(folder: Folder) -> None:
    write_run(folder.path / "runs/0", status="failed")
    _, err = folder("task=best", "sweep=runs", code=1)
    assert err.strip() == "sweep=runs: none of 1 runs has finished (0: failed)"
    _, err = folder("task=best", "sweep=conf", code=2)
    assert "no run in this folder" in err


def test_run_of_such_a_task_may_be_any_folders(folder: Folder) -> None:
    pytest.importorskip("vl_convert")
    write_sweep(folder.path / "swept", 2)
    write_run(folder.path / "outputs/x/now")
    out, _ = folder("task=report", "run=[swept,outputs/x/now]", "output=page.html")
    assert out.startswith("page.html (3 runs, ") and (folder.path / "page.html").is_file()
    _, err = folder("task=report", "run=nix", code=2)
    assert err.strip() == "run=nix: there is no such folder"
    _, err = folder("task=report", code=2)
    assert "add run=FOLDER; the newest one here is run=outputs/x/now" in err
    out, _ = folder("task=watch", "run=swept")
    assert "swept/1" in out and "outputs" not in out


# -- the table -------------------------------------------------------------------------------------


def shown(runs, capsys, **options) -> list[str]:
    watch(None, runs=str(runs), once=True, **options)
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_all_runs_are_a_table_sorted_with_those_that_run_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = write_sweep(tmp_path / "a", 12)
    write_run(tmp_path / "b", status=None)
    lines = shown(tmp_path, capsys, sort="validation")
    names = [line.split()[0] for line in lines[2:-1]]
    assert names == ["b", *(f"a/{n}" for n in range(12))]
    assert lines[-1] == "12 finished, 1 stale"
    assert lines[2].split()[1:3] == ["stale", "40"] and "loss" in lines[0]
    os.utime(sweep / "3/result.json", (0, 0))
    os.utime(sweep / "3/metrics.jsonl", (0, 0))
    assert not any("a/3 " in line for line in shown(tmp_path, capsys, hours=1))
    with pytest.raises(ConfigError, match=r"task\.sort=x"):
        watch(None, runs="a", sort="x")
    assert shown(tmp_path / "nix", capsys) == [f"no run below {tmp_path}/nix"]


def test_the_last_step_is_the_trainers(tmp_path):
    write_run(tmp_path / "x", 100, status=None, typed={"trainer.max_steps": 400})
    (line,) = Watcher([str(tmp_path)]).look()
    assert line.max_steps == Run(RunDirectory(tmp_path / "x"), "x").max_steps == 400


def test_a_look_reads_again_only_what_has_changed(tmp_path):
    run = write_run(tmp_path / "x", 100, status=None)
    watcher = Watcher([str(tmp_path)])
    (before,) = watcher.look()
    assert (before.step, before.max_steps, before.eta) == (100, 100, None)
    assert watcher.look()[0] is before
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "loss": 1.5, "tokens_per_second": 2.0}) + "\n")
    (after,) = watcher.look()
    assert (after.step, after.loss, after.speed) == (101, 1.5, 2.0)
    assert after.validation == before.validation


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_gets_the_columns_that_fit(width, tmp_path):
    from rich.console import Console

    for n in range(30):
        write_run(tmp_path / f"a run with quite a long name and the number {n}")
    lines = Watcher([str(tmp_path)]).look()
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(lines, ["."], width, height=20))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 20 and "do not fit" in text
    assert "number 0" in text.replace("\n", " "), "the end of a name is what tells runs apart"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_the_live_table_in_good_order(tmp_path):
    write_run(tmp_path / "outputs/x/now")
    program = "from ditty_di.tasks.watch import watch; watch(None, runs='outputs', seconds=0.1)"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", program])
    read = b""
    deadline = time.monotonic() + 60
    while b"finished" not in read and time.monotonic() < deadline:
        read += os.read(terminal, 4096)
    os.kill(pid, signal.SIGINT)
    try:
        while more := os.read(terminal, 4096):
            read += more
    except OSError:  # the other end is closed
        pass
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) == 0 and b"Traceback" not in read, read.decode()
