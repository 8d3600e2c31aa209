"""A real S3 server in a process of its own (moto's), and a proxy before it that fails when told to."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

Fault = Literal["unavailable", "denied", "reset", "stall", "truncate", "short"]
"""`unavailable`: status 503. `denied`: 403. `reset`: the connection is reset instead of an answer. `stall`: the request
is read, and never answered. `truncate`: the connection is reset after half of the body. `short`: an answer that is
whole by its own headers, but holds half of the body."""
BUCKET = "bucket"


@dataclass
class Rule:
    fault: Fault
    match: re.Pattern[str]
    """Searched in `METHOD /bucket/key?query`."""
    times: int
    """Requests that still fail; negative: all."""
    after: int
    """Requests that match and still pass before that."""


class S3Server:
    """`endpoint` is the proxy's address; every request is listed in `requests`, in the order of arrival."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
        assert self._server.stderr is not None
        self.port = 0
        for line in self._server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        assert self.port, "moto's server did not start"
        # nobody reads on; a full pipe would stop the server
        threading.Thread(target=self._server.stderr.read, daemon=True).start()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self.forward("PUT", f"/{BUCKET}", b"", {})

    @contextmanager
    def failing(self, fault: Fault, match: str = "", *, times: int = -1, after: int = 0) -> Iterator[Rule]:
        """Requests that match fail while the block lasts, at most `times` of them, after `after` that pass."""
        rule = Rule(fault, re.compile(match), times, after)
        with self._lock:
            self._rules.append(rule)
        try:
            yield rule
        finally:
            with self._lock:
                self._rules.remove(rule)
            self._healed.set()
            self._healed = threading.Event()

    def use(self, setenv: Callable[[str, str], None]) -> None:
        """Set the variables by which pyarrow and we find this server."""
        setenv("AWS_ENDPOINT_URL", self.endpoint)
        setenv("AWS_ACCESS_KEY_ID", "test")
        setenv("AWS_SECRET_ACCESS_KEY", "test")
        setenv("AWS_EC2_METADATA_DISABLED", "true")

    def count(self, match: str) -> int:
        """How many requests matched so far."""
        return sum(re.search(match, request) is not None for request in self.requests)

    def close(self) -> None:
        self._healed.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.kill()
        self._server.wait()

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list, bytes]:
        """Ask the server itself, past the proxy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times != 0 and rule.match.search(request):
                    if rule.after > 0:
                        rule.after -= 1
                        continue
                    rule.times -= 1
                    return rule.fault
        return None

    def stall(self) -> None:
        self._healed.wait(60)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self._body()
                fault = server.fault_of(f"{self.command} {self.path}")
                if fault == "stall":
                    server.stall()
                    self.close_connection = True
                elif fault == "reset":
                    self._reset()
                elif fault in ("unavailable", "denied"):
                    status, code = (503, "SlowDown") if fault == "unavailable" else (403, "AccessDenied")
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                    self._answer(status, [("Content-Type", "application/xml")], text, len(text))
                else:
                    headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
                    status, found, data = server.forward(
                        self.command, self.path, body, {**headers, "Content-Length": str(len(body))}
                    )
                    size = len(data)
                    if self.command == "HEAD":
                        size = int(dict((k.lower(), v) for k, v in found).get("content-length", 0))
                    if fault == "short":
                        data = data[: len(data) // 2]
                        size = len(data)
                    elif fault == "truncate":
                        data = data[: len(data) // 2]
                    self._answer(status, found, data, size)
                    if fault == "truncate":
                        self._reset()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _answer(self, status: int, headers: list, data: bytes, size: int) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                self.wfile.flush()

            def _reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def finish(self) -> None:
                with suppress(OSError):  # the client gave up
                    super().finish()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One server for all tests; `s3.use(monkeypatch.setenv)` points this process, and those it starts, at it."""
    pytest.importorskip("moto.server", reason="needs requirements/s3.txt")
    server = S3Server()
    yield server
    server.close()
