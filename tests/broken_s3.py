"""An S3 over HTTP that misbehaves as it is told to, object by object, and then answers rightly."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.scripted import secure

CODES = {
    "NoSuchKey": 404, "PreconditionFailed": 412, "AccessDenied": 403, "ExpiredToken": 400, "InternalError": 500,
    "SlowDown": 503, "PermanentRedirect": 301,
}  # fmt: skip


class BrokenS3:
    """The server; `with` starts and stops it.

    Args:
        certificate: the file with a key and a certificate by which it speaks TLS, if it is to.

    Attributes:
        url: its address.
        objects: what it holds, by path (`/bucket/key`); the ETag of each is "tag".
        faults: what goes wrong with an object, one for each request: a code of CODES, `cut` for a body that breaks
            off, `short` for one that says to be shorter, `hang` for no answer. Once they are used up, all is well.
        region: the only one whose signatures are accepted, if it is set.
        asked: path, token and Range of each GET of an object so far.
        lifetime: of the credentials that it gives out at `/credentials`.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.region = ""
        self.asked: list[tuple[str, str, str]] = []
        self.lifetime = timedelta(hours=1)
        self._tokens = 0
        self._stopped = threading.Event()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"s3": self}))
        server.daemon_threads = True
        self._server = server
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
        if certificate:
            secure(server, certificate)

    def __enter__(self) -> BrokenS3:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def hang(self) -> None:
        """Returns when the server is stopped."""
        self._stopped.wait()

    def credentials(self) -> dict[str, str]:
        """New ones, each with a token of its own."""
        self._tokens += 1
        end = datetime.now(UTC) + self.lifetime
        return {"AccessKeyId": "key", "SecretAccessKey": "secret", "Token": f"token-{self._tokens}",
                "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: BrokenS3

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._send(200 if not self._astray() else 301, b"")

    def do_GET(self) -> None:
        if self.path == "/credentials":
            self._send(200, json.dumps(self.s3.credentials()).encode())
            return
        span = self.headers.get("Range", "")
        self.s3.asked.append((self.path, self.headers.get("x-amz-security-token", ""), span))
        queue = self.s3.faults.get(self.path, [])
        fault = queue.pop(0) if queue else "PermanentRedirect" if self._astray() else ""
        if not fault and self.path not in self.s3.objects:
            fault = "NoSuchKey"
        if not fault and self.headers.get("If-Match", '"tag"') != '"tag"':
            fault = "PreconditionFailed"
        if fault == "hang":
            self.s3.hang()
        elif fault in CODES:
            self._send(CODES[fault], f"<Error><Code>{fault}</Code><Message>as told</Message></Error>".encode())
        else:
            self._object(self.s3.objects[self.path], span, fault)

    def _object(self, data: bytes, span: str, fault: str) -> None:
        numbers = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        start, stop = (int(numbers[1]), int(numbers[2]) + 1) if numbers else (0, len(data))
        part = data[start:stop]
        part = part[: len(part) // 2] if fault == "short" else part
        about = {"ETag": '"tag"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
                 "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}  # fmt: skip
        self._send(206 if numbers else 200, part, about, cut=fault == "cut")

    def _astray(self) -> bool:
        return bool(self.s3.region) and f"/{self.s3.region}/s3/" not in self.headers.get("Authorization", "")

    def _send(self, status: int, body: bytes, about: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        region = {"x-amz-bucket-region": self.s3.region} if self.s3.region else {}
        for name, value in {"Content-Length": str(len(body)), **region, **(about or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut
