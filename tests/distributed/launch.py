"""Runs a function of `tests.distributed.cases` in real processes over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(case: str, nproc: int, folder: Path, *, timeout: float = 400, **arguments: Any) -> Any:
    """Calls `cases.<case>(folder=..., **arguments)` on `nproc` ranks; rank 0's return value.

    Raises:
        AssertionError: a rank failed; the message has the output of every rank.
    """
    port = free_port()
    result = folder / f"{case}-{nproc}.json"
    processes = []
    for rank in range(nproc):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "tests.distributed.cases", case, str(result)]
        payload = json.dumps({"folder": str(folder), **arguments})
        processes.append(
            subprocess.Popen(
                [*command, payload],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    report = "\n".join(f"--- rank {i}\n{output}" for i, output in enumerate(outputs))
    assert codes == [0] * nproc, f"exit codes {codes}\n{report}"
    return json.loads(result.read_text())
