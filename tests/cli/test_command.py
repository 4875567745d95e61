"""What was typed, made into what Hydra composes."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ditty_di.cli
import ditty_di.config
import ditty_di.launch
from ditty_di.cli.command import Command, parse, patched
from ditty_di.cli.overrides import merge, normalize
from ditty_di.config import ConfigError
from ditty_di.launch.rundir import RunDirectory


def test_what_is_said_later_replaces_what_was_said_earlier() -> None:
    earlier = ["+experiment=a", "optimizer.lr=1", "+new=1", "~gone", "other=0"]
    later = ["+experiment=b", "optimizer.lr=0", "new=2"]
    assert merge(earlier, later) == [
        *("~gone", "other=0"),
        *("+experiment=b", "optimizer.lr=0", "+new=2"),
    ]


@pytest.mark.parametrize(
    ("typed", "composed"),
    [
        ("experiment=x", "experiment=x"),
        ("+experiment=x", "experiment=x"),
        ("+callbacks=ema", "callbacks=ema"),
        ("adapter=null", "adapter=none"),
        ("prompt=Hello, you! (yes)", "prompt='Hello, you! (yes)'"),
        ("prompt=it's \\ me", "prompt='it\\'s \\ me'"),
        ("model=a,b", "model=a,b"),  # Hydra says what is ambiguous about it
        ("max_steps=[1, 2", "max_steps=[1, 2"),  # and what is unfinished here
        ("lr=1e-3", "lr=1e-3"),
        ("seed=0", "seed=0"),
        ("note=", "note="),
        ("a=${b}", "a=${b}"),
        ("~data.filter", "~data.filter"),
    ],
)
def test_text_is_quoted_and_everything_else_is_left_to_hydra(typed: str, composed: str) -> None:
    assert normalize([typed], sweep=False) == [composed]


def test_in_a_sweep_a_comma_means_a_choice() -> None:
    assert normalize(["lr=1, 2"], sweep=True) == ["lr=1, 2"]


def test_options_may_stand_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = parse(["a=1", "--cfg", "job", "--config-dir=.", "experiment=x", "-cn", "own", "b=2"])
    assert command.options == ["--cfg", "job"]
    assert command.overrides == ["a=1", "+experiment=x", "b=2"]
    assert (command.config_name, command.config_dirs) == ("own", [str(tmp_path)])
    assert command.only_prints and not parse(["a=1"]).only_prints
    (tmp_path / "here").mkdir()
    assert parse(["--config-path", "here", "a=1"]).config_dirs == [str(tmp_path / "here")]


def test_a_runs_overrides_are_kept_without_what_was_for_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("my run, (2)")
    run.prepare()
    first = Command(overrides=["+experiment=x", "a=1", "resume.allow=[a]", "hydra.verbose=true"])
    run.config.touch()
    run.write_command(first.lasting, "config", [])
    command = parse(["run=my run, (2)", "a=0"])
    assert command.earlier and command.run is not None and command.run.path == run.path
    assert command.overrides[:2] == ["+experiment=x", "a=0"]
    assert command.lasting == ["+experiment=x", "a=0"]
    assert parse([command.overrides[-1]]).run.path == run.path  # type: ignore[union-attr]


def test_a_run_in_a_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir=x"):
        parse(["--multirun", "run=x", "a=1,2"])


def test_a_patch_changes_what_changed_and_keeps_the_rest() -> None:
    base = {"task": {"_target_": "train", "x": 1}, "a": 1, "b": {"c": 2, "d": 3}, "only": 5}
    old = {"task": {"_target_": "train", "x": 1}, "a": 0, "b": {"c": 0, "d": 0}, "gone": 0}
    new = {"task": {"_target_": "look", "y": None}, "a": 0, "b": {"c": 7, "d": 0}, "new": None}
    assert patched(base, old, new) == {
        **{"task": {"_target_": "look", "y": None}, "a": 1},
        **{"b": {"c": 7, "d": 3}, "only": 5, "new": None},
    }


def test_the_command_line_imports_no_torch() -> None:
    packages = (ditty_di.cli, ditty_di.config, ditty_di.launch)
    modules = [
        found.name
        for package in packages
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'torchtitan'} & sys.modules.keys()))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert len(modules) > 20 and out.strip() == "[]"
