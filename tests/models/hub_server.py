"""A small server that answers as the Hugging Face hub does when a model is downloaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED, PRIVATE = "meta/gated", "somebody/private"
TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of `models`, at the revisions `main`, `v1` and their commit."""

    models: ClassVar[dict[str, Path]] = {}
    requested: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.requested.append(f"{self.command} {path}")
        if match := re.fullmatch(
            r"(?:api/models/)?([^/]+/[^/]+)/(resolve|revision|tree)/(.+)", path
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
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files})
        if what == "tree":
            return self._json(
                [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": _etag(file),
                    }
                    for file in folder.iterdir()
                ]
            )
        file = folder / name
        if not file.is_file():
            return self._answer(404, "EntryNotFound")
        self._send(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'})

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code}, says the hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(its address, what was requested) of a hub that runs until the end of the block."""
    handler = type("Handler", (Hub,), {"models": models, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requested
    finally:
        server.shutdown()
        server.server_close()
