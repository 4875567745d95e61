"""Object stores that misbehave."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Faulty(MemoryFileSystem):
    """`faulty://...`: in memory, with every write and removal logged, and `fault` called first.

    `fault` may raise, wait, or return how many bytes of a file are written.
    """

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    log: ClassVar[list[tuple[str, str]]] = []
    fault: ClassVar[Callable[[str, str], int | None]] = staticmethod(lambda operation, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    def _called(self, operation, path):
        self.log.append((operation, path))
        return type(self).fault(operation, path)

    def put_file(self, lpath, rpath, callback=None, **kwargs):
        keep = self._called("put", rpath)
        with open(lpath, "rb") as file:
            super().pipe_file(rpath, file.read()[:keep])

    def pipe_file(self, path, value, **kwargs):
        super().pipe_file(path, value[: self._called("pipe", path)])

    def rm_file(self, path):
        self._called("remove", path)
        super().rm_file(path)

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.log.clear()
        cls.pseudo_dirs[:] = [""]
        cls.fault = staticmethod(lambda operation, path: None)


fsspec.register_implementation("faulty", Faulty, clobber=True)


class Proxy(ThreadingHTTPServer):
    """Between a client and a server of S3: passes requests on (`ok`), answers 500, or hangs."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.mode = (host, port), "ok"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"  # clients expect "100 Continue" before they send a file

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode = self.server.mode
        if mode == "hang":
            time.sleep(1)
        if mode != "ok":
            self.send_response(500)
            self.send_header("Connection", "close")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        behind = http.client.HTTPConnection(*self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *args):
        pass
