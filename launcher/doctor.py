"""Is everything there that a run needs, and if not, how is it mended? Looks, and writes nothing but one test object.

The whole list is for `launch doctor`; the short form, before each submission, stops at the first thing that is wrong.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from launcher import __version__
from launcher import cluster as api
from launcher.capacity import free_nodes
from launcher.cluster import Cluster, Kind, Object
from launcher.errors import LaunchError, SiteError
from launcher.plan import count
from launcher.pools import Pool
from launcher.site import Site
from launcher.storage import open_store

RAY_VERSION = "2.60.0"
"""What this version of raylaunch was tested with, and trains on."""
OLDEST_OPERATOR = (1, 6)
"""KubeRay: `preRunningDeadlineSeconds`, without which a run that finds no place waits for ever, came with 1.6.0."""

HEAD_SECONDS = 900
"""Time in which a new node comes up and pulls a large image."""

NAMESPACES = Kind("/api/v1", "namespaces", namespaced=False)
NETWORK_POLICIES = Kind("/apis/networking.k8s.io/v1", "networkpolicies")
DAEMON_SETS = Kind("/apis/apps/v1", "daemonsets")

NEEDED: tuple[tuple[Kind, str, str, str], ...] = (
    (api.RAY_JOBS, "create get list watch delete", "", "start, watch and end runs"),
    (api.RAY_CLUSTERS, "list watch", "", "see where a run stands"),
    (api.PODS, "list watch", "", "see where a run stands"),
    (api.EVENTS, "list watch", "", "say why a run waits"),
    (api.CONFIG_MAPS, "create get list patch delete", "", "hand over the spec, find pools"),
    (api.PODS, "get", "log", "say why a container crashed"),
    (api.PODS, "create", "portforward", "launch dashboard"),
    (api.SECRETS, "get", "", "launch dashboard"),
)


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is None for what could not be found out or is only advice. `hint` says how to mend it."""

    name: str
    ok: bool | None
    what: str
    hint: str = ""


def machine() -> Iterator[Check]:
    """What training on this machine needs."""
    from launcher.pools import this_machine

    missing = [name for name in ("torch", "timm", "ray") if find_spec(name) is None]
    if missing:
        yield Check("packages", None, f"{', '.join(missing)} not installed: runs here are not possible, clusters are",
                    "pip install 'raylaunch[train]'")  # fmt: skip
    else:
        yield Check("packages", True, "torch, timm and ray are installed")
    here = this_machine()
    yield Check("machine", True, f"{count(here.cpus, 'core')}, {count(here.gpus, 'GPU')} {here.gpu_type}".rstrip())


def storage(uri: str) -> Check:
    """Whether objects can be written, read and deleted there with the credentials of this user."""
    store, key = open_store(uri), f".raylaunch-doctor-{secrets.token_hex(4)}"
    try:
        store.write(key, b"test")
        store.read(key)
        store.delete(key)
    except LaunchError as error:
        return Check("storage", False, str(error), error.hint)
    except FileNotFoundError:
        return Check("storage", False, f"{uri}: what was written is not there", "check the bucket's policy")
    return Check("storage", True, f"{uri} can be written, read and deleted from here")


def cluster_checks(pool: Pool, cluster: Cluster) -> Iterator[Check]:
    """Everything a run on the pool needs, in the order in which it would be missed."""
    site = pool.site
    assert site is not None
    try:
        yield Check("cluster", True, f"{cluster.where} answers, Kubernetes {cluster.version()}")
    except LaunchError as error:
        yield Check("cluster", False, str(error), error.hint)
        return
    steps: tuple[Callable[[], Iterator[Check]], ...] = (
        lambda: _permissions(cluster, site),
        lambda: _operator(cluster),
        lambda: _image(site),
        lambda: _objects(cluster, site),
        lambda: _queue(cluster, site),
        lambda: iter([storage(site.storage)]),
        lambda: _quota(cluster, site),
        lambda: _gpus(cluster, site),
        lambda: _walls(cluster),
    )
    for step in steps:
        try:
            yield from step()
        except LaunchError as error:
            yield Check("cluster", None, str(error), error.hint)


def before_submit(pool: Pool, cluster: Cluster) -> None:
    """The short form: raises `SiteError` for the first thing without which no pod of the run could start."""
    site = pool.site
    assert site is not None
    for check in (*_image(site), *_objects(cluster, site)):
        if check.ok is False:
            raise SiteError(check.what, where=cluster.where, hint=check.hint)


