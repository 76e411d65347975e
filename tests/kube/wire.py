"""Plain HTTP/1.1 for the emulated API server: one exchange at a time per connection, streams, upgrades.

Knows nothing of Kubernetes; http.server does the parsing.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket as Socket
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Serve = Callable[["Exchange"], None]


class ConnectionLost(Exception):
    """The client is gone, or a test has cut it off."""


class Exchange:
    """One request and its answer."""

    def __init__(self, handler: Handler, body: bytes) -> None:
        address = urlsplit(handler.path)
        self.method = handler.command
        self.raw_path = address.path
        self.raw_query = address.query
        self.path = unquote(address.path).rstrip("/") or "/"
        self.query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.headers = handler.headers
        self.body = body
        self.status = 0
        # Called once before the answer is sent; False loses the answer.
        self.before_answer: Callable[[], object] | None = None
        self._handler = handler

    @property
    def socket(self) -> Socket:
        """The connection itself, for a protocol other than HTTP."""
        connection: Socket = self._handler.connection
        return connection

    def send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """A whole answer: JSON, or bytes as they are."""
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "text/plain" if isinstance(answer, bytes) else "application/json"
        everything = {"Content-Type": kind, "Content-Length": str(len(payload)), **(headers or {})}
        self._head(status, everything)
        self._write(payload if self.method != "HEAD" else b"")

    def stream(self, kind: str) -> Callable[[bytes], None]:
        """Begins a chunked answer and returns what writes a chunk; an empty chunk ends it."""
        self._handler.server.streams.add(self._handler.connection)
        self._head(200, {"Content-Type": kind, "Transfer-Encoding": "chunked", "Cache-Control": "no-cache, private"})
        self._write(b"")
        return lambda chunk: self._write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def upgrade(self, headers: dict[str, str]) -> Socket:
        """Leaves HTTP: the connection now speaks what the headers say."""
        self._handler.server.streams.add(self._handler.connection)
        self._handler.close_connection = True
        self._head(101, headers)
        self._write(b"")
        return self.socket

    def take_over(self) -> Socket:
        """Leaves HTTP without a word: what answers the client is someone else's."""
        self._handler.server.streams.add(self._handler.connection)
        self._handler.close_connection = True
        return self.socket

    def hang_up(self) -> None:
        """Ends the connection without an answer."""
        self._handler.close_connection = True
        with contextlib.suppress(OSError):
            self._handler.connection.shutdown(socket.SHUT_RDWR)

    def client_gone(self) -> bool:
        """Whether the other side has closed its end."""
        try:
            ready, _, _ = select.select([self._handler.connection], [], [], 0)
            return bool(ready) and not self._handler.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        callback, self.before_answer = self.before_answer, None
        if callback is not None and callback() is False:
            self.hang_up()
            raise ConnectionLost
        self.status = status
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()

    def _write(self, data: bytes) -> None:
        try:
            self._handler.wfile.write(data)
            self._handler.wfile.flush()
        except (OSError, ValueError) as error:
            self._handler.close_connection = True
            raise ConnectionLost from error


class Handler(BaseHTTPRequestHandler):
    """Reads requests of one connection and passes them on."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        """Remembers the connection, so that a test can cut it."""
        super().setup()
        self.server.connections.add(self.connection)

    def handle(self) -> None:
        """Serves until either side is done."""
        with contextlib.suppress(OSError, ConnectionLost, ValueError):
            super().handle()

    def finish(self) -> None:
        """Forgets the connection."""
        self.server.connections.discard(self.connection)
        self.server.streams.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        with contextlib.suppress(OSError, ValueError):
            self.rfile.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests read the request log instead."""

    def answer(self) -> None:
        """One request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.serve(Exchange(self, body))
        self.server.streams.discard(self.connection)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer


class Server(ThreadingHTTPServer):
    """A listener on 127.0.0.1 with its connections and their threads."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, serve: Serve) -> None:
        self.connections: set[Socket] = set()
        self.streams: set[Socket] = set()
        self.serve = serve
        self._workers: list[threading.Thread] = []
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread per connection, remembered until it ends."""
        worker = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._workers = [thread for thread in self._workers if thread.is_alive()] + [worker]
        worker.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news; anything else is a bug of the emulation and is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError | ConnectionLost):
            super().handle_error(request, client_address)

    def cut(self, sockets: set[Socket]) -> None:
        """Ends connections from our side."""
        for connection in list(sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stops listening, cuts every connection and waits for their threads."""
        self.shutdown()
        self.server_close()
        self.cut(self.connections)
        for worker in self._workers:
            worker.join(5)
