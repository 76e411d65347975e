"""A way from a port of this machine's loopback to Ray's dashboard in a pod. Nothing else can reach it."""

from __future__ import annotations

import socket
import threading
from base64 import b64decode
from contextlib import suppress
from typing import Any

from launcher.cluster import PODS, RAY_JOBS, SECRETS, Cluster
from launcher.errors import InfrastructureError, LaunchError, NotFinishedError, UserError
from launcher.labels import ROLE_LABEL, RUN_LABEL

DASHBOARD = 8265


class Tunnel:
    """Listens on 127.0.0.1:`port`; each connection goes to the run's present head, so a replaced head is no end."""

    def __init__(self, cluster: Cluster, name: str, token: str, port: int) -> None:
        self._cluster, self._name, self.token = cluster, name, token
        try:
            self._listener = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}", where="--port",
                            hint="another --port, or none for a free one") from None  # fmt: skip
        self.port: int = self._listener.getsockname()[1]
        self._visitors: set[socket.socket] = set()

    @classmethod
    def to_dashboard(cls, cluster: Cluster, name: str, port: int) -> Tunnel:
        """The tunnel to the dashboard of the run of that name."""
        job = cluster.get(RAY_JOBS, name)
        ray_cluster = ((job or {}).get("status") or {}).get("rayClusterName")
        if not ray_cluster:
            raise NotFinishedError("the run has no Ray cluster now", where=name, hint=f"launch status {name} says why")
        # KubeRay keeps the token in a Secret named as the RayCluster.
        secret = cluster.get(SECRETS, ray_cluster) or {}
        token = b64decode((secret.get("data") or {}).get("auth_token") or "").decode()
        return cls(cluster, name, token, port)

    def serve(self) -> None:
        """Carries connections until it is closed, or interrupted."""
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(visitor,), daemon=True).start()

    def close(self) -> None:
        """Ends `serve`, and all connections."""
        for each in (self._listener, *self._visitors):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _carry(self, visitor: socket.socket) -> None:
        with visitor, suppress(OSError):
            self._visitors.add(visitor)
            try:
                way = Way(self._cluster.port_forward(self._head(), DASHBOARD))
            except LaunchError as error:
                _refuse(visitor, error)
                return
            back = threading.Thread(target=_bring_back, args=(way, visitor), daemon=True)
            back.start()
            with suppress(OSError):
                while data := visitor.recv(65536):
                    way.send(data)
            way.end()
            back.join()
            way.close()
        self._visitors.discard(visitor)

    def _head(self) -> str:
        pods = self._cluster.objects(PODS, labels=f"{RUN_LABEL}={self._name},{ROLE_LABEL}=head")
        for pod in pods:
            running = (pod.get("status") or {}).get("phase") == "Running"
            if running and not pod["metadata"].get("deletionTimestamp"):
                return str(pod["metadata"]["name"])
        raise InfrastructureError("the run has no head now", where=self._name, hint=f"launch status {self._name}")


class Way:
    """A connection to a port of a pod, over a websocket: what comes is read by one thread, sent by another."""

    def __init__(self, websocket: Any) -> None:
        self._websocket = websocket
        self._begun: set[int] = set()

    def receive(self) -> bytes:
        """What came next, or nothing at the end; raises what the cluster says if there was no way to the port."""
        import websocket

        while True:
            try:
                kind, data = self._websocket.recv_data()
            except (websocket.WebSocketException, OSError, ValueError, AttributeError):
                return b""
            if kind == websocket.ABNF.OPCODE_CLOSE:
                return b""
            channel, content = data[0], data[1:]
            if channel not in self._begun:
                self._begun.add(channel)  # the first message of each channel is the number of the port
            elif channel == 1:
                raise InfrastructureError(content.decode("utf-8", "replace"), hint="launch status says how the pod is")
            elif content:
                return bytes(content)

    def send(self, data: bytes) -> None:
        """Sends it; `OSError` if the other side has gone."""
        import websocket

        try:
            self._websocket.send_binary(b"\0" + data)
        except websocket.WebSocketException as error:
            raise ConnectionError(str(error)) from error

    def end(self) -> None:
        """Nothing more comes or goes: wakes whoever reads."""
        self._websocket.abort()

    def close(self) -> None:
        """Frees what it holds; nobody may be reading any more."""
        self._websocket.shutdown()


def _bring_back(way: Way, visitor: socket.socket) -> None:
    """Everything that comes from the pod goes to the visitor, until there is no more; then the visitor is done."""
    with suppress(OSError):
        try:
            while data := way.receive():
                visitor.sendall(data)
        except LaunchError as error:
            _refuse(visitor, error)
        visitor.shutdown(socket.SHUT_RDWR)


def _refuse(visitor: socket.socket, error: LaunchError) -> None:
    body = f"{error}\n".encode()
    head = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length:"
    visitor.sendall(f"{head} {len(body)}\r\n\r\n".encode() + body)
