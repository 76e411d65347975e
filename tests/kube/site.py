"""A whole site in one process: an emulated cluster with a pool, and a kubeconfig that leads to it.

    with Site(folder, storage="s3://bucket/runs", kubelet=processes) as site:

Only what a laptop cannot have is imitated: API server, operator, scheduler and kubelet. The client, the submitter, the
driver and the workers are ours, S3 is a server, Ray is Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from launcher.cluster import Cluster
from launcher.pools import Place, Pool, find_pool
from tests.kube.apiserver import ApiServer
from tests.kube.cluster import Cluster as Emulated
from tests.kube.controllers import Controllers, Kubelet
from tests.kube.kubelet import ScriptedKubelet
from tests.kube.processes import ProcessKubelet
from tests.kube.scheduler import Node

NAMESPACE = "ml"
POOL = "gpu-pool"
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "XDG_CACHE_HOME")


def description(storage: str, **changes: Any) -> dict[str, Any]:
    """A pool of GPU nodes, and of nodes without GPUs on which the tests can really train."""
    env = {name: os.environ[name] for name in PASSED_ON[:4] if name in os.environ}
    offer = {"price_per_hour": 1.0}
    return {
        "image": "registry.example/raylaunch:0.1.0@sha256:" + "0" * 64,
        "ray_version": "2.60.0",
        "storage": storage,
        "service_account": "trainer",
        "head": {"cpus": "1", "memory": "2Gi"},
        "limits": {"start_minutes": 10, "max_hours": 2},
        "confirm_above": 1000,
        "env": env,
        "node_types": [
            {"name": "cpu", "cpus": 1, "memory": "2Gi", "max_nodes": 4, "on_demand": offer,
             "node_selector": {"raylaunch.dev/kind": "cpu"}},
            {"name": "a10g", "gpus": 4, "gpu_name": "NVIDIA A10G", "cpus": 16, "memory": "64Gi", "max_nodes": 4,
             "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
             "node_selector": {"raylaunch.dev/kind": "a10g"}, "on_demand": offer,
             "spot": {"price_per_hour": 0.4, "node_selector": {"raylaunch.dev/capacity": "spot"}}},
        ],
        **changes,
    }  # fmt: skip


def processes(cluster: Emulated) -> ProcessKubelet:
    """Real processes on a small node for heads and submitters, and on small ones for workers."""
    nodes = [Node("head-0", cpu="4", memory="16Gi")]
    nodes += [Node(f"cpu-{number}", cpu="2", memory="4Gi", labels={"raylaunch.dev/kind": "cpu"}) for number in range(2)]
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return ProcessKubelet(cluster, nodes, env={"PATH": path, "OMP_NUM_THREADS": "1"})


def scripted(cluster: Emulated) -> ScriptedKubelet:
    """No processes: pods do what the test says."""
    nodes = [Node("head-0", cpu="64", memory="256Gi")]
    for kind in ("a10g", "cpu"):
        labels = {"raylaunch.dev/kind": kind}
        gpus = 4 if kind == "a10g" else 0
        nodes += [Node(f"{kind}-{number}", cpu="16", memory="64Gi", gpus=gpus, tainted=bool(gpus), labels=labels)
                  for number in range(4)]  # fmt: skip
    return ScriptedKubelet(cluster, tuple(nodes))


class Site:
    """`api` is the server, `kubelet` what runs the pods, `kubeconfig` a file for clients in other processes."""

    def __init__(
        self, folder: Path, storage: str, kubelet: Callable[[Emulated], Any] = scripted, *, speed: float = 1.0,
        **changes: Any,
    ) -> None:  # fmt: skip
        self.api = ApiServer()
        self.storage = storage
        self.folder = folder
        self.kubelet: Any = None
        self._make, self._speed, self._changes = kubelet, speed, changes
        self.controllers: Controllers

    def __enter__(self) -> Self:
        self.api.__enter__()
        self.api.add_namespace(NAMESPACE)
        self.api.create("serviceaccounts", {"metadata": {"name": "trainer", "namespace": NAMESPACE}})
        self.describe(POOL, description(self.storage, **self._changes))
        self.kubeconfig = self.api.kubeconfig(self.folder, namespace=NAMESPACE)
        kubelet: Kubelet = self._make(self.api)
        self.kubelet = kubelet
        self.controllers = Controllers(self.api, kubelet, speed=self._speed)
        self.controllers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.controllers.__exit__(kind, error, trace)
        finally:
            self.api.__exit__(kind, error, trace)

    def describe(self, name: str, pool: dict[str, Any]) -> None:
        """Puts the ConfigMap of a pool into the namespace."""
        self.api.create("configmaps", {
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"raylaunch.dev/pool": name}},
            "data": {"pool.yaml": yaml.safe_dump(pool)},
        })  # fmt: skip

    def pool(self, name: str = POOL) -> Pool:
        """The pool, as the client finds it."""
        return find_pool(name, Place())

    def cluster(self) -> Cluster:
        """A client's connection."""
        return Cluster.connect()

    def pods(self, run: str, role: str = "") -> list[str]:
        """Names of the run's pods that are there."""
        labels = f"raylaunch.dev/run={run}" + (f",raylaunch.dev/role={role}" if role else "")
        return [pod["metadata"]["name"] for pod in self.api.list("pods", NAMESPACE, labels)]
