"""A web server on the loopback that misbehaves exactly as told, and counts every byte that it sends."""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

BLOCK = 1 << 16


@dataclass
class Served:
    """One file, and how it is served. Lists are used up, one entry per request that asks for more than one byte."""

    content: bytes | Path
    etag: str = '"1"'
    modified: str = ""
    ranges: bool = True
    drops: list[int] = field(default_factory=list)
    """Cut the connection after so many bytes of the body (-1: not this time)."""
    reset: bool = False
    """Cut by a reset instead of a quiet end."""
    refusals: list[int] = field(default_factory=list)
    """Answer these codes first, to any request."""
    claimed: int | None = None
    """The length that headers state instead of the true one."""
    send_at_most: int | None = None
    """Never send a byte of the file beyond this one: a truncated file."""
    hold_after: int | None = None
    """Send so many bytes of the body, then wait for `Server.release`."""
    flips: list[int] = field(default_factory=list)
    """Bytes of the file that are sent wrong, once each."""
    sent: int = 0
    asked: list[str] = field(default_factory=list)
    """The Range header of every request."""
    guards: set[str] = field(default_factory=set)
    """Every If-Range header."""

    def __len__(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def part(self, first: int, end: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[first:end]
        with self.content.open("rb") as stream:
            stream.seek(first)
            return stream.read(end - first)


class Server:
    """``files`` by path without the leading slash; ``url`` is where they are served."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, Served] = {}
        self.release = threading.Event()
        self.held = threading.Event()
        self.lock = threading.Lock()

    def add(self, path: str, content: bytes | Path, **how: Any) -> Served:
        self.files[path] = Served(content, **how)
        return self.files[path]

    @property
    def sent(self) -> int:
        return sum(file.sent for file in self.files.values())


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of the loopback, as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(ConnectionError):
                answer(self, server)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    server = Server(f"http://127.0.0.1:{web.server_address[1]}")
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with patch.dict(os.environ, no_proxy="127.0.0.1"):
            yield server
    finally:
        server.release.set()
        web.shutdown()
        web.server_close()
        thread.join()


def answer(handler: BaseHTTPRequestHandler, server: Server) -> None:
    file = server.files.get(handler.path.lstrip("/"))
    if file is None:
        handler.send_error(404)
        return
    asked = handler.headers.get("Range", "")
    with server.lock:
        file.asked.append(asked)
        refusal = file.refusals.pop(0) if file.refusals else 0
        drop = file.drops.pop(0) if file.drops and asked != "bytes=0-0" else -1
    if refusal:
        handler.send_error(refusal)
        return
    length = len(file) if file.claimed is None else file.claimed
    guard = handler.headers.get("If-Range", "")
    file.guards.add(guard)
    match = re.fullmatch("bytes=([0-9]+)-([0-9]+)", asked)
    first, end, partial = 0, length, False
    if match and file.ranges and guard in ("", file.etag, file.modified):
        first, end, partial = int(match[1]), min(int(match[2]) + 1, length), True
        if first >= length:
            handler.send_error(416)
            return
    handler.send_response(206 if partial else 200)
    if partial:
        handler.send_header("Content-Range", f"bytes {first}-{end - 1}/{length}")
    handler.send_header("Content-Length", str(end - first))
    for name, value in (("ETag", file.etag), ("Last-Modified", file.modified)):
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    stop = end if drop < 0 else min(end, first + drop)
    send(handler, server, file, first, stop if file.send_at_most is None else min(stop, file.send_at_most))
    if drop >= 0 and file.reset:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send(handler: BaseHTTPRequestHandler, server: Server, file: Served, first: int, end: int) -> None:
    hold = None if file.hold_after is None or end - first <= file.hold_after else first + file.hold_after
    while first < end:
        block = file.part(first, min(end, first + BLOCK, hold if hold is not None and first < hold else end))
        if not block:  # the file is shorter than claimed
            return
        for at in [at for at in file.flips if first <= at < first + len(block)]:
            file.flips.remove(at)
            block = block[: at - first] + bytes([block[at - first] ^ 1]) + block[at - first + 1 :]
        handler.wfile.write(block)
        with server.lock:
            file.sent += len(block)
        first += len(block)
        if first == hold:
            server.held.set()
            server.release.wait(60)
