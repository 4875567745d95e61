"""The newest metrics at an HTTP endpoint, for Prometheus to collect."""

from __future__ import annotations

import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Prometheus:
    """Serve the newest value of each metric at `http://HOST:PORT/metrics`, in Prometheus' format.

    Names are those of the other loggers behind `ditty_di_`, with `_` for what the format does not
    allow: `ditty_di_loss`, `ditty_di_validation_loss`; all are gauges. `ditty_di_step` is the last
    reported step and `ditty_di_max_steps` the last one of the training. Texts are not served. Rank
    0 serves; where its port is in use, the training goes on without.

    The format is a line for each value, so this needs no package: prometheus_client would add a
    registry of its own for the whole process.

    Args:
        address: `HOST:PORT`; without a host (`:9400`), only programs on this machine can connect.
            Port 0 takes a free one.
        labels: added to each metric, such as the name of the run.

    Raises:
        ValueError: no such address, or a label that Prometheus does not allow.
    """

    @staticmethod
    def validate(*, address: str = ":9400", labels: dict[str, str] | None = None) -> None:
        """Raise ValueError for an address without a port, or a wrong label."""
        _parse(address)
        for name in labels or ():
            if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
                raise ValueError(f"labels.{name}: write letters, digits and _ only")

    def __init__(self, address: str = ":9400", labels: dict[str, str] | None = None) -> None:
        self.validate(address=address, labels=labels)
        self.address = address
        pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in (labels or {}).items())
        self._labels = f"{{{pairs}}}" if pairs else ""
        self._values: dict[str, float] = {}
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None, "not started"
        return int(self._server.server_address[1])

    def start(self, *, step: int, max_steps: int) -> None:
        """Listen.

        Args:
            step: the restored step, 0 in a new run.
            max_steps: the last step.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._values = {"ditty_di_step": step, "ditty_di_max_steps": max_steps}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] in ("/", "/metrics")
                body = endpoint.page().encode() if found else b"metrics are at /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass  # a line for each request

        try:
            self._server = ThreadingHTTPServer(_parse(self.address), Handler)
        except OSError as error:
            raise OSError(
                f"{self.address} cannot be listened on ({error.strerror or error}); another port: "
                f"logger.loggers.prometheus.address=:9401"
            ) from None
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def page(self) -> str:
        """Return what is served."""
        lines = []
        for name, value in sorted(self._values.copy().items()):
            lines += [f"# TYPE {name} gauge", f"{name}{self._labels} {_number(value)}"]
        return "\n".join(lines) + "\n"

    def write(self, step: int, values: dict[str, float]) -> None:
        """Serve these values from now on.

        Args:
            step: optimizer step.
            values: by name; those of other names stay.
        """
        named = {"ditty_di_" + re.sub(r"[^a-zA-Z0-9_]", "_", n): v for n, v in values.items()}
        self._values = {**self._values, **named, "ditty_di_step": step}

    def text(self, step: int, name: str, text: str) -> None:
        """Do nothing: the format has numbers only.

        Args:
            step: ignored.
            name: ignored.
            text: ignored.
        """

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = str(address).rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"address={address}: write HOST:PORT, or :PORT for programs on this machine (:9400)"
        )
    return host or "127.0.0.1", int(port)


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(value: str) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
