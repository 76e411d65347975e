"""An API server that says what a test has written down for it, and kubeconfigs that lead there."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cluster import Cluster, ConflictError, ExpiredError
from launcher.errors import LaunchError, SiteError

Answer = tuple[int, dict[str, str], Any] | None
"""Status, headers and body; None drops the connection."""
OK: Answer = (200, {}, {"metadata": {"name": "a"}})
Script = Callable[..., tuple[Cluster, "Scripted"]]


class Scripted:
    """A server that gives the answers it was told, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: Answer, certificate: Path | None = None) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(handler) -> None:
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                self.asked.append((handler.command, handler.path, dict(handler.headers)))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer is None:
                    handler.close_connection = True
                    return
                status, headers, body = answer
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                handler.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust it
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if certificate is not None:
            secure(self._server, certificate)
            self.url = self.url.replace("http", "https")

    def __enter__(self) -> Scripted:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def kubeconfig(path: Path, url: str, user: dict[str, Any] | None = None, **more: Any) -> Path:
    """A kubeconfig with the contexts `here` (namespace `team`) and `there`; `here` is the current one."""
    contexts = [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
                {"name": "there", "context": {"cluster": "c", "user": "u"}}]  # fmt: skip
    body = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "contexts": contexts,
            "clusters": [{"name": "c", "cluster": {"server": url, **more}}],
            "users": [{"name": "u", "user": user or {"token": "secret"}}]}  # fmt: skip
    path.write_text(yaml.safe_dump(body))
    return path


def secure(server: ThreadingHTTPServer, certificate: Path) -> None:
    """Makes a server that was not started yet speak TLS, with the key and certificate of one file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)


def certificate(folder: Path) -> Path:
    """`both.pem`, a key and a certificate for 127.0.0.1, and `ca.pem`, that of who vouches for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(name: str, subject: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, ca: bool) -> bytes:
        now, called = datetime.now(UTC), [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, word)])
                                          for word in (name, f"{folder.name} authority")]  # fmt: skip
        made = (
            x509.CertificateBuilder().subject_name(called[0]).issuer_name(called[1]).public_key(subject.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(by, hashes.SHA256())
        )  # fmt: skip
        return made.public_bytes(serialization.Encoding.PEM)

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "both.pem").write_bytes(pem + signed(folder.name, key, authority, ca=False))
    (folder / "ca.pem").write_bytes(signed(f"{folder.name} authority", authority, authority, ca=True))
    return folder


def config_map(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {"a": "b"}}


def failure(call: Callable[[], object], kind: type[LaunchError] = SiteError) -> LaunchError:
    """What the call fails with: an error of that kind, with a next step."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint or kind in (ConflictError, ExpiredError)
    assert "\n" not in str(caught.value)
    return caught.value
