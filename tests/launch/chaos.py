"""Kill processes of a training on two ranks at random, and compare where it ends with one that
was left alone: `python -m tests.launch.chaos --kills 30 --steps 400`. With `--hosts` or `--elastic`
each rank is on a host of its own (`chaos_hosts.py`).

The launcher starts the ranks again after one was killed; a launcher that was killed or stopped is
started again from here. Exit code 0 when the final states are equal bit for bit, nothing survived a
kill by more than five seconds, and no second process ever got into the folder. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.toy import REPOSITORY, Forked

SURVIVAL_SECONDS = 5.0

MODULE = """
DROPOUT, NOISE = {dropout}, {noise}

import os
import random
import time
import numpy as np
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 16), nn.Dropout(DROPOUT), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.drop(self.first(x)).relu())

class Rows:
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 512

    def __getitem__(self, index):
        time.sleep(self.seconds)
        while os.path.exists("hold"):
            time.sleep(0.05)
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        noise = NOISE * torch.rand(8) * random.random() * np.random.random()  # augmentation
        return {"input": x + noise}, x[:4].sin()
"""

DATA = """
train: {{_target_: mylib.Rows, seconds: 0.01}}
loader:
  _target_: ditty_di.data.Loader
  _partial_: true
  dataset: ${{data.train}}
  micro_batch_size: 4
  num_workers: {workers}
  seed: ${{seed}}
"""

EXPERIMENT = """
# @package _global_
defaults:
  - override /model: chaos
  - override /data: chaos
  - override /weights: torch
  - override /loss: mse
  - override /optimizer: adamw
  - override /validator: null
  - override /export: null
  - override /logger: quiet
  - override /launcher: {group}
  - _self_
name: chaos
max_steps: {steps}
global_batch_size: 16
launcher: {launcher}
checkpoint: {{save_interval: 5, keep_latest_k: 3}}
logger:
  log_interval: 1
  loggers:
    jsonl: {{_target_: ditty_di.loggers.JSONLines, path: "${{run}}/metrics.jsonl"}}
