"""Chaos on two hosts with one rank each: hosts are killed or cut off, and come back.

The end is compared with an undisturbed run on two ranks. Where the run waits for the host, it is
equal to the bit. Where it is elastic, world sizes go 2 -> 1 -> 2 with each loss: one rank adds
gradients in another order, so it is equal within 1e-6.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.launch.chaos import Chaos, differences, state
from tests.launch.hosts import Hosts

TOLERANCE = 1e-6
LAUNCHER = """
  rdzv_endpoint: {address}:29400
  min_nodes: {least}
  max_nodes: 2
  nproc: 1
  max_restarts: 1000
  rdzv_conf: {{last_call_timeout: 2, keep_alive_interval: 1, join_timeout: 120, read_timeout: 10}}
"""
ALONE = ("rdzv_endpoint=null", "min_nodes=1", "max_nodes=1", "nproc=2")
#: What happens to which host. Host 0 keeps the rendezvous: without it the other one waits.
KILLS = [("killed", 1), ("cut off", 1), ("rank killed", 1), ("killed", 0), ("rank killed", 0)]


class Wild:
    """The disturbed run."""

    def __init__(self, chaos: Chaos, hosts: Hosts, elastic: bool) -> None:
        self.chaos, self.hosts, self.elastic = chaos, hosts, elastic
        self.commands: dict[int, subprocess.Popen] = {}

    def start(self, n: int) -> None:
        # A cut connection is noticed when a collective times out.
        first = ("+experiment=chaos", "+runtime.train_timeout=10")
        self.commands[n] = self.hosts.start(n, *(() if self.known() else first), "run=wild")

    def known(self) -> bool:
        return (self.chaos.wild / "overrides.yaml").exists()

    def starts(self) -> list[int]:
        """For each start of the ranks that host 0 has seen, how many there were."""
        return [int(n) for n in re.findall(r"machine \d of \d, (\d) ranks", self.hosts.log(0))]

    def waits(self, n: int) -> int:
        """How often a host has waited for the other one, or for itself to be let in."""
        return self.hosts.log(n).count("waiting for")

    def wait(self, steps: int, seconds: float = 240.0) -> None:
        """Wait for some more steps."""
        target = min(self.chaos.step() + steps, self.chaos.steps)
        deadline = time.monotonic() + seconds
        while self.chaos.step() < target and time.monotonic() < deadline:
            self.chaos.look()
            if self.over():
                break
            time.sleep(0.05)

    def over(self) -> bool:
        return all(command.poll() is not None for command in self.commands.values())

    def lose(self, how: str, n: int) -> None:
        """Let one host have an accident, and bring it back some steps later."""
        self.chaos.down()
        count, waits = len(self.starts()), self.waits(0)
        if how == "rank killed":  # the command lives, and starts it again
            lines = (self.chaos.wild / ".lock").read_text()
            (pid,) = re.findall(rf'"rank \d", "pid": (\d+), "host": "host{n}"', lines)[-1:]
            os.kill(int(pid), signal.SIGKILL)
            return
        if how == "killed":
            self.hosts.kill(n)
            self.commands[n].wait()
        else:
            self.hosts.link(n, "down")
        hold = self.chaos.folder / "hold"
        if self.elastic:
            self.wait(3 * (n > 0))  # alone
            hold.touch()  # or the run would be over while the host starts
        else:
            while how == "cut off" and self.waits(0) == waits and not self.over():
                time.sleep(0.05)
        waits, begun = self.waits(n), len(self.starts())
        if how == "killed":
            self.start(n)
        else:
            self.hosts.link(n, "up")
        while (self.waits(n), len(self.starts())) == (waits, begun) and not self.over():
            time.sleep(0.05)
        hold.unlink(missing_ok=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self.over():
            if len(self.starts()) > count and self.starts()[-1] == 2:
                break
            time.sleep(0.05)


def largest_difference(a: Any, b: Any) -> float:
    """The largest difference of two numbers in two states: parameters, moments, counters."""
    import torch

    if isinstance(a, dict):
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return abs(a - b) if isinstance(a, int | float) else 0.0


def run(folder: Path, *, kills: int, steps: int, seed: int = 0, elastic: bool = True) -> list[str]:
    """Return what went wrong, and print what happens."""
    wrong: list[str] = []
    with Hosts(2, folder) as hosts:
        launcher = LAUNCHER.format(address=hosts.address(0), least=1 if elastic else 2)
        options = {"choice": "torchrun", "launcher": launcher, "random_rows": not elastic}
        chaos = Chaos(folder, steps, 0, seed, **options)
        if code := chaos.start(
            "+experiment=chaos", "run=calm", *(f"launcher.{option}" for option in ALONE)
        ).wait():
            return [f"the undisturbed run ended with exit code {code}; see {folder}/output.log"]
        wild = Wild(chaos, hosts, elastic)
        wild.start(0)
        wild.start(1)
        print("   #  step  host   accident", flush=True)
        for number in range(kills):
            wild.wait(chaos.random.randint(3, 6))
            if chaos.step() >= steps:
                wrong.append(f"the run was over after {number} kills")
                break
            how, n = KILLS[number] if number < len(KILLS) else chaos.random.choice(KILLS)
            print(f"{number + 1:4}  {chaos.step():4}  host{n}  {how}", flush=True)
            wild.lose(how, n)
        wild.wait(steps)
        codes = {n: command.wait(timeout=120) for n, command in wild.commands.items()}
        print(f"ranks at each start that host 0 has seen: {wild.starts()}", flush=True)
        chaos.tell()
        if any(codes.values()):
            wrong.append(f"the commands ended with exit codes {codes}")
            return wrong
    calm, end = (sorted(f.glob("checkpoints/step-*"))[-1] for f in (chaos.calm, chaos.wild))
    states = [state(calm), state(end)]
    if calm.name != end.name or states[0].keys() != states[1].keys():
        wrong.append(f"{end.name} is compared with {calm.name}")
    found = {key: largest_difference(states[0][key], states[1][key]) for key in states[0]}
    worst = max(found.values(), default=float("inf"))
    print(f"largest difference from the undisturbed run: {worst:.2e}", flush=True)
    if not elastic:
        wrong += [f"the final states differ at {d}" for d in differences(*states)]
    if not worst <= TOLERANCE:
        wrong += [f"{key} differs by {value:.2e}" for key, value in found.items() if value]
    return wrong
