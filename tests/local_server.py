"""A web server on this machine that behaves as the real ones do, faults included."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler"], None]


@dataclasses.dataclass(frozen=True)
class Request:
    path: str
    headers: Message  # whatever case they are in
    time: float  # seconds, monotonic


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests.append(Request(self.path, self.headers, time.monotonic()))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            replies = server.replies.get(self.path, [status(404)])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        try:
            reply(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.active -= 1

    def do_HEAD(self) -> None:
        size = self.server.sizes.get(self.path)
        self.start(404 if size is None else 200, {"Content-Length": size or 0})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def start(self, code: int, headers: Mapping[str, object]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`server.replies[path]`: what is answered, one after the other; the last for ever.

    `server.sizes[path]`: what a HEAD request is told.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.replies: dict[str, list[Reply]] = {}
        self.sizes: dict[str, int] = {}
        self.requests: list[Request] = []
        self.active = self.most_active = self.connections = 0

    def address(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"

    def serve(self, path: str, *replies: Reply) -> str:
        self.replies[path] = list(replies)
        return self.address(path)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def status(code: int, body: bytes = b"", **headers: object) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def reply(handler: Handler) -> None:
        handler.start(code, {"Content-Length": len(body), **named})
        handler.wfile.write(body)

    return reply


def data(
    body: bytes,
    media_type: str = "image/png",
    ranges: bool = True,
    validator: str = "tag",
    sent: int | None = None,
    delay: float = 0.0,
    ignores_condition: bool = False,
    **headers: object,
) -> Reply:
    """A file, with ranges as RFC 9110 has them.

    `validator`: tag, date, weak or none. `sent`: the connection is cut after so many bytes of it.
    `ignores_condition`: a part is sent whatever If-Range says.
    """
    tag = f'"{hashlib.sha256(body).hexdigest()[:12]}"'
    date = formatdate(int(tag[1:9], 16), usegmt=True)
    marks = {
        "tag": {"ETag": tag},
        "weak": {"ETag": f"W/{tag}"},
        "date": {"Last-Modified": date},
        "none": {},
    }

    def reply(handler: Handler) -> None:
        time.sleep(delay)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        shared = {"Content-Type": media_type, **marks[validator], **named}
        asked = handler.headers.get("Range")
        same = handler.headers.get("If-Range") in (None, *marks[validator].values())
        first, end = 0, len(body)
        if asked and ranges and (same or ignores_condition):
            begin, _, final = asked.removeprefix("bytes=").partition("-")
            first, end = int(begin), min(int(final) + 1, end) if final else end
            if first >= len(body):
                handler.start(416, {"Content-Length": 0, "Content-Range": f"bytes */{len(body)}"})
                return
            span = f"bytes {first}-{end - 1}/{len(body)}"
            shared = {"Content-Length": end - first, "Content-Range": span, **shared}
            handler.start(206, shared)
        else:
            handler.start(200, {"Content-Length": len(body), **shared})
        last = end if sent is None else min(end, sent)
        handler.wfile.write(body[first:last])
        handler.close_connection = sent is not None

    return reply


def endless(media_type: str = "image/png", pause: float = 0.0, piece: bytes = bytes(8192)) -> Reply:
    """A body without a stated length that does not end until the client hangs up."""

    def reply(handler: Handler) -> None:
        handler.start(200, {"Content-Type": media_type, "Connection": "close"})
        handler.close_connection = True
        for _ in range(100_000):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)

    return reply


def silent(seconds: float) -> Reply:
    """Accepts the request and answers nothing."""

    def reply(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return reply


def start(port: int = 0) -> Server:
    """A server that answers; port 0: any that is free.

    Raises:
        OSError: the port is taken.
    """
    server = Server(port)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
