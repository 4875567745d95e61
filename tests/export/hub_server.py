"""A hub on loopback: as much of the Hugging Face Hub's protocol as an upload and a download need.

Repositories live in memory. What arrives is checked: tokens, sizes, sha256 sums, that a commit
names only objects which are in storage, that metadata is YAML. `fail` breaks it on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_test"
READ_ONLY = "hf_read_only"
USER = "someone"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """`fail(method, pattern, how)` runs `how(handler)` instead of an answer while it is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.faults: list[tuple[str, re.Pattern[str], Callable[[Handler], None]]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, method: str, pattern: str, how: Callable[[Handler], None]) -> None:
        self.faults.append((method, re.compile(pattern), how))


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def status(code: int, message: str = "broken on purpose") -> Callable[[Handler], None]:
    return lambda handler: handler.answer({"error": message}, code)


def drop(after: int = 1000) -> Callable[[Handler], None]:
    """Reads some of the request's body, then hangs up."""

    def hang_up(handler: Handler) -> None:
        handler.rfile.read(min(after, int(handler.headers.get("Content-Length", after))))
        handler.close_connection = True
        handler.connection.close()

    return hang_up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{method} {path}")
        for wanted, pattern, how in self.server.faults:
            if wanted == method and pattern.search(path):
                how(self)
                return
        for wanted, expression, name in ROUTES:
            found = re.fullmatch(expression, path)
            if wanted == ("GET" if method == "HEAD" else method) and found:
                getattr(self, name)(*found.groups())
                return
        self.answer({"error": f"no such route: {method} {path}"}, 404)

    # -- requests and answers -------------------------------------------------------------------

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if isinstance(value, dict) and "error" in value:
            self.send_header("X-Error-Message", value["error"])
            # The request's body may not have been read. Said, for a client would use it again.
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def allowed(self, name: str, *, write: bool) -> bool:
        given = self.headers.get("Authorization", "")
        if given not in (f"Bearer {TOKEN}", f"Bearer {READ_ONLY}"):
            repository = self.server.repositories.get(name)
            if not write and repository and not repository.private:
                return True
            self.answer({"error": "Invalid credentials"}, 401)
            return False
        if write and (given == f"Bearer {READ_ONLY}" or not name.startswith(f"{USER}/")):
            self.answer({"error": "You don't have the rights"}, 403)
            return False
        return True

    def repository(self, name: str, *, write: bool = False) -> Repository | None:
        if not self.allowed(name, write=write):
            return None
        if name not in self.server.repositories:
            headers = {"X-Error-Code": "RepoNotFound"}
            self.answer({"error": "Repository not found"}, 404, headers)
            return None
        return self.server.repositories[name]

    # -- routes ---------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.allowed(name, write=True):
            return
        if name in self.server.repositories:
            self.answer({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(private)
        self.answer({"url": f"{self.server.address}/{name}"})

    def info(self, name: str, revision: str | None = None) -> None:
        if found := self.repository(name):
            siblings = [{"rfilename": file} for file in found.files]
            self.answer(
                {
                    "id": name,
                    "modelId": name,
                    "private": found.private,
                    "sha": found.sha,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )

    def tree(self, name: str, revision: str) -> None:
        if found := self.repository(name):
            self.answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": _git_oid(data)}
                    for file, data in found.files.items()
                ]
            )

    def validate(self) -> None:
        content = json.loads(self.body())["content"]
        try:
            found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            metadata = yaml.safe_load(found[1]) if found else None
            errors = [] if isinstance(metadata, dict) else ["no metadata"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        listed = [{"message": message} for message in errors]
        self.answer({"errors": listed, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        found = self.repository(name, write=True)
        if found is None:
            return
        files = []
        for file in json.loads(self.body())["files"]:
            present = found.files.get(file["path"])
            large = file["path"].endswith(".safetensors") or file["size"] > 10 << 20
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if present is None else _git_oid(present),
                }
            )
        self.answer({"files": files})

    def batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body())["objects"]:
            href = f"{self.server.address}/storage/{asked['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            present = asked["oid"] in self.server.storage
            objects.append(asked if present else asked | {"actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.server.problems.append(f"{oid} arrived as {len(data)} other bytes")
            self.answer({"error": "wrong sha256"}, 400)
            return
        self.server.storage[oid] = data
        self.answer({})

    def verify(self, oid: str) -> None:
        asked = json.loads(self.body())
        whole = len(self.server.storage.get(oid, b"")) == asked["size"]
        self.answer({} if whole else {"error": "not whole"}, 200 if whole else 400)

    def commit(self, name: str, revision: str) -> None:
        found = self.repository(name, write=True)
        if found is None:
            return
        entries = [json.loads(line) for line in self.body().splitlines()]
        for entry in entries:
            value = entry["value"]
            match entry["key"]:
                case "header":
                    found.commits.append(value["summary"])
                case "file":
                    found.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    found.files[value["path"]] = self.server.storage[value["oid"]]
                    found.large.add(value["path"])
                case "deletedFile":
                    del found.files[value["path"]]
                case other:
                    self.server.problems.append(f"a commit has an unknown {other}")
        url = f"{self.server.address}/{name}/commit/{found.sha}"
        self.answer({"success": True, "commitOid": found.sha, "commitUrl": url})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.repository(name)) is None:
            return
        headers = {"X-Repo-Commit": found.sha}
        if file not in found.files:
            headers["X-Error-Code"] = "EntryNotFound"
            self.answer({"error": f"{file} is not in {name}"}, 404, headers)
            return
        data = found.files[file]
        large = file in found.large
        etag = hashlib.sha256(data).hexdigest() if large else _git_oid(data)
        headers["ETag"] = f'"{etag}"'
        self.answer(data, headers=headers)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{NAME}", "info"),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", "info"),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", "tree"),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/storage/([0-9a-f]{64})", "store"),
    ("POST", "/storage/([0-9a-f]{64})/verify", "verify"),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