"""


class Chaos:
    """A folder with two runs of the same experiment: `calm` and `wild`.

    With `random_rows` each rank draws random numbers, so that a resume on as many ranks only is
    exact.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        workers: int,
        seed: int,
        *,
        choice: str = "local",
        launcher: str = "{nproc: 2, max_restarts: 1000}",
        random_rows: bool = True,
    ) -> None:
        self.folder, self.steps = folder, steps
        self.random = random.Random(seed)
        self.process: Forked | None = None
        self.recovered: list[float] = []
        self._down: tuple[float, int] | None = None
        self.wild, self.calm = folder / "wild", folder / "calm"
        for group in ("experiment", "model", "data"):
            (folder / "conf" / group).mkdir(parents=True)
        self.log = folder / "output.log"
        noise = {"{dropout}": 0.1 * random_rows, "{noise}": 1.0 * random_rows}
        module = MODULE
        for name, value in noise.items():
            module = module.replace(name, str(value))
        (folder / "mylib.py").write_text(module)
        (folder / "conf/model/chaos.yaml").write_text("_target_: mylib.Model\n")
        (folder / "conf/data/chaos.yaml").write_text(DATA.format(workers=workers))
        text = EXPERIMENT.format(steps=steps, group=choice, launcher=launcher)
        (folder / "conf/experiment/chaos.yaml").write_text(text.lstrip())

    def start(self, *arguments: str) -> Forked:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return Forked(["-m", "ditty_di", *arguments], self.folder, env, self.log)

    def go_on(self) -> Forked:
        """The command that runs, or a new one."""
        if self.process is None or self.process.poll() is not None:
            first = () if (self.wild / "overrides.yaml").exists() else ("+experiment=chaos",)
            self.process = self.start(*first, "run=wild")
        return self.process

    def down(self) -> None:
        """Note a kill: the run has recovered with the first step after the one it is at now."""
        self._down = self._down or (time.monotonic(), self.step())

    def look(self) -> None:
        """Note whether the run has recovered."""
        if self._down is not None and self.step() > self._down[1]:
            self.recovered.append(time.monotonic() - self._down[0])
            self._down = None
            print(f"{'':6}recovered after {self.recovered[-1]:.1f} s", flush=True)

    def step(self) -> int:
        """The last step that the run has logged."""
        try:
            return json.loads((self.wild / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            return 0

    def tell(self) -> None:
        """Print how long the run took to recover."""
        if times := sorted(self.recovered):
            middle = times[len(times) // 2]
            print(f"recovered {len(times)} times: median {middle:.1f} s, at most {times[-1]:.1f} s")

    def processes(self) -> list[int]:
        """Every living process of the run: it works in the folder."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").readlink() == self.folder:
                    found.append(int(entry.name))
        return found

    def roles(self) -> dict[str, list[int]]:
        """Process ids by what they are."""
        roles: dict[str, list[int]] = {"launcher": [], "rank 0": [], "rank 1": [], "worker": []}
        alive = self.processes()
        try:
            for line in (self.wild / ".lock").read_text().splitlines():
                entry = json.loads(line)
                if entry["pid"] in alive:
                    roles[entry["role"]] = [entry["pid"]]
        except (OSError, ValueError):
            pass
        named = {pid for pids in roles.values() for pid in pids}
        roles["worker"] = [pid for pid in alive if pid not in named]
        return roles | {"all": alive}


#: Whom, with what, how often; and what the command may exit with, () where it starts them again.
KILLS: list[tuple[str, signal.Signals, int, tuple[int, ...]]] = [
    ("launcher", signal.SIGKILL, 1, (-9,)),
    ("rank 0", signal.SIGKILL, 1, ()),
    ("rank 1", signal.SIGKILL, 1, ()),
    ("all", signal.SIGKILL, 1, (-9,)),
    ("all", signal.SIGTERM, 2, (0,)),
    ("worker", signal.SIGKILL, 1, ()),
    ("launcher", signal.SIGTERM, 1, (0,)),
    ("rank 1", signal.SIGTERM, 1, (0,)),
    ("launcher", signal.SIGINT, 1, (0,)),
    ("all", signal.SIGHUP, 1, (0,)),
    ("launcher", signal.SIGINT, 2, (130, -2)),  # the second may come while it exits
    ("launcher", signal.SIGQUIT, 1, (-3,)),
    ("rank 0", signal.SIGSEGV, 1, ()),
]


def strike(chaos: Chaos, kill: tuple[str, signal.Signals, int, tuple[int, ...]], when: str) -> dict:
    """Start the run, kill at some moment, and see what is left; one row of the table."""
    whom, number, times, codes = kill
    process = chaos.go_on()
    begun, step = time.monotonic(), chaos.step()
    wait, there = chaos.random.uniform(0.0, 3.0), float("inf")
    target = step + chaos.random.randint(2, 12)
    if when == "restart":  # while the launcher starts the ranks again
        while process.poll() is None and not chaos.roles()["rank 1"]:
            time.sleep(0.02)
        chaos.down()
        for pid in chaos.roles()["rank 1"]:
            os.kill(pid, signal.SIGKILL)
    while process.poll() is None and time.monotonic() - begun < 600:
        chaos.look()
        if when in ("start", "restart"):  # while it imports, or a little later
            if there == float("inf") and (when == "restart" or chaos.roles()[whom]):
                there = time.monotonic()
            if time.monotonic() > there + wait:
                break
        if when == "step" and chaos.step() >= target:
            break
        if when == "save" and any(chaos.wild.glob("checkpoints/.saving-*")):
            break
        time.sleep(0.02)
    row = {"whom": whom, "signal": f"{number.name}{' x2' * (times > 1)}", "when": when}
    victims = chaos.roles()[whom] if process.poll() is None else []
    before = {*chaos.processes()} - {process.pid}
    struck = time.monotonic()
    if victims:
        chaos.down()
    for _ in range(times):
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if times > 1:
            time.sleep(0.4)
    row |= {"step": chaos.step(), "effect": bool(victims)}
    hard = bool(victims) and number in (signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV)
    if victims and not hard:  # they were asked, and may take their time to save
        process.wait(timeout=240)
        struck = time.monotonic()
    # The command itself may still have to say how it went, or starts others.
    goes_on = not victims or not codes
    while True:
        left = {*chaos.processes()} - {process.pid}
        left = (left & before if goes_on else left) if victims else set()
        if not left or time.monotonic() - struck > SURVIVAL_SECONDS:
            break
        time.sleep(0.02)
    row |= {"gone": time.monotonic() - struck, "left": len(left)}
    row["exit"] = code = process.poll() if goes_on else process.wait(timeout=240)
    right = code in (None, 0) if goes_on else code in (*codes, 0)
    row["ok"] = not left and (when in ("start", "restart") or right)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)
    return row


def state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint but the digest of as many rows as a second sufficed for."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        saved = torch.load(file.name, weights_only=False)
    return {key: value for key, value in saved.items() if key != "content"}


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two states differ in a bit."""
    import numpy as np
    import torch

    if isinstance(a, io.BytesIO | bytes) and isinstance(b, io.BytesIO | bytes):
        from ditty_di.checkpoint.restricted import loads

        a, b = (loads(v.getvalue() if isinstance(v, io.BytesIO) else v)[1] for v in (a, b))
    if type(a) is not type(b):
        return [at]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{at}: other keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{at}: other length"]
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{at}.{i}")
        ]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        same = a.dtype == b.dtype and np.array_equal(a, b)
    else:
        same = a == b
    return [] if same else [at]


def run(folder: Path, *, kills: int, steps: int, workers: int = 1, seed: int = 0) -> list[str]:
    """Return what went wrong, and print a table on the way."""
    chaos = Chaos(folder, steps, workers, seed)
    wrong: list[str] = []
    if code := chaos.start("+experiment=chaos", "run=calm").wait():
        return [f"the undisturbed run ended with exit code {code}; see {folder}/output.log"]
    print("   #  step  when     whom      signal      exit  gone  left", flush=True)
    for number in range(kills):
        if chaos.step() >= steps:
            wrong.append(f"the run was over after {number} kills")
            break
        whens = ["step", "step", "save", "start", "restart"] if number >= 2 else ["step"]
        kill = KILLS[number] if number < min(kills, len(KILLS)) else chaos.random.choice(KILLS)
        row = strike(chaos, kill, chaos.random.choice(whens))
        print(
            f"{number + 1:4}  {row['step']:4}  {row['when']:7}  {row['whom']:8}"
            f"  {row['signal']:10}  {'-' if row['exit'] is None else row['exit']:>4}"
            f" {row['gone']:4.1f}s  {row['left']:4}"
            f"{'' if row['ok'] else '  WRONG'}{'' if row['effect'] else '  (nobody there)'}",
            flush=True,
        )
        if not row["ok"]:
            wrong.append(f"kill {number + 1}: {row}")
    last = chaos.go_on()
    while last.poll() is None and not chaos.roles()["rank 0"]:
        time.sleep(0.05)
    with (chaos.wild / ".lock").open() as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if last.poll() is None:
            wrong.append("a second process could have taken the folder")
    while last.poll() is None:
        chaos.look()
        time.sleep(0.05)
    if code := last.wait():
        wrong.append(f"the last start ended with exit code {code}")
        return wrong
    lines = [json.loads(line) for line in (chaos.wild / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    if logged != list(range(1, steps + 1)):
        wrong.append(f"metrics.jsonl has the steps {logged}")
    calm, wild = (sorted(f.glob("checkpoints/step-*"))[-1] for f in (chaos.calm, chaos.wild))
    states = [state(calm), state(wild)]
    wrong += [f"the final states differ at {d}" for d in differences(*states)]
    print(f"final state of {wild.name}: {', '.join(states[0])}", flush=True)
    chaos.tell()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1, help="data loader processes of a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", action="store_true", help="on two hosts that are killed, too")
    parser.add_argument("--elastic", action="store_true", help="on two hosts, 2 -> 1 -> 2 ranks")
    parser.add_argument("--folder", type=Path, help="new; a temporary one without it")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = folder.absolute()
    numbers = {k: getattr(arguments, k) for k in ("kills", "steps", "seed")}
    if arguments.hosts or arguments.elastic:
        from tests.launch import chaos_hosts

        wrong = chaos_hosts.run(folder, elastic=arguments.elastic, **numbers)
    else:
        wrong = run(folder, workers=arguments.workers, **numbers)
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{'FAILED' if wrong else 'passed'}; everything is in {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
