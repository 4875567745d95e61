"""Ranks of several machines: commands on one machine that meet over loopback, and real hosts."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from ditty_di.launch import Torchrun
from tests.launch.hosts import Hosts, needs_hosts, possible
from tests.toy import Folder, result, wait_for

#: Seconds that torch's rendezvous takes are shorter than its defaults.
QUICK = "launcher.rdzv_conf={last_call_timeout: 1, keep_alive_interval: 1, join_timeout: 40}"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.write("conf/launcher/torchrun.yaml", "_target_: ditty_di.launch.Torchrun")
    return folder


@pytest.fixture
def meet() -> tuple[str, ...]:
    """The arguments with which commands meet on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return ("launcher=torchrun", f"+launcher.rdzv_endpoint=localhost:{port}", f"+{QUICK}")


def starts(run: Path) -> list[str]:
    return [file.read_text() for file in sorted(run.glob("starts-*"))]


def end(*commands: Any, code: int = 0) -> list[str]:
    """What the commands printed on standard error, once all have ended with `code`."""
    told = [command.communicate(timeout=240) for command in commands]
    assert [command.returncode for command in commands] == [code] * len(commands), told
    return [err for _, err in told]


def test_commands_on_two_machines_are_one_run_that_starts_again(folder, meet) -> None:
    task = folder.task("flaky", how="kill", starts="${run}/starts", on_rank=1)
    options = (task, *meet, "+launcher.max_nodes=2", "+launcher.max_restarts=2")
    told = end(*[folder.start(*options) for _ in range(2)])
    run = folder.run()  # one, although each command would have made its own
    assert starts(run) == ["22", "22"]
    assert result(run) == result(run) | {"status": "finished", "restarts": 1}
    line = "restart 1 of 2, from the start: rank 1 was killed (SIGKILL"
    assert all(line in err for err in told)
    assert {file.name for file in (run / "logs").glob("rank-*")} == {"rank-0.log", "rank-1.log"}


def test_a_machine_that_comes_later_takes_part(folder, meet) -> None:
    task = folder.task("grows", starts="${run}/starts", to=2)
    options = (task, *meet, "+launcher.min_nodes=1", "+launcher.max_nodes=2")
    first = folder.start(*options)
    deadline = time.monotonic() + 60
    while not list(folder.path.glob("outputs/*/*/starts-0")) and time.monotonic() < deadline:
        time.sleep(0.1)
    end(folder.start(*options), first)
    assert starts(folder.run()) in (["12", "2"], ["2", "12"])  # it may have become machine 0
    assert result(folder.run())["status"] == "finished" and "restarts" not in result(folder.run())


def test_sigterm_on_one_machine_stops_all(folder, meet) -> None:
    task = folder.task("until_stopped", stop_file="${run}/stop", ready="${run}/ready")
    options = (task, *meet, "+launcher.max_nodes=2", "+launcher.max_restarts=3", "run=mine")
    commands = [folder.start(*options) for _ in range(2)]
    mine = folder.path / "mine"
    wait_for(mine / "ready-0", mine / "ready-1", process=commands[0])
    commands[1].send_signal(signal.SIGTERM)
    end(*commands)
    assert result(mine)["status"] == "preempted" and not (mine / "stop").exists()


def test_a_directory_in_use_is_refused_to_several_machines_too(folder, meet) -> None:
    task = folder.task("never_stops", ready="${run}/ready")
    holder = folder.start(task, "run=mine")
    wait_for(folder.path / "mine/ready-0", process=holder)
    options = (task, *meet, "+launcher.max_nodes=2", "run=mine")
    commands = [folder.start(*options) for _ in range(2)]
    deadline = time.monotonic() + 60
    while all(command.poll() is None for command in commands) and time.monotonic() < deadline:
        time.sleep(0.05)
    holder.kill()
    ended = [command for command in commands if command.poll() is not None]
    told = end(*ended, code=2)
    assert any("another process is working in" in err for err in told)
    for command in commands:  # the other one may wait for it to come back
        command.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_nodes": 2}, "rdzv_endpoint=HOST:PORT"),
        ({"max_nodes": 2, "min_nodes": 3}, "not above the second"),
        ({"rdzv_endpoint": "node0:first"}, "write HOST:PORT"),
        ({"max_restarts": -1}, "must not be negative"),
    ],
)
def test_what_cannot_meet_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Torchrun.validate(**arguments)


def test_a_dry_run_prints_the_plan_and_makes_nothing(folder: Folder) -> None:
    nodes = ("+launcher.rdzv_endpoint=127.0.0.1:29411", "+launcher.min_nodes=1")
    more = ("+launcher.max_nodes=3", "+launcher.nproc=2", "+launcher.dry_run=true")
    out, _ = folder("launcher=torchrun", *nodes, *more)
    assert "on each of 1 to 3 machines" in out and "start 2 ranks" in out
    assert "meet at 127.0.0.1:29411" in out and "127.0.0.1 and keeps it" in out
    assert "GLOO_SOCKET_IFNAME=lo" in out
    assert not (folder.path / "outputs").exists()


@pytest.mark.slow
@needs_hosts
@pytest.mark.skipif(not possible(), reason="network namespaces cannot be made here")
def test_a_rank_that_hangs_on_another_host_is_named(folder: Folder) -> None:
    task = folder.task("flaky", how="hang", starts="${run}/starts")
    with Hosts(2, folder.path) as hosts:
        options = ("launcher=torchrun", f"+launcher.rdzv_endpoint={hosts.address(0)}:29400")
        options += (f"+{QUICK}", "+launcher.max_nodes=2", "+launcher.max_restarts=1", "run=mine")
        commands = [hosts.start(n, task, *options) for n in range(2)]
        assert [command.wait(timeout=120) for command in commands] == [0, 0], hosts.log(0)
        mine = folder.path / "mine"
        said = hosts.log(0)
    found = [line for line in said.splitlines() if line.startswith("restart 1 of 1")]
    hanging = next(n for n in (0, 1) if f"rank {n} on host" in found[0])
    assert hanging == 1 and "did not reach the all_reduce that rank 0 waited for" in found[0]
    assert "was in toy_tasks.unreachable_disk (" in found[0]
    assert "unreachable_disk" in (mine / "logs/rank-1.log").read_text()
    assert starts(mine) == ["22", "22"] and result(mine)["restarts"] == 1


@pytest.mark.slow
@needs_hosts
@pytest.mark.skipif(not possible(), reason="network namespaces cannot be made here")
def test_training_goes_on_without_a_host_and_with_it_again(tmp_path: Path) -> None:
    from tests.launch import chaos_hosts

    assert chaos_hosts.run(tmp_path, steps=60, kills=2) == []
