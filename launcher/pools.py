"""What there is to run on: `local`, this machine, is built in; others are Kubernetes pools. Starts nothing."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml

from launcher.cluster import CONFIG_MAPS, Cluster, Object
from launcher.errors import LaunchError, NotFoundError, SiteError, UserError, nearest
from launcher.labels import POOL_LABEL, POOL_MAPS
from launcher.site import Site, quantity, read_site, site_from


@dataclass(frozen=True)
class Pool:
    """A named place with CPUs and GPUs: those of one of its `nodes`.

    `memory` is in bytes. `gpu_type` is the vendor's name of the first GPU, and `bf16` whether it computes bfloat16.
    `site` is what a Kubernetes pool says of itself, None for this machine.
    """

    name: str
    cpus: int
    memory: int
    gpus: int = 0
    gpu_type: str = ""
    bf16: bool = False
    nodes: int = 1
    site: Site | None = None

    def cluster(self) -> Cluster:
        """The connection to a Kubernetes pool: one for all, since a kubeconfig may run a slow command for it."""
        if self.site is None:
            raise UserError("this machine is not a cluster", where="--cluster", hint="launch pools lists the clusters")
        return _connection(os.environ.get("KUBECONFIG"), self.site.context, self.site.namespace)

    @classmethod
    def of(cls, name: str, site: Site, node_type: str | None = None) -> Pool:
        """A Kubernetes pool, seen as its nodes of one type (by default its first)."""
        kind = site.node_type(node_type)
        return cls(
            name, int(kind.cpus), int(quantity(kind.memory)), kind.gpus, kind.gpu_name or kind.name, kind.bf16,
            kind.max_nodes, site,
        )  # fmt: skip


@cache
def _connection(_kubeconfig: str | None, context: str | None, namespace: str | None) -> Cluster:
    return Cluster.connect(context, namespace)


@dataclass(frozen=True)
class Place:
    """Where to look for Kubernetes pools; what is None is the kubeconfig's current one, or the usual file."""

    context: str | None = None
    namespace: str | None = None
    pool_file: Path | None = None


def find_pool(name: str, place: Place = Place()) -> Pool:
    """The pool of that name, or `NotFoundError` that lists those there are."""
    if name == "local":
        return this_machine()
    described = _in_files(place)
    if name not in described:
        described |= _in_cluster(place)
    if name not in described:
        close = nearest(name, described)
        raise NotFoundError(
            f"there is no pool {name}" + (f"; {close}" if close else ""), where="--cluster",
            hint=f"the pools are: {', '.join(['local', *sorted(described)])}; --context and --namespace look elsewhere",
        )  # fmt: skip
    return Pool.of(name, described[name]())


def cluster_pools(place: Place = Place()) -> Iterator[tuple[str, Pool | LaunchError]]:
    """Every Kubernetes pool in reach by name, or what is wrong with its description; raises what hides the rest."""
    trouble, described = None, _in_files(place)
    try:
        described = _in_cluster(place) | described
    except LaunchError as error:
        trouble = error
    for name in sorted(described):
        try:
            yield name, Pool.of(name, described[name]())
        except LaunchError as error:
            yield name, error
    if trouble is not None:
        raise trouble


def _in_files(place: Place) -> dict[str, Callable[[], Site]]:
    """The pools of the pool file: a mapping from names to what a ConfigMap would say, and their context."""
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "raylaunch" / "pools.yaml"
    path = place.pool_file or usual
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        if place.pool_file is None and not path.exists():
            return {}
        raise UserError(f"the pool file cannot be read: {error.strerror}", where=str(path),
                        hint="--pool-file PATH names another") from None  # fmt: skip
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", where=str(path), hint="mend it") from None
    if not isinstance(document, dict):
        raise UserError("a pool file is a mapping from names to pools", where=str(path), hint="docs/cluster.md has one")

    for name in document:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", str(name)):
            raise UserError(f"{name!r} cannot be the name of a pool", where=str(path),
                            hint="write up to 63 of a-z, 0-9, - and .")  # fmt: skip

    def read(name: str) -> Site:
        site = site_from(document[name], f"{path}: {name}")
        found = {"context": place.context or site.context, "namespace": place.namespace or site.namespace}
        return site.model_copy(update=found)

    return {str(name): partial(read, name) for name in document}


def _in_cluster(place: Place) -> dict[str, Callable[[], Site]]:
    """The pools that ConfigMaps describe: in the namespace, and if there are none, in all that may be read."""
    cluster = Cluster.connect(place.context, place.namespace)
    maps = cluster.objects(CONFIG_MAPS, labels=POOL_MAPS)
    if not maps and place.namespace is None:
        with suppress(SiteError):  # reading all namespaces is more than most may do
            maps = cluster.objects(CONFIG_MAPS, labels=POOL_MAPS, everywhere=True)

    def read(item: Object, *others: Object) -> Site:
        if others:
            names = ", ".join(sorted(each["metadata"]["namespace"] for each in (item, *others)))
            raise UserError("more than one ConfigMap describes it", where=item["metadata"]["labels"][POOL_LABEL],
                            hint=f"--namespace says which: {names}")  # fmt: skip
        namespace = item["metadata"]["namespace"]
        where = f"{cluster.context}/{namespace}: ConfigMap {item['metadata']['name']}"
        site = read_site((item.get("data") or {}).get("pool.yaml") or "", where)
        return site.model_copy(update={"context": cluster.context, "namespace": namespace})

    found: dict[str, list[Object]] = {}
    for item in maps:
        found.setdefault(item["metadata"]["labels"][POOL_LABEL], []).append(item)
    return {name: partial(read, *items) for name, items in found.items()}


def this_machine() -> Pool:
    """The machine the command runs on: the CPUs it may use and the GPUs that are visible."""
    import psutil

    gpus = _nvidia_gpus()
    return Pool(
        "local", _cpus(), psutil.virtual_memory().total, len(gpus), gpus[0][0] if gpus else "",
        bool(gpus) and all(capability >= 8 for _, capability in gpus),
    )  # fmt: skip


def _cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores this process may use: in a container often fewer than it sees."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = quota.read_text().split()
        return max(1, min(cpus, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # no cgroup, or `max`: no limit
        return cpus


def _nvidia_gpus() -> list[tuple[str, float]]:
    """Name and compute capability of each GPU that `CUDA_VISIBLE_DEVICES` leaves visible."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [item.strip() for item in visible.split(",") if item.strip()]
        rows = [
            row
            for row in rows
            if row[0] in wanted or any(row[1].startswith(item) for item in wanted if item[:1] == "G")
        ]
    # An old driver does not know the capability.
    return [(row[2], float(row[3]) if row[3][:1].isdigit() else 0.0) for row in rows]
