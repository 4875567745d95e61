"""The command line, run as a person runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.toy import MODULE, REPOSITORY, Folder, result, wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# -- a run ------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_needed_to_understand_and_repeat_it(folder: Folder) -> None:
    out, _ = folder("value=2.5", "note='${value} it is'")
    run = folder.run()
    assert {p.name for p in run.iterdir()} == {
        *(
            "config.yaml",
            "resolved.yaml",
            "sources.json",
            "overrides.yaml",
            "environment.json",
            "result.json",
        ),
        *("logs", ".lock"),
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["task"]["value"] == "${value}"
    assert config["run"] == str(run)
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    assert (resolved["task"]["value"], resolved["note"]) == (2.5, "2.5 it is")
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "packages", "git", "hardware", "command", "date"} <= environment.keys()
    assert "omegaconf" in environment["packages"]
    assert "value=2.5" in environment["command"]
    assert result(run) | {"seconds": 0} == {
        **{"status": "finished", "step": 3, "objective": 2.5, "seconds": 0},
        **{"tokens_per_second": 10.0, "far": None},  # JSON has no infinity
    }
    assert "rank 0 says 2.5" in (run / "logs/rank-0.log").read_text()
    assert out.endswith(f"finished, step 3, objective 2.5: {run.relative_to(folder.path)}\n")


def test_a_task_that_works_on_a_folder_leaves_no_run(folder: Folder) -> None:
    folder.write(
        "conf/task/folder.yaml",
        """
        # @package _global_
        run: false
        task: {_target_: tests.toy_tasks.finish, value: "${value}", bad: 3.0}
        """,
    )
    scratch = folder.path / "scratch"
    scratch.mkdir()
    temporary = {"TMPDIR": str(scratch)}
    out, _ = folder("task=folder", env=temporary)
    assert "rank 0 says 1.0" in out and "finished" not in out
    assert not list(scratch.iterdir()) and not (folder.path / "outputs").exists()
    _, err = folder("task=folder", "value=3.0", code=1, env=temporary)
    (left,) = scratch.glob("ditty_di-*")
    assert "3.0 is a bad value" in err and f"{left.name}/logs" in err
    _, err = folder("task=look", code=2)
    assert "add run=FOLDER" in err and "newest" not in err
    folder("task=folder", "run=kept", env=temporary)
    assert result(folder.path / "kept")["status"] == "finished"


def test_check_and_its_like_make_no_directory(folder: Folder) -> None:
    out, _ = folder("task=show", "task.key=name")
    assert out == "name is toy\n"
    folder("--cfg", "job")
    assert not (folder.path / "outputs").exists()
    assert not (folder.path / "multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["task.valu=1"], ["Could not override 'task.valu'", "did you mean 'task.value'?"]),
        (["taks=look"], ["did you mean 'task'?"]),
        (["task=finnish"], ["task/finnish", "did you mean 'finish'?"]),
        (["+task.vaule=1"], ["task.vaule", "did you mean 'value'?"]),
        (["value=${nmae}", "note=${nowhere}", "task.bad=${gone}"], ["nmae", "gone"]),
        (["launcher.nproc=0"], ["launcher", "nproc=0"]),
        (["--config-dir", "nowhere"], ["--config-dir", "nowhere"]),
    ],
)
def test_what_cannot_start_is_one_message_and_leaves_nothing(
    folder: Folder, arguments: list[str], says: list[str]
) -> None:
    _, err = folder(*arguments, code=2)
    for words in says:
        assert words in err
    assert "Traceback" not in err
    assert not list(folder.path.glob("outputs/*/*/resolved.yaml")) or "launcher" in says


def test_a_failing_job_is_one_message_with_its_node_and_no_stack(folder: Folder) -> None:
    _, err = folder("task.bad=1.0", code=1)
    assert "RuntimeError: 1.0 is a bad value" in err
    assert "task:" in err and "Traceback" not in err
    run = folder.run()
    assert result(run)["status"] == "failed"
    assert "bad value" in result(run)["error"]
    assert "Traceback" in (run / "logs/rank-0.log").read_text()

    _, err = folder("task.bad=1.0", "debug=true", "task=finish", "run=other", code=1)
    assert "Traceback" in err


def test_what_a_job_leaves_open_is_written_when_the_process_ends(folder: Folder) -> None:
    folder.write(
        "leaves.py",
        """
        import atexit
        import weakref

        class Cycle:
            def __init__(self):
                self.me = self

            def __del__(self):
                open("finalized", "w").write("cycle")

        kept = open("kept", "w")  # by its module

        def task():
            kept.write("not flushed")
            Cycle()
            weakref.finalize(task, lambda: open("weak", "w").write("finalize"))
            atexit.register(lambda: kept.write(", then at exit"))
            return {}
        """,
    )
    folder.write("conf/task/leave.yaml", "_target_: leaves.task")
    folder("task=leave", command=MODULE)
    written = {name: (folder.path / name).read_text() for name in ("kept", "finalized", "weak")}
    assert written == {
        "kept": "not flushed, then at exit",
        "finalized": "cycle",
        "weak": "finalize",
    }


def test_two_runs_of_the_same_second_get_two_directories(folder: Folder) -> None:
    config = folder.path / "conf/config.yaml"
    config.write_text(re.sub("^run: .*", "run: outputs/toy/now", config.read_text(), flags=re.M))
    for _ in range(3):
        folder()
    assert {p.name for p in folder.path.glob("outputs/toy/*")} == {"now", "now+2", "now+3"}


# -- run=FOLDER -------------------------------------------------------------------------------


def test_run_alone_goes_on_with_what_the_run_was_told(folder: Folder) -> None:
    folder("value=4.0", "experiment=other", "run=mine", "note=a", "load.optimizer=false")
    out, _ = folder("run=mine")
    assert "rank 0 says 4.0" in out
    config = yaml.safe_load((folder.path / "mine/config.yaml").read_text())
    assert (config["name"], config["note"]) == ("other", "a")
    assert config["load"]["optimizer"] is True  # was meant for that one start
    folder("value=4.0", "experiment=other", "run=mine", "note=b")  # the same command, too
    assert "note=b" in (folder.path / "mine/overrides.yaml").read_text()


def test_a_run_does_not_go_on_with_other_values_unless_allowed(folder: Folder) -> None:
    folder("value=4.0", "task=finish", "run=mine")
    before = (folder.path / "mine/config.yaml").read_text()
    _, err = folder("run=mine", "value=5.0", "note=b", code=2)
    assert "value" in err and "4.0" in err and "5.0" in err and "note" not in err
    assert "resume.allow=[value]" in err
    assert (folder.path / "mine/config.yaml").read_text() == before
    assert result(folder.path / "mine")["objective"] == 4.0

    folder("run=mine", "value=5.0", "resume.allow=[value]")
    assert result(folder.path / "mine")["objective"] == 5.0
    folder("run=mine")  # from now on those are its values
    _, err = folder("run=mine", "value=4.0", code=2)
    assert "resume.allow" in err


def test_a_run_of_an_earlier_version_is_refused_in_plain_words(folder: Folder) -> None:
    folder("task=finish", "run=mine")
    with (folder.path / "mine/config.yaml").open("a") as config:
        config.write("checkpointer: null\n")
    _, err = folder("run=mine", code=2)
    assert "written by an earlier version of ditty_di" in err and "start a new run" in err


def test_another_task_starts_from_the_runs_own_configuration(folder: Folder) -> None:
    folder("value=4.0", "task=finish", "run=mine")
    stored = folder.path / "mine/config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("value: 4.0", "value: 4.5"))  # what composes no more
    out, _ = folder("task=look", "run=mine", "prompt=Hello, you!")
    assert "run=mine prompt=Hello, you! value=4.5" in out
    out, _ = folder("task=look", "run=mine", "value=7")
    assert "value=7" in out
    assert result(folder.path / "mine")["objective"] == 4.0
    assert (folder.path / "mine/config.yaml").read_text() == text.replace("4.0", "4.5")
    assert len(list((folder.path / "mine/tasks").iterdir())) == 2
    out, _ = folder("task=show", "run=mine", "task.key=value")
    assert out == "value is 4.5\n"


def test_a_moved_run_is_found_from_another_folder_and_without_its_conf(folder: Folder) -> None:
    folder("task=finish", "run=mine")
    (folder.path / "elsewhere").mkdir()
    (folder.path / "mine").rename(folder.path / "elsewhere/moved")
    inner = Folder(folder.path / "elsewhere/work")
    for file in (inner.path / "conf").rglob("*.yaml"):
        file.unlink()
    out, _ = inner("task=look", "run=../moved")
    assert "run=moved" in out


def test_what_is_no_run_is_refused(folder: Folder) -> None:
    folder.write("papers/a.txt", "mine")
    _, err = folder("run=papers", code=2)
    assert "papers" in err and "no run" in err
    assert os.listdir(folder.path / "papers") == ["a.txt"]

    folder()
    _, err = folder("task=look", "run=typo", code=2)
    assert "no such run" in err and f"run={folder.run().relative_to(folder.path)}" in err
    _, err = folder("task=look", code=2)
    assert "add run=" in err
    assert not (folder.path / "typo").exists()


def test_one_directory_is_worked_in_by_one_process(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    first = folder.start(task, "run=mine")
    wait_for(folder.path / "mine/ready-0", process=first)
    _, err = folder(task, "run=mine", code=2)
    assert f'another process is working in "mine" (launcher with pid {first.pid} on ' in err
    (folder.path / "mine/stop").touch()
    first.communicate(timeout=30)
    assert result(folder.path / "mine")["status"] == "preempted"
    out, _ = folder("run=mine", "task.stop_file=/", "resume.allow=[task]")  # stop is gone
    assert "preempted" in out


def test_a_misspelt_run_starts_nothing(folder: Folder) -> None:
    folder("experiment=other", "run=runs/first")
    for typed in (["run=runs/frist"], ["run=runs/frist", "value=3"]):
        _, err = folder(*typed, code=2)
        assert "run=runs/frist: no such run; the nearest: run=runs/first" in err
        assert "experiment=pretrain run=runs/frist" in err
        assert not (folder.path / "runs/frist").exists()
    out, _ = folder("experiment=other", "run=runs/frist")
    assert "finished" in out


# -- where configuration is found --------------------------------------------------------------


def test_the_working_folders_conf_comes_first_then_config_dir_then_ours(folder: Folder) -> None:
    mine = "# @package _global_\nname: {}\n"
    folder.write("more/experiment/pretrain.yaml", mine.format("more"))
    folder.write("more/experiment/extra.yaml", mine.format("extra"))

    def name(*arguments: str) -> str:
        return folder("task=show", "task.key=name", *arguments)[0].split()[-1]

    assert name("experiment=pretrain", "--config-dir", "more") == "shipped"  # ./conf
    assert name("experiment=extra", "--config-dir=more") == "extra"
    (folder.path / "conf/experiment/pretrain.yaml").unlink()
    assert name("+experiment=pretrain", "-cd", "more") == "more"


def test_no_experiment_is_the_shipped_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "conf/config.yaml").unlink()
    out, _ = folder("--cfg", "job")
    assert "name: shipped" in out
    assert "name: other" in folder("--cfg", "job", "experiment=other")[0]
    assert "name: shipped" not in folder("--cfg", "job", "experiment=null")[0]


def test_the_shipped_configuration_wins_no_argument_with_itself(folder: Folder) -> None:
    """In the checkout ./conf is the shipped folder: it is searched once."""
    from ditty_di.cli import searchpath

    code = "from ditty_di.cli import searchpath; print(searchpath.user_dirs())"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
    assert out.strip() == "[]"
    assert (searchpath.conf_dir() / "hydra/ditty_di.yaml").is_file()


def test_help_explains_and_imports_nothing_heavy(folder: Folder) -> None:
    code = textwrap.dedent(
        """
        import sys
        from ditty_di.__main__ import main
        main(["--help"])
        print(sorted({"torch", "hydra", "transformers", "numpy"} & sys.modules.keys()))
        """
    )
    out, _ = folder(command=(sys.executable, "-c", code))
    assert out.endswith("[]\n")
    for words in (
        "experiment=",
        "--multirun",
        "run=FOLDER",
        "Looks at a run",
        "Another experiment",
    ):
        assert words in out


def test_completion_in_the_shell(folder: Folder) -> None:
    out, _ = folder("-sc", "install=bash")
    assert "hydra_bash_completion" in out


# -- stopping ---------------------------------------------------------------------------------


def test_sigterm_is_an_orderly_end_and_the_same_command_goes_on(folder: Folder) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    process = folder.start(task, "run=mine")
    wait_for(folder.path / "mine/ready-0", process=process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "preempted" in out and "python -m ditty_di run=mine" in out
    assert result(folder.path / "mine")["status"] == "preempted"
