"""The long-lived side of the emulated API server: watches, pod logs, the service proxy and port-forwarding."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import selectors
import socket
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from tests.kube.cluster import Cluster, ContainerLog
from tests.kube.errors import ApiError, not_found
from tests.kube.resources import served_form
from tests.kube.schema import Object
from tests.kube.selection import fields_match, labels_match
from tests.kube.store import Change
from tests.kube.wire import ConnectionLost, Exchange

if TYPE_CHECKING:
    from tests.kube.rest import Target

_WEBSOCKET_KEY = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "content-length", "te", "trailer"}


def watch(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    """Streams changes from a version on; without one, first everything there is."""
    store, query, expiries = cluster.store, exchange.query, cluster.expiries
    asked = query.get("resourceVersion") or "0"
    with store.changed:
        present = store.select(target.resource, target.namespace) if asked == "0" else []
        seen = store.version if asked == "0" else int(asked)
        expired = ApiError(410, f"too old resource version: {asked} ({store.oldest})") if seen < store.oldest else None
    if expired and cluster.gone_as_status:
        raise expired
    write = exchange.stream("application/json")

    def line(kind: str, thing: Object) -> None:
        write(json.dumps({"type": kind, "object": thing}).encode() + b"\n")

    for thing in (thing for _, thing in present if _wanted(query, thing)):
        line("ADDED", served_form(target.resource, target.version, thing))
    end = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
    while time.monotonic() < end and not cluster.stopping and not expired:
        for change in _next_changes(cluster, seen, end, expiries):
            seen = change.version
            if shown := _visible(target, query, change):
                line(shown, served_form(target.resource, target.version, change.thing))
        if cluster.expiries != expiries:
            expired = ApiError(410, f"too old resource version: {seen} ({store.version})")
        elif exchange.client_gone():
            raise ConnectionLost
    if expired:
        line("ERROR", expired.body())
    write(b"")


def _next_changes(cluster: Cluster, seen: int, end: float, expiries: int) -> list[Change]:
    """The changes after a version; waits up to half a second for one."""
    store = cluster.store
    with store.changed:
        if store.version <= seen and cluster.expiries == expiries:
            store.changed.wait(min(0.5, max(0.0, end - time.monotonic())))
        return list(store.since(seen))


def _wanted(query: dict[str, str], thing: Object) -> bool:
    labels = thing["metadata"].get("labels") or {}
    return labels_match(query.get("labelSelector"), labels) and fields_match(query.get("fieldSelector"), thing)


def _visible(target: Target, query: dict[str, str], change: Change) -> str:
    """How a watch shows a change: an object that leaves the selection is DELETED, one that enters it ADDED."""
    if (change.key.group, change.key.plural) != target.resource.storage or target.namespace not in (
        None,
        change.key.namespace,
    ):
        return ""
    before = change.before is not None and _wanted(query, change.before)
    now = change.kind != "DELETED" and _wanted(query, change.thing)
    return {(False, True): "ADDED", (True, True): "MODIFIED", (True, False): "DELETED"}.get((before, now), "")


def pod_log(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    """The log of one container, as one text or followed until the container ends."""
    query, namespace = exchange.query, target.namespace or ""
    pod = cluster.get("pods", namespace, target.name)
    if pod is None:
        raise not_found("pods", target.name)
    container = _container(pod, query.get("container"))
    lives = cluster.lives(namespace, target.name, container)
    if query.get("previous") in ("1", "true"):
        if len(lives) < 2:
            raise ApiError(400, f'previous terminated container "{container}" in pod "{target.name}" not found')
        return exchange.send(_text(_lines(lives[-2], query), query))
    if not lives:
        reason = _waiting_reason(pod, container)
        if reason:
            raise ApiError(400, f'container "{container}" in pod "{target.name}" is waiting to start: {reason}')
        lives = [cluster.open_log(namespace, target.name, container)]
    if query.get("follow") not in ("1", "true"):
        return exchange.send(_text(_lines(lives[-1], query), query))
    return _follow(cluster, exchange, target, lives[-1])


def _follow(cluster: Cluster, exchange: Exchange, target: Target, log: ContainerLog) -> None:
    write = exchange.stream("text/plain")
    with cluster.store.changed:
        done, first = len(log.lines), _lines(log, exchange.query)
    if first:
        write(_text(first, exchange.query))
    while not cluster.stopping:
        with cluster.store.changed:
            over = log.closed or _over(cluster.get("pods", target.namespace, target.name))
            if done == len(log.lines) and not over:
                cluster.store.changed.wait(0.5)
            new, done = log.lines[done:], len(log.lines)
        if new:
            write(_text(new, exchange.query))
        elif over:
            break
        elif exchange.client_gone():
            raise ConnectionLost
    write(b"")


def _over(pod: Object | None) -> bool:
    return pod is None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _container(pod: Object, asked: str | None) -> str:
    names = [entry["name"] for entry in pod["spec"]["containers"]]
    early = [entry["name"] for entry in pod["spec"].get("initContainers") or []]
    if asked:
        if asked not in names + early:
            raise ApiError(400, f"container {asked} is not valid for pod {pod['metadata']['name']}")
        return asked
    if len(names) > 1:
        text = (
            f"a container name must be specified for pod {pod['metadata']['name']}, choose one of: [{' '.join(names)}]"
        )
        raise ApiError(400, text + (f" or one of the init containers: [{' '.join(early)}]" if early else ""))
    return str(names[0])


def _waiting_reason(pod: Object, container: str) -> str:
    statuses = pod.get("status", {}).get("containerStatuses") or []
    statuses = statuses + (pod.get("status", {}).get("initContainerStatuses") or [])
    for status in statuses:
        if status["name"] == container:
            reason = str((status.get("state", {}).get("waiting") or {}).get("reason", ""))
            pulling = reason in ("ImagePullBackOff", "ErrImagePull")
            return "trying and failing to pull image" if pulling else reason
    return "" if pod.get("status", {}).get("phase") == "Running" else "ContainerCreating"


def _lines(log: ContainerLog, query: dict[str, str]) -> list[tuple[float, str]]:
    lines = list(log.lines)
    if query.get("sinceSeconds"):
        lines = [line for line in lines if line[0] >= time.time() - int(query["sinceSeconds"])]
    if query.get("sinceTime"):
        lines = [line for line in lines if line[0] >= datetime.fromisoformat(query["sinceTime"]).timestamp()]
    return lines[max(0, len(lines) - int(query["tailLines"])) :] if query.get("tailLines") else lines


def _text(lines: list[tuple[float, str]], query: dict[str, str]) -> bytes:
    if query.get("timestamps") in ("1", "true"):
        return "".join(f"{_nanoseconds(moment)} {line}\n" for moment, line in lines).encode()
    return "".join(f"{line}\n" for _, line in lines).encode()


def _nanoseconds(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


def proxy(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    """Passes an HTTP request on to a service or a pod. It keeps Authorization to itself, as the real one."""
    address = _backend(cluster, target)
    path = exchange.raw_path.split("/proxy", 1)[1] or "/"
    path += f"?{exchange.raw_query}" if exchange.raw_query else ""
    headers = {
        name: value for name, value in exchange.headers.items() if name.lower() not in _HOP_HEADERS | {"authorization"}
    }
    if exchange.headers.get("Upgrade"):
        return _splice(exchange, address, path, headers)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request(exchange.method, path, exchange.body or None, headers)
        response = connection.getresponse()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS}
        exchange.send(response.read(), response.status, kept)
    except (OSError, http.client.HTTPException) as error:
        raise ApiError(503, f"error trying to reach service: dial tcp {urlsplit(address).netloc}: {error}") from error
    finally:
        connection.close()
    return None


def _backend(cluster: Cluster, target: Target) -> str:
    """The address a service's port leads to; names are `[scheme:]name[:port]`."""
    parts = target.name.split(":")
    name, port = (parts[1], parts[2]) if len(parts) == 3 else (parts[0], parts[1] if len(parts) > 1 else "")
    namespace = target.namespace or ""
    thing = cluster.get(target.resource.plural, namespace, name)
    if thing is None:
        raise not_found(target.resource.full_name, name)
    if target.resource.plural == "pods":
        ports = {
            number: f"http://127.0.0.1:{local}"
            for number, local in cluster.pod_ports.get((namespace, name), {}).items()
        }
    else:
        ports = cluster.service_backends.get((namespace, name), {})
        declared = thing.get("spec", {}).get("ports") or []
        port = next((str(entry["port"]) for entry in declared if entry.get("name") == port), port)
    if not ports:
        raise ApiError(503, f'no endpoints available for service "{name}"')
    number = int(port) if port.isdigit() else next(iter(ports)) if not port else -1
    if number not in ports:
        raise ApiError(503, f'no service port "{port}" found for service "{name}"')
    return ports[number]


