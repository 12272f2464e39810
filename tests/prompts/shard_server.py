"""A web server of this machine that serves a prompt directory, and fails on demand."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """`faults` has for the name of a file what goes wrong with its next requests, one after the other; then nothing does.

    A number     that status, with no content
    "drop"       half of the content, and the connection is closed
    "cut"        the half of it, as if it were all
    "flip"       all of it, with one bit changed
    "endless"    zeros for as long as anybody listens
    "slow"       a byte now and then
    "hang"       nothing, until `release` is set
    /PLACE       a redirection to that
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.asked, self.sent = directory, list[str](), 0
        self.faults: dict[str, Iterator[str | int]] = {}
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.asked.append(name)
                with contextlib.suppress(ConnectionError):  # the client has heard enough
                    server.answer(self, name, next(server.faults.get(name, iter(())), None))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/shards"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, name: str, faults: Iterable[str | int]) -> None:
        self.faults[name] = iter(faults)

    def count(self, name: str) -> int:
        return self.asked.count(name)

    def answer(self, request: BaseHTTPRequestHandler, name: str, fault: str | int | None) -> None:
        path = self.directory / name
        if fault is None and not path.is_file():
            fault = 404
        content = path.read_bytes() if path.is_file() else b""
        if fault == "hang":
            self.release.wait()
            return
        if isinstance(fault, int) or str(fault).startswith("/"):
            request.send_response(fault if isinstance(fault, int) else 302)
            if not isinstance(fault, int):
                request.send_header("location", str(fault))
            request.send_header("content-length", "0")
            request.end_headers()
            return
        if fault == "cut":
            content = content[: len(content) // 2]
        if fault == "flip":
            content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        request.send_response(200)
        if fault != "endless":
            request.send_header("content-length", str(len(content)))
        request.end_headers()
        if fault == "endless":
            while True:
                request.wfile.write(bytes(1 << 16))
                self.sent += 1 << 16
        elif fault == "slow":
            for byte in content:
                request.wfile.write(bytes([byte]))
                if self.release.wait(0.05):
                    return
        else:
            request.wfile.write(content[: len(content) // 2] if fault == "drop" else content)
