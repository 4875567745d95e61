"""Machines that meet through torch's elastic rendezvous, and the messages of one meeting.

`torch.distributed.elastic` (backend c10d) counts the machines, notices the ones that vanish or
arrive, and keeps a store for each round; here is what is added to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ditty_di.config import ConfigError
from ditty_di.console import status
from ditty_di.launch.processes import repeating

_PORT = 29400  # torchrun's
_ABANDONED = "-"  # in `start`: machine 0 could not start the run
_START_TIMEOUT = timedelta(hours=1)  # machine 0 may be importing everything from a slow disk
_WATCH_SECONDS = 0.5
_UNREACHABLE_SECONDS = 15.0  # after which the other machines take this one for lost
_END_SECONDS = 300.0  # until the ranks of all machines have ended; as torch's agent
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Rendezvous:
    """Where the machines of a run meet, again for every start of the ranks.

    Args:
        endpoint: `HOST:PORT` of the machine that keeps the store; None with one machine.
        name: tells rendezvous at the same endpoint apart.
        nodes: smallest and largest number of machines.
        local_addr: address of this machine; None finds the one that it reaches the endpoint with.
        conf: settings of torch's rendezvous, in seconds.
    """

    def __init__(
        self,
        endpoint: str | None,
        name: str,
        nodes: tuple[int, int],
        local_addr: str | None,
        conf: dict[str, Any],
    ) -> None:
        host, colon, port = (endpoint or "localhost:0").rpartition(":")
        self.host, self.port = (host, int(port)) if colon else (port, _PORT)
        self.name, self.nodes = name, nodes
        self.local_addr = local_addr or _local_address(self.host)
        self.conf = {"join_timeout": 600, **conf}
        self._handler: Any = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def meet(self, mine: dict[str, Any], over: Callable[[], bool]) -> Round:
        """Wait for the other machines and exchange what each knows.

        Where the store cannot be reached it is tried again: its machine may come (back) soon.

        Args:
            mine: what this machine knows; see `Round`.
            over: returns whether the run has ended, where the store cannot say so any more.

        Raises:
            ConfigError: too few machines came in time, or the run has ended.
        """
        from torch.distributed.elastic import rendezvous

        # The store of torch's agent would stay on the machine that was number 0 first.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        least, most = self.nodes
        if most > 1:
            count = f"{most}" if least == most else f"{least} to {most}"
            status(f"waiting for {count} machines at {self} ...")
        deadline = time.monotonic() + self.conf["join_timeout"]
        while True:
            try:
                self._handler = self._handler or self._connect()
                info = self._handler.next_rendezvous()
                info.store.set(f"node/{info.rank}", json.dumps(mine))
                all_known = [info.store.get(f"node/{node}") for node in range(info.world_size)]
                return Round(info.store, info.rank, [json.loads(known) for known in all_known])
            except rendezvous.RendezvousClosedError:
                raise ConfigError(f"the run {self.name!r} at {self} has ended") from None
            except rendezvous.RendezvousTimeoutError as error:
                raise ConfigError(
                    f"fewer than {least} machines came to {self} within "
                    f"{self.conf['join_timeout']:g} s (launcher.rdzv_conf.join_timeout)"
                ) from error
            except (rendezvous.RendezvousError, RuntimeError, OSError) as error:  # not there (yet)
                self._handler = None
                if over():
                    raise ConfigError(f"the run {self.name!r} at {self} has ended") from None
                if time.monotonic() > deadline:
                    raise ConfigError(f"no rendezvous at {self}: {error}") from error
                time.sleep(1.0)

    def others_wait(self) -> bool:
        """Return whether machines wait for the next round."""
        return self._handler.num_nodes_waiting() > 0

    def lost(self, machines: int) -> bool:
        """Return whether fewer machines than in the last meeting still send their heartbeat.

        Args:
            machines: number of machines in the last meeting.
        """
        return len(self._handler._state_holder.state.participants) < machines

    def close(self) -> None:
        """End the run for machines that wait to take part."""
        # It warns where its store has ended with the machine that keeps it.
        logging.getLogger("torch.distributed.elastic.rendezvous.dynamic_rendezvous").disabled = True
        with contextlib.suppress(Exception):
            self._handler.shutdown()

    def _connect(self) -> Any:
        from torch.distributed.elastic import rendezvous
        from torch.distributed.elastic.rendezvous import dynamic_rendezvous
        from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

        # For events that nothing records, torch 2.13 reads the source of every frame of the stack
        # at every operation: up to a second where much is imported, and then machines that write
        # in turns never come to an end.
        dynamic_rendezvous.get_method_name = lambda depth=2: "unknown"

        def connect(is_host: bool) -> Any:
            parameters = rendezvous.RendezvousParameters(
                backend="c10d",
                endpoint=str(self),
                run_id=self.name,
                min_nodes=self.nodes[0],
                max_nodes=self.nodes[1],
                local_addr=self.local_addr,
                is_host=is_host,
                **self.conf,
            )
            return get_rendezvous_handler(parameters)

        if self.is_here():
            # Unless another command on this machine keeps it already.
            with contextlib.suppress(rendezvous.RendezvousConnectionError):
                return connect(True)
        # Where it cannot be reached, torch would print the frames of its C++ code.
        socket.create_connection((self.host, self.port), timeout=10).close()
        return connect(False)

    def is_here(self) -> bool:
        """Return whether the endpoint is this machine: only then can its address be bound."""
        try:
            found = socket.getaddrinfo(self.host, 0, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as bound:
                bound.bind(address)
        except OSError:
            return False
        return True

    def environment(self) -> dict[str, str]:
        """Return the variables with which gloo uses the network that the machines meet in.

        By itself it takes the address that the host's name resolves to, which is often loopback.
        """
        name = _interface(self.local_addr) if sys.platform == "linux" else None
        return {"GLOO_SOCKET_IFNAME": name, "TP_SOCKET_IFNAME": name} if name else {}


@dataclass
class Round:
    """One meeting of the machines, and one start of all ranks.

    The keys of its store are each written once:

        node/N    what machine N knows: `run`, its run directory if it has one already; `nproc`, its
                  ranks; `restarts` so far
        start     the run directory, and the address of rank 0's store; machine 0 writes it
        failed    the first failure on any machine
        ended/N   the ranks of machine N have ended without a failure

    Args:
        store: its keys are this round's alone.
        node: number of this machine.
        known: what each machine knows, by number.
    """

    store: Any
    node: int
    known: list[dict[str, Any]]

    @property
    def run(self) -> str | None:
        """The run directory that machines know from an earlier round."""
        runs = {known["run"] for known in self.known} - {None}
        if len(runs) > 1:
            raise ConfigError(
                f"the machines at the rendezvous work on different runs ({', '.join(runs)}); give "
                "each run a launcher.rdzv_id of its own"
            )
        return next(iter(runs), None)

    def start(self, what: dict[str, Any]) -> None:
        """Tell the other machines that the ranks start.

        Args:
            what: `run` and `address`.
        """
        self.store.set("start", json.dumps(what))

    def started(self) -> dict[str, Any]:
        """Wait for machine 0, and return what it has started."""
        try:
            self.store.wait(["start"], _START_TIMEOUT)
            started = self.store.get("start").decode()
        except RuntimeError:  # its store has ended, or nothing came in time
            started = _ABANDONED
        if started == _ABANDONED:
            raise ConfigError("machine 0 could not start the run; see its message there")
        return json.loads(started)

    def abandon(self) -> None:
        """Tell the other machines that nothing starts, unless `start` was called."""
        with contextlib.suppress(Exception):  # the run is over, and its store
            self.store.compare_set("start", "", _ABANDONED)

    def failed(self) -> bool:
        """Return whether ranks have failed on any machine."""
        return self.store.check(["failed"])

    def ending(self) -> bool:
        """Return whether the ranks of some machine have ended; it may leave before the others."""
        return any(self.store.check([f"ended/{node}"]) for node in range(len(self.known)))

    def settle(
        self, failure: dict[str, Any] | None, others_wait: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Wait until the ranks of all machines have ended; return the first failure, or None.

        Args:
            failure: what happened on this machine.
            others_wait: returns whether a machine has gone to the next round already.
        """
        if failure is not None:
            self.store.compare_set("failed", "", json.dumps(failure))
        else:
            self.store.set(f"ended/{self.node}", "")
            deadline = time.monotonic() + _END_SECONDS
            ended = [f"ended/{node}" for node in range(len(self.known))]
            while not (self.failed() or self.store.check(ended) or others_wait()):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        return json.loads(self.store.get("failed")) if self.failed() else None


@contextmanager
def watching(look: Callable[[], str | None]) -> Iterator[list[str]]:
    """Call a function in a thread until it returns something, which is added to the list.

    In a thread because a store that cannot be reached answers after its timeout only.

    Args:
        look: returns what has happened, or None. "lost" is added where it fails for long.
    """
    seen: list[str] = []
    reached = time.monotonic()

    def watch() -> None:
        nonlocal reached
        if seen:
            return
        try:
            found = look()
            reached = time.monotonic()
        except Exception:
            found = "lost" if time.monotonic() - reached > _UNREACHABLE_SECONDS else None
        seen.extend([found] if found else [])

    with repeating(watch, _WATCH_SECONDS):
        yield seen


def _local_address(host: str) -> str:
    """Return the address with which this machine reaches another one; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return platform.node()


def _interface(address: str) -> str | None:
    """Return the network interface that has an IPv4 address."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
