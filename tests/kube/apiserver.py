"""A Kubernetes API server on 127.0.0.1 for tests: the official client and kubectl work against it.

    with ApiServer() as api:
        config.load_kube_config(str(api.kubeconfig(tmp_path)))

Tests may make it fail, hang, forget its history, drop connections, stop and start again with its state kept.
Controllers and kubelets are separate (`controllers.py`, `kubelet.py`); without them nothing moves, and nothing is
garbage-collected.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.kube import rest
from tests.kube.cluster import Cluster
from tests.kube.errors import ApiError
from tests.kube.wire import ConnectionLost, Exchange, Server


@dataclass
class Request:
    """One line of the request log; `status` is 0 until it is answered, and stays 0 if it never is."""

    time: float
    verb: str
    path: str
    query: dict[str, str]
    user_agent: str
    status: int = 0


@dataclass
class _Fault:
    match: re.Pattern[str]
    status: int
    left: int


@dataclass
class _Hook:
    verb: str
    match: re.Pattern[str]
    callback: Callable[[], object]
    used: bool = field(default=False)


class ApiServer(Cluster):
    """The HTTP front of a `Cluster`. Patterns are searched for in "<verb> <path>", as in "create .*/rayjobs"."""

    def __init__(self, *, user: str = "jane") -> None:
        super().__init__()
        self.requests: list[Request] = []
        # Pairs of verb and resource that are forbidden, such as ("create", "rayjobs") or ("get", "pods/log").
        self.denied: set[tuple[str, str]] = set()
        self.user = user
        self._server: Server | None = None
        self._port = 0
        self._faults: list[_Fault] = []
        self._hooks: list[_Hook] = []
        self._released = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address; it stays the same over `stop` and `start`."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens; after a `stop`, on the same port and with the same objects."""
        if self._server is not None:
            return
        self.stopping = False
        self._server = Server(self._port, self._serve)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Closes every connection and listens no more. Objects stay."""
        if self._server is None:
            return
        server, self._server = self._server, None
        with self.store.changed:
            self.stopping = True
            self.store.changed.notify_all()
        self._released.set()
        server.close()
        self._released = threading.Event()

    def kubeconfig(self, folder: Path, *, namespace: str = "default", context: str = "fake") -> Path:
        """Writes a kubeconfig file that leads here, and makes its namespace."""
        self.add_namespace(namespace)
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": context, "cluster": {"server": self.url}}],
            "users": [{"name": context, "user": {"token": "emulated"}}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context, "namespace": namespace}}],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "kubeconfig.yaml"
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return path

    def fail_next(self, count: int = 1, status: int = 503, match: str = ".*") -> None:
        """The next matching requests are refused and change nothing."""
        self._faults.append(_Fault(re.compile(match), status, count))

    def hang_next(self, match: str = ".*", count: int = 1) -> None:
        """The next matching requests get no answer and change nothing, until `release` or `stop` hangs up on them."""
        self._faults.append(_Fault(re.compile(match), 0, count))

    def release(self) -> None:
        """Hangs up on every request that hangs."""
        self._released.set()
        self._released = threading.Event()

    def crash_after(self, verb: str, match: str, callback: Callable[[], object]) -> None:
        """Calls back once, after the next matching request is applied and before it is answered.

        A callback that returns False loses the answer: the connection is closed in its place.
        """
        self._hooks.append(_Hook(verb, re.compile(match), callback))

    def compact(self, *, as_status: bool = False, open_watches: bool = False) -> None:
        """Forgets the history, so that a watch from an earlier version gets 410: in its stream, or as HTTP status.

        `open_watches`: those that are open now get it too.
        """
        with self.store.changed:
            self.gone_as_status = as_status
            self.store.compact()
            self.expiries += open_watches
            self.store.changed.notify_all()

    def drop_connections(self) -> None:
        """Cuts all open watches, followed logs and forwarded ports."""
        if self._server is not None:
            self._server.cut(self._server.streams)

    def _serve(self, exchange: Exchange) -> None:
        record = Request(
            time.time(), rest.verb_of(exchange), exchange.path, exchange.query, exchange.headers.get("User-Agent", "")
        )
        self.requests.append(record)
        line = f"{record.verb} {record.path}"
        try:
            self._meet_fault(exchange, line)
            hook = next((hook for hook in self._hooks if not hook.used and self._applies(hook, record)), None)
            if hook is not None:
                hook.used = True
                exchange.before_answer = hook.callback
            rest.serve(self, exchange, rest.Access(self.user, self.denied))
        except ApiError as error:
            exchange.send(error.body(), error.status, {"Retry-After": "1"} if error.status == 429 else None)
        finally:
            record.status = exchange.status

    def _meet_fault(self, exchange: Exchange, line: str) -> None:
        fault = next((fault for fault in self._faults if fault.left and fault.match.search(line)), None)
        if fault is None:
            return
        fault.left -= 1
        if fault.status:
            raise ApiError(fault.status)
        released = self._released
        while not released.wait(0.1) and not exchange.client_gone():
            pass
        exchange.hang_up()
        raise ConnectionLost

    def _applies(self, hook: _Hook, record: Request) -> bool:
        return hook.verb == record.verb and bool(hook.match.search(record.path))
