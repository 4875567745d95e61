"""A working folder with a configuration of its own, and the real command line run in it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.warm import Forked

REPOSITORY = Path(__file__).resolve().parents[1]
MODULE = (sys.executable, "-m", "ditty_di")

CONFIG = {
    "config.yaml": """
        defaults: [{hydra: ditty_di}, _self_, {launcher: local}, {task: finish}]
        name: toy
        value: 1.0
        note: nothing
        debug: false
        run: outputs/${name}/${now:%Y-%m-%d_%H-%M-%S}
        resume: {allow: [], ignore: [run, note, launcher, resume, load, debug]}
        allow_unread: []
        load: {optimizer: true}
        """,
    "task/finish.yaml": """
        _target_: tests.toy_tasks.finish
        value: ${value}
        bad: null
        """,
    "task/look.yaml": """
        # @package _global_
        # Looks at a run
        run: null
        prompt: nothing
        task:
          _target_: tests.toy_tasks.look
          run: ${run}
          prompt: ${prompt}
          value: ${value}
        """,
    "task/show.yaml": """
        _target_: tests.toy_tasks.show
        _partial_: true
        key: value
        """,
    "experiment/pretrain.yaml": """
        # @package _global_
        name: shipped
        """,
    "experiment/other.yaml": """
        # @package _global_
        # Another experiment
        name: other
        value: 2.0
        """,
}


class Folder:
    """A working folder; called with arguments it runs `python -m ditty_di` there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name, text in CONFIG.items():
            self.write(f"conf/{name}", text)

    def write(self, name: str, text: str) -> Path:
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(line[indent:] for line in lines) + "\n")
        return file

    def task(self, target: str, **arguments: Any) -> str:
        """Writes a task file; the override that chooses it."""
        lines = [f"_target_: tests.toy_tasks.{target}"]
        self.write(
            f"conf/task/{target}.yaml",
            "\n".join(lines + [f"{k}: {v}" for k, v in arguments.items()]),
        )
        return f"task={target}"

    def start(
        self,
        *arguments: str,
        command: tuple[str, ...] = (),
        module: str = "ditty_di",
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """A started `python -m MODULE`, or `command`, as `subprocess.Popen`."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env = outside | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}
        if not command and sys.platform == "linux":
            return Forked(["-m", module, *arguments], self.path, env)
        return subprocess.Popen(
            [*(command or (sys.executable, "-m", module)), *arguments],
            cwd=self.path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, code: int = 0, **started: Any) -> tuple[str, str]:
        """(standard output, standard error) of a command that ends with `code`."""
        process = self.start(*arguments, **started)
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def run(self) -> Path:
        """The only run that was made here without `run=`."""
        (run,) = self.path.glob("outputs/*/*")
        return run


def measured(
    name: str, *options: str, report: Path, env: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """What a benchmark of launch/benchmarks reports in a process of its own."""
    done = subprocess.run(
        [sys.executable, f"launch/benchmarks/{name}.py", *options, "--json", str(report)],
        cwd=REPOSITORY,
        env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def wait_for(*files: Path, process: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False