def _permissions(cluster: Cluster, site: Site) -> Iterator[Check]:
    wanted = list(NEEDED)
    if site.queue:
        wanted += [
            (api.WORKLOADS, "list watch", "", "say why a run is queued"),
            (api.LOCAL_QUEUES, "get", "", "check the queue"),
        ]
    missing = []
    for kind, verbs, sub, why in wanted:
        lacking = [verb for verb in verbs.split() if not cluster.allowed(verb, kind, sub)]
        if lacking:
            name = f"{kind.plural}/{sub}" if sub else kind.plural
            missing.append(f"{' '.join(lacking)} {name} ({why})")
    hint = f"ask for a Role with these in {cluster.namespace}; k8s/base/launcher-role.yaml is one"
    yield (Check("permissions", False, f"you may not {'; '.join(missing)}", hint) if missing
           else Check("permissions", True, f"you may run, watch and end runs in {cluster.namespace}"))  # fmt: skip
    if not cluster.allowed("list", api.NODES):
        yield Check("nodes", None, "you may not list nodes: plans cannot say whether a run fits now",
                    "optional: a ClusterRole with list on nodes")  # fmt: skip


def _operator(cluster: Cluster) -> Iterator[Check]:
    install = "install KubeRay 1.7: kubectl apply --server-side -k k8s/operators/kuberay; docs/deploy.md"
    ours = "app.kubernetes.io/name in (kuberay-operator,kuberay)"  # its Helm chart and its kustomization disagree
    try:
        absent = [name for name in ("rayjobs.ray.io", "rayclusters.ray.io") if cluster.get(api.CRDS, name) is None]
    except SiteError:  # definitions are seldom readable; that the kind is served says the same
        absent = [
            f"{kind.plural}.{kind.group}" for kind in (api.RAY_JOBS, api.RAY_CLUSTERS) if not cluster.serves(kind)
        ]
    if absent:
        yield Check("kuberay", False, f"the cluster does not know {', '.join(absent)}", install)
        return
    try:
        found = cluster.objects(api.DEPLOYMENTS, labels=ours, everywhere=True)
    except SiteError:
        yield Check("kuberay", None, "RayJobs are known; you may not see the operator, so its version is not known",
                    f"ask for its version: {'.'.join(map(str, OLDEST_OPERATOR))} or newer is needed")  # fmt: skip
        return
    if not found:
        yield Check("kuberay", False, "RayJobs are known, but no kuberay-operator is deployed", install)
        return
    image = found[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    version = re.search(r":v?(\d+)\.(\d+)(\.\d+)?", image)
    ready = (found[0].get("status") or {}).get("readyReplicas") or 0
    if version and (int(version[1]), int(version[2])) < OLDEST_OPERATOR:
        yield Check("kuberay", False, f"the operator is {version[0][1:]}, too old", install)
    elif not ready:
        yield Check("kuberay", False, "the operator is deployed, but not running",
                    f"kubectl -n {found[0]['metadata']['namespace']} get pods")  # fmt: skip
    else:
        yield Check("kuberay", True, f"the operator runs, {version[0][1:] if version else image}")
        yield from _patience(found[0]["spec"]["template"]["spec"]["containers"][0])


def _patience(operator: Object) -> Iterator[Check]:
    """How long KubeRay waits for a lost head; by default less than a new node takes to come and pull an image."""
    settings = {item["name"]: item.get("value", "") for item in operator.get("env") or []}
    given = settings.get("RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "")
    seconds = int(given) if given.isdigit() else 300
    if seconds < HEAD_SECONDS:
        what = f"KubeRay gives a run up whose head is away for {seconds} s; a new node may take longer"
        yield Check("recovery", None, what, "set RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS=1800 on the kuberay-operator")


def _image(site: Site) -> Iterator[Check]:
    owner = "the pool's owner sets image and ray_version in its ConfigMap"
    if site.ray_version != RAY_VERSION:
        yield Check(
            "image", False, f"the pool has Ray {site.ray_version}, raylaunch {__version__} needs {RAY_VERSION}", owner
        )
        return
    tag = site.image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in site.image and tag in ("", "latest"):
        yield Check("image", None, f"{site.image} can change between the pods of one run", f"pin it by digest; {owner}")
    elif re.fullmatch(r"v?\d+\.\d+\.\d+", tag) and tag.removeprefix("v") != __version__:
        yield Check(
            "image", None, f"the image is {tag}, this is raylaunch {__version__}", f"use the same version; {owner}"
        )
    else:
        yield Check("image", True, f"{site.image} with Ray {site.ray_version}")


def _objects(cluster: Cluster, site: Site) -> Iterator[Check]:
    named = [(api.SERVICE_ACCOUNTS, "service account", site.service_account), (api.SECRETS, "secret", site.env_secret),
             (api.LOCAL_QUEUES, "queue", site.queue)]  # fmt: skip
    for kind, what, name in named:
        if name is None:
            continue
        try:
            found = cluster.get(kind, name)
        except SiteError:
            yield Check(what, None, f"you may not see {what} {name}")
            continue
        if found is None and kind is api.LOCAL_QUEUES and not cluster.serves(kind):
            yield Check(what, False, f"the pool names {what} {name}, but Kueue is not installed",
                        "install Kueue (k8s/operators/kueue), or the pool's owner leaves queue out")  # fmt: skip
        elif found is None:
            yield Check(what, False, f"the pool names {what} {name}, which is not in {cluster.namespace}",
                        "the pool's owner makes it, or names another in the pool's ConfigMap")  # fmt: skip
        else:
            yield Check(what, True, f"{what} {name} is there")


def _queue(cluster: Cluster, site: Site) -> Iterator[Check]:
    """What keeps the queue from letting runs go, in Kueue's words. They may be put into it all the same."""
    found = None
    if site.queue:
        with suppress(SiteError):
            found = cluster.get(api.LOCAL_QUEUES, site.queue)
    for condition in ((found or {}).get("status") or {}).get("conditions") or []:
        if condition["type"] == "Active" and condition["status"] == "False":
            what = f"queue {site.queue} lets no run go: {condition.get('message', '').rstrip('.')}"
            yield Check("queue", False, what, "kubectl describe clusterqueues says more; the pool's owner mends it")


def _quota(cluster: Cluster, site: Site) -> Iterator[Check]:
    from launcher.site import quantity

    key = f"requests.{site.gpu_resource}"
    for item in cluster.objects(api.QUOTAS):
        status = item.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        if key in hard:
            left = quantity(hard[key]) - quantity(used.get(key, 0))
            what = f"{left:g} of {quantity(hard[key]):g} GPUs are left in the quota {item['metadata']['name']}"
            yield Check("quota", left > 0 or None, what, "" if left > 0 else "launch list shows who uses them")


def _gpus(cluster: Cluster, site: Site) -> Iterator[Check]:
    try:
        nodes, pods = cluster.objects(api.NODES), cluster.objects(api.PODS, everywhere=True)
    except SiteError:
        return
    away = []
    for kind in site.node_types:
        free = free_nodes(nodes, pods, kind, site.gpu_resource)
        total, left = sum(node.all_gpus for node in free), sum(node.gpus for node in free)
        if free and kind.gpus and not total:
            yield Check("gpus", False, f"{count(len(free), 'node')} of {kind.name}, none offers {site.gpu_resource}",
                        "the device plugin is not running on them: kubectl -n kube-system get daemonsets")  # fmt: skip
        else:
            gpus = f", {left} of {total} GPUs free" if kind.gpus else ""
            yield Check("gpus", True, f"{kind.name}: {count(len(free), 'node')} of at most {kind.max_nodes}{gpus}")
        if not free:
            away.append(kind)
    if away:
        yield from _from_zero(cluster, [kind.name for kind in away], any(kind.gpus for kind in away))


def _from_zero(cluster: Cluster, kinds: list[str], gpus: bool) -> Iterator[Check]:
    """What brings nodes that are not there yet, and their GPUs. Some clouds do either out of sight: all is advice."""
    wanted = [("autoscaler", api.DEPLOYMENTS, r"autoscaler|karpenter", "a node autoscaler",
               f"nobody brings a node of {', '.join(kinds)}")]  # fmt: skip
    if gpus:
        wanted.append(("device plugin", DAEMON_SETS, r"device-plugin|gpu-operator", "a device plugin",
                       "nobody offers the GPUs of a new node"))  # fmt: skip
    for name, kind, pattern, what, without in wanted:
        try:
            running = [item["metadata"]["name"] for item in cluster.objects(kind, everywhere=True)]
        except SiteError:
            yield Check(name, None, f"you may not see whether there is {what}")
            continue
        found = [item for item in running if re.search(pattern, item)]
        if found:
            yield Check(name, True, f"{found[0]} is there")
        else:
            yield Check(name, None, f"no {what.partition(' ')[2]} is seen; without one {without}",
                        "docs/deploy.md installs one; EKS Auto Mode and GKE have their own")  # fmt: skip


def _walls(cluster: Cluster) -> Iterator[Check]:
    """What a run does not need, and others do: nobody reaches Ray from outside, and no pod gets out of itself."""
    hint = "the owner of the namespace adds what k8s/base has for it; docs/deploy.md"
    try:
        policies = cluster.objects(NETWORK_POLICIES)
        if any("Ingress" in item["spec"].get("policyTypes", ["Ingress"]) for item in policies):
            yield Check("network", True, f"network policies say who reaches the pods of {cluster.namespace}")
        else:
            yield Check("network", None, f"every pod of the cluster reaches Ray in {cluster.namespace}", hint)
    except SiteError:
        yield Check("network", None, f"you may not see the network policies of {cluster.namespace}")
    try:
        labels = (cluster.get(NAMESPACES, cluster.namespace) or {}).get("metadata", {}).get("labels") or {}
    except SiteError:
        yield Check("pod security", None, f"you may not see the labels of {cluster.namespace}")
        return
    level = labels.get("pod-security.kubernetes.io/enforce", "privileged")
    if level == "privileged":
        yield Check("pod security", None, f"a pod in {cluster.namespace} may do anything to its node", hint)
    else:
        yield Check("pod security", True, f"pods in {cluster.namespace} are held to {level}")
