"""A small server that answers as the Hugging Face hub does when something is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from tests.toy import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED, PRIVATE = "meta/gated", "somebody/private"
TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of `models`, at the revisions `main`, `v1` and their commit.

    They are served as datasets too. Of each file in `breaks` the first answer breaks off half-way.
    """

    models: ClassVar[dict[str, Path]] = {}
    requested: ClassVar[list[str]] = []
    breaks: ClassVar[set[str]] = set()
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.requested.append(f"{self.command} {path}")
        if match := re.fullmatch(
            r"(?:api/models/|(?:api/)?datasets/)?([^/]+/[^/]+)/(resolve|revision|tree)/(.+)", path
        ):
            repo, what, rest = match.groups()
        else:
            return self._answer(404, "EntryNotFound")
        if repo == GATED and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, "GatedRepo")
        if repo not in self.models:
            # The hub does not tell strangers which private models there are.
            return self._answer(401 if repo == PRIVATE else 404, "RepoNotFound")
        revision, _, name = rest.partition("/")
        if revision not in ("main", "v1", COMMIT):
            return self._answer(404, "RevisionNotFound")
        folder = self.models[repo]
        if what == "revision":
            files = [{"rfilename": name} for name in _files(folder)]
            return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files})
        if what == "tree":
            return self._json([_entry(name, file) for name, file in _files(folder).items()])
        file = folder / name
        if not file.is_file():
            return self._answer(404, "EntryNotFound")
        self._send(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'})

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if first and self.command == "GET":
            self.requested.append(f"from byte {first[1]}")
            total, body = len(body), body[int(first[1]) :]
            headers["Content-Range"] = f"bytes {first[1]}-{total - 1}/{total}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            name = unquote(urlsplit(self.path).path).rpartition("/")[2]
            if name in self.breaks:
                self.breaks.remove(name)
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

    def _answer(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code}, says the hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def _files(folder: Path) -> dict[str, Path]:
    return {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}


def _entry(name: str, file: Path) -> dict:
    size = file.stat().st_size
    entry = {"type": "file", "path": name, "size": size, "oid": _git(file)}
    if _is_large(file):
        entry["lfs"] = {"oid": _etag(file), "size": size, "pointerSize": 99}
    return entry


def _is_large(file: Path) -> bool:
    return file.suffix == ".parquet"


def _git(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if _is_large(file) else _git(file)


@contextmanager
def hub(models: dict[str, Path], breaks: Iterable[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(its address, what was requested) of a hub that runs until the end of the block."""
    handler = type("Handler", (Hub,), {"models": models, "requested": [], "breaks": {*breaks}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requested
    finally:
        server.shutdown()
        server.server_close()


def asked(code: str, questions: Sequence[Any], **environment: str) -> list[Any]:
    """The answers that a program prints as JSON behind `ANSWERS`, in a fresh process.

    huggingface_hub reads the hub's address, HF_ENDPOINT, when it is imported.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(questions)],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("ANSWERS")[2])
