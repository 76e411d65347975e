"""A way from a port of this machine's loopback to Ray's dashboard in a pod. Nothing else can reach it."""

from __future__ import annotations

import socket
import threading
from base64 import b64decode
from contextlib import suppress

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
        """Ends `serve`."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _carry(self, visitor: socket.socket) -> None:
        try:
            pod = self._cluster.forward(self._head(), DASHBOARD)
        except LaunchError as error:
            body = f"{error}\n".encode()
            visitor.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            visitor.close()
            return
        back = threading.Thread(target=_pour, args=(pod, visitor), daemon=True)
        back.start()
        _pour(visitor, pod)
        back.join()
        visitor.close()
        pod.close()

    def _head(self) -> str:
        pods = self._cluster.objects(PODS, labels=f"{RUN_LABEL}={self._name},{ROLE_LABEL}=head")
        for pod in pods:
            running = (pod.get("status") or {}).get("phase") == "Running"
            if running and not pod["metadata"].get("deletionTimestamp"):
                return str(pod["metadata"]["name"])
        raise InfrastructureError("the run has no head now", where=self._name, hint=f"launch status {self._name}")


def _pour(source: socket.socket, target: socket.socket) -> None:
    """Everything that comes from one side goes to the other, until there is no more."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
