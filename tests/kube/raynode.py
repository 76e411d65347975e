"""`ray start` on a machine where other Ray nodes run too: free ports, short folders, local addresses, readiness."""

from __future__ import annotations

import http.client
import itertools
import random
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

from tests.kube.cluster import Cluster
from tests.kube.raypods import PORTS

# Below the range the kernel hands out by itself. In turns, so that a port comes again only after all the others: who
# got it has long begun to listen on it, or is gone, and a long session does not run out of them.
_PORTS = random.sample(range(20_000, 32_000), 12_000)
_TURNS = itertools.cycle(_PORTS)


def free_port() -> int:
    """A port nobody listens on, and nobody else was told lately."""
    for port in itertools.islice(_TURNS, len(_PORTS)):
        if not answers(port):
            return port
    raise RuntimeError(f"something listens on every port from {min(_PORTS)} to {max(_PORTS)}")


def answers(port: int) -> bool:
    """Whether something accepts connections."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class HeadPorts:
    """The local ports of one RayCluster's head service, the same for all its head pods."""

    def __init__(self) -> None:
        self.gcs = free_port()
        self.dashboard = free_port()
        self.client = free_port()

    def backends(self) -> dict[int, str]:
        """What the head service leads to."""
        return {
            PORTS["dashboard"]: f"http://127.0.0.1:{self.dashboard}",
            PORTS["gcs-server"]: f"http://127.0.0.1:{self.gcs}",
        }

    def pod_ports(self) -> dict[int, int]:
        """What a port-forward to the head pod leads to."""
        return {PORTS["dashboard"]: self.dashboard, PORTS["gcs-server"]: self.gcs, PORTS["client"]: self.client}


def local_addresses(cluster: Cluster, ports: dict[tuple[str, str], HeadPorts]) -> dict[str, str]:
    """For every address of a head service in the cluster's DNS, where it is on this machine."""
    result = {}
    for service in cluster.list("services"):
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
        found = ports.get((namespace, (service["spec"].get("selector") or {}).get("ray.io/cluster", "")))
        for suffix in (f".{namespace}.svc.cluster.local", f".{namespace}.svc", f".{namespace}", "") if found else ():
            result[f"{name}{suffix}:{PORTS['dashboard']}"] = f"127.0.0.1:{found.dashboard}" if found else ""
            result[f"{name}{suffix}:{PORTS['gcs-server']}"] = f"127.0.0.1:{found.gcs}" if found else ""
    return result


def ray_command(words: list[str], role: str, ports: HeadPorts, folder: Path) -> tuple[list[str], Callable[[], bool]]:
    """The container's command with the flags of its `ray start` made fit for this machine, and its readiness probe."""
    text = words[-1]
    start = re.search(r"ray start [^;&|]*", text)
    if start is None:
        return words, lambda: True
    flags = dict(_split(flag) for flag in shlex.split(start[0])[2:] if flag != "--head")
    agent = free_port()
    flags |= {
        "--node-ip-address": "127.0.0.1",
        "--dashboard-agent-listen-port": str(agent),
        "--dashboard-agent-grpc-port": str(free_port()),
        "--runtime-env-agent-port": str(free_port()),
        "--metrics-export-port": str(free_port()),
        "--min-worker-port": "0",
        "--max-worker-port": "0",
    }
    flags.setdefault("--object-store-memory", str(100 * 1024 * 1024))
    if role == "head":
        flags |= {"--port": str(ports.gcs), "--dashboard-port": str(ports.dashboard), "--dashboard-host": "127.0.0.1"}
        flags |= {"--ray-client-server-port": str(ports.client), "--temp-dir": str(folder / f"r{agent}")}
    else:
        flags["--address"] = f"127.0.0.1:{ports.gcs}"
    head = ["--head"] if role == "head" else []
    made = shlex.join(["ray", "start", *head, *(f"{name}={value}" if value else name for name, value in flags.items())])

    def probe() -> bool:
        return _healthy(agent, "/api/healthz") and (role != "head" or _healthy(ports.dashboard, "/api/version"))

    return [*words[:-1], text.replace(start[0], made)], probe


def _split(flag: str) -> tuple[str, str]:
    name, _, value = flag.partition("=")
    return name, value


def _healthy(port: int, path: str) -> bool:
    """Whether an HTTP server answers; with token authentication it may well refuse us."""
    # Asked only until the first yes, and a dashboard that is just starting on a busy machine takes seconds for it.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status in (200, 401, 403)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