def _splice(exchange: Exchange, address: str, path: str, headers: dict[str, str]) -> None:
    """Passes an upgraded connection (a WebSocket) through byte for byte."""
    host, _, port = urlsplit(address).netloc.partition(":")
    lines = [f"{exchange.method} {path} HTTP/1.1", f"Host: {host}:{port}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += ["Connection: Upgrade", f"Upgrade: {exchange.headers['Upgrade']}", "", ""]
    try:
        backend = socket.create_connection((host, int(port)), timeout=10)
    except OSError as error:
        raise ApiError(503, f"error trying to reach service: dial tcp {host}:{port}: {error}") from error
    with backend:
        backend.sendall("\r\n".join(lines).encode())
        client = exchange.take_over()
        _pump({client: backend, backend: client})


def _pump(partners: dict[socket.socket, socket.socket]) -> None:
    with selectors.DefaultSelector() as selector:
        for one in partners:
            selector.register(one, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select(1):
                try:
                    data = ready.fileobj.recv(65536)  # type: ignore[union-attr]
                    partners[ready.fileobj].sendall(data)  # type: ignore[index]
                except OSError:
                    data = b""
                if not data:
                    return


class PortForward:
    """One port-forwarding WebSocket: two channels per port, data and error, each opened with its port number."""

    def __init__(self, cluster: Cluster, exchange: Exchange, target: Target, ports: list[int]) -> None:
        self._cluster, self._target, self._ports = cluster, target, ports
        self._websocket = Connection(ConnectionType.SERVER)
        self._client = exchange.upgrade(_handshake(exchange))
        self._backends: dict[socket.socket, int] = {}
        self._pending = b""

    def run(self) -> None:
        """Forwards until either side is done."""
        try:
            for index, port in enumerate(self._ports):
                for channel in (2 * index, 2 * index + 1):
                    self._send(channel, port.to_bytes(2, "little"))
                self._connect(index, port)
            while self._backends and self._step():
                pass
            self._client.sendall(self._websocket.send(CloseConnection(code=1000)))
        except (OSError, RemoteProtocolError, LocalProtocolError):
            pass
        finally:
            for backend in self._backends:
                backend.close()

    def _connect(self, index: int, port: int) -> None:
        namespace, name = self._target.namespace or "", self._target.name
        local = self._cluster.pod_ports.get((namespace, name), {}).get(port)
        try:
            if local is None:
                raise ConnectionRefusedError(f"dial tcp4 127.0.0.1:{port}: connect: connection refused")
            self._backends[socket.create_connection(("127.0.0.1", local), timeout=10)] = 2 * index
        except OSError as error:
            text = f"error forwarding port {port} to pod {name}: failed to connect to localhost:{port}: {error}"
            self._send(2 * index + 1, text.encode())

    def _step(self) -> bool:
        with selectors.DefaultSelector() as selector:
            for one in (self._client, *self._backends):
                selector.register(one, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(0.5)]
        if self._cluster.stopping:
            return False
        for backend, channel in list(self._backends.items()):
            if backend in ready:
                data = self._receive(backend)
                if data:
                    self._send(channel, data)
                else:
                    del self._backends[backend]
                    backend.close()
        return self._from_client() if self._client in ready else True

    def _from_client(self) -> bool:
        data = self._receive(self._client)
        if not data:
            return False
        self._websocket.receive_data(data)
        for event in self._websocket.events():
            if isinstance(event, BytesMessage) and event.data:
                self._pending += bytes(event.data)
                if event.message_finished:
                    message, self._pending = self._pending, b""
                    for backend, channel in self._backends.items():
                        if channel == message[0]:
                            backend.sendall(message[1:])
            elif isinstance(event, Ping):
                self._client.sendall(self._websocket.send(event.response()))
            elif isinstance(event, CloseConnection):
                return False
        return True

    def _receive(self, one: socket.socket) -> bytes:
        with contextlib.suppress(OSError):
            return one.recv(65536)
        return b""

    def _send(self, channel: int, data: bytes) -> None:
        self._client.sendall(self._websocket.send(BytesMessage(bytes((channel,)) + data)))


def _handshake(exchange: Exchange) -> dict[str, str]:
    offered = [name.strip() for name in exchange.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    if "v4.channel.k8s.io" not in offered:
        raise ApiError(400, "unable to upgrade: only the WebSocket protocol v4.channel.k8s.io is emulated")
    digest = hashlib.sha1(exchange.headers.get("Sec-WebSocket-Key", "").encode() + _WEBSOCKET_KEY).digest()
    accept = {"Sec-WebSocket-Accept": base64.b64encode(digest).decode(), "Sec-WebSocket-Protocol": "v4.channel.k8s.io"}
    return {"Connection": "Upgrade", "Upgrade": "websocket", **accept}


def port_forward(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    """Forwards TCP connections to a pod over a WebSocket."""
    pod = cluster.get("pods", target.namespace, target.name)
    if pod is None:
        raise not_found("pods", target.name)
    phase = pod.get("status", {}).get("phase", "Pending")
    if phase != "Running":
        raise ApiError(500, f"unable to forward port because pod is not running. Current status={phase}")
    ports = [int(number) for number in exchange.query.get("ports", "").split(",") if number]
    PortForward(cluster, exchange, target, ports).run()


SUBRESOURCES = {"log": pod_log, "proxy": proxy, "portforward": port_forward}
