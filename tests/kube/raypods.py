"""What KubeRay v1.7.0 makes of a RayCluster: its pods, its head service and its auth secret (`common/pod.go`).

Left out: autoscaling, GCS fault tolerance, TLS, multi-host groups.
"""

from __future__ import annotations

import secrets

from tests.kube.cluster import owner_reference
from tests.kube.quantities import amount
from tests.kube.schema import Object, duplicate

VERSION = "v1.7.0"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
_SHELL = ["/bin/bash", "-c", "--"]
_BOOLEAN_VALUES = ("log-color", "include-dashboard", "include-log-monitor")
_WAIT = """
SECONDS=0
while true; do
    if ray health-check --address {address} > /dev/null 2>&1; then echo "GCS is ready."; break; fi
    echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
    sleep 5
done
"""


def head_service_name(ray_cluster: Object) -> str:
    """The name of the service in front of the head."""
    custom = (ray_cluster["spec"]["headGroupSpec"].get("headService") or {}).get("metadata", {}).get("name")
    return str(custom or f"{ray_cluster['metadata']['name']}-head-svc")


def head_address(ray_cluster: Object) -> str:
    """The head service's name in the cluster's DNS."""
    return f"{head_service_name(ray_cluster)}.{ray_cluster['metadata']['namespace']}.svc.cluster.local"


def head_service(ray_cluster: Object, name: str, owner: Object) -> Object:
    """A headless service that selects the head pod."""
    cluster = ray_cluster["metadata"]["name"]
    selector = {
        "ray.io/cluster": cluster,
        "ray.io/node-type": "head",
        "ray.io/identifier": f"{cluster}-head"[-63:],
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    kind = ray_cluster["spec"]["headGroupSpec"].get("serviceType") or "ClusterIP"
    ports = [
        {"name": key, "port": port, "targetPort": port, "appProtocol": "tcp"} for key, port in sorted(PORTS.items())
    ]
    spec: Object = {"selector": selector, "ports": ports, "type": kind}
    if kind == "ClusterIP":
        spec |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    namespace = ray_cluster["metadata"]["namespace"]
    metadata = {"name": name, "namespace": namespace, "labels": selector, "ownerReferences": [owner_reference(owner)]}
    return {"metadata": metadata, "spec": spec}


def auth_secret_name(ray_cluster: Object) -> str:
    """Where the token is: the user's secret, or one named as the cluster. Empty without token authentication."""
    options = ray_cluster["spec"].get("authOptions") or {}
    if options.get("mode") != "token":
        return ""
    return str(options.get("secretName") or ray_cluster["metadata"]["name"][-50:])


def auth_secret(ray_cluster: Object) -> Object | None:
    """The secret the operator makes; none if there is no `authOptions` or the user brings one. Any mode makes one."""
    options = ray_cluster["spec"].get("authOptions")
    if options is None or options.get("mode") == "disabled" or options.get("secretName"):
        return None
    metadata = ray_cluster["metadata"]
    return {
        "metadata": {
            "name": metadata["name"][-50:],
            "namespace": metadata["namespace"],
            "labels": {"ray.io/cluster": metadata["name"]},
            "ownerReferences": [owner_reference(ray_cluster)],
        },
        "stringData": {"auth_token": secrets.token_urlsafe(32)},
    }


def add_auth(container: Object, secret: str) -> None:
    """The two variables that switch token authentication on, unless the user has set them."""
    if secret:
        reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
        _add_env(container, {"name": "RAY_AUTH_MODE", "value": "token"})
        _add_env(container, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference})


def head_pod(ray_cluster: Object) -> Object:
    """The head pod."""
    return _pod(ray_cluster, ray_cluster["spec"]["headGroupSpec"], "head", "headgroup", 0)


def worker_pod(ray_cluster: Object, group: Object, index: int) -> Object:
    """One worker pod of a group; `index` tells it from the others."""
    return _pod(ray_cluster, group, "worker", group["groupName"], index)


def _pod(ray_cluster: Object, group: Object, node_type: str, group_name: str, index: int) -> Object:
    template, cluster = duplicate(group["template"]), ray_cluster["metadata"]["name"]
    metadata, spec = template.get("metadata") or {}, template["spec"]
    fixed = {"ray.io/node-type": node_type, "ray.io/group": group_name, "ray.io/cluster": cluster}
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{cluster}-{node_type}"[-63:],
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **(metadata.get("labels") or {}),
        **fixed,
    }
    if node_type == "worker":
        labels["ray.io/worker-group-replica-index"] = str(index)
    prefix = cluster if node_type == "head" else f"{cluster}-{group_name}"
    container = spec["containers"][0]
    address = "127.0.0.1" if node_type == "head" else head_address(ray_cluster)
    params = _start_params(group, node_type, address, container)
    if node_type == "worker":
        spec.setdefault("initContainers", []).append(_wait_container(container, address))
    for entry in [container, *(spec.get("initContainers") or [])]:
        add_auth(entry, auth_secret_name(ray_cluster))
    _add_shared_memory(spec, container)
    start = f"ray start {'--head ' if node_type == 'head' else ''}{_flags(params)}"
    _set_command(container, metadata.get("annotations") or {}, start)
    _add_operator_env(container, node_type, address, start, ray_cluster)
    _add_probes(container, params)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{prefix[:50]}-{node_type}-".lower(),
            "namespace": ray_cluster["metadata"]["namespace"],
            "labels": labels,
            "annotations": {**(metadata.get("annotations") or {}), "ray.io/kuberay-version": VERSION},
            "ownerReferences": [owner_reference(ray_cluster)],
        },
        "spec": {
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "serviceAccountName": "default",
            **spec,
        },
    }


def _start_params(group: Object, node_type: str, address: str, container: Object) -> dict[str, str]:
    params = dict(group.get("rayStartParams") or {})
    resources = container.get("resources") or {}
    limits, wanted = resources.get("limits") or {}, resources.get("requests") or {}
    if node_type == "worker":
        params.setdefault("address", f"{address}:{PORTS['gcs-server']}")
    else:
        params.setdefault("dashboard-host", "0.0.0.0")
    params |= {"block": "true"}
    params.setdefault("metrics-export-port", str(PORTS["metrics"]))
    params.setdefault("dashboard-agent-listen-port", "52365")
    cpu = limits.get("cpu") or wanted.get("cpu")
    if cpu:
        params.setdefault("num-cpus", str(-(-amount(cpu) // 1)))
    if limits.get("memory"):
        params.setdefault("memory", str(int(amount(limits["memory"]))))
    if amount(limits.get("nvidia.com/gpu", 0)):
        params.setdefault("num-gpus", str(int(amount(limits["nvidia.com/gpu"]))))
    return params


def _flags(params: dict[str, str]) -> str:
    flags = []
    for name, value in sorted(params.items()):
        if value.lower() in ("true", "false") and name not in _BOOLEAN_VALUES:
            flags += [f"--{name}"] if value.lower() == "true" else []
        else:
            flags.append(f"--{name}={value}")
    return " ".join(flags)


def _wait_container(container: Object, address: str) -> Object:
    small = {"cpu": "200m", "memory": "256Mi"}
    target = f"{address}:{PORTS['gcs-server']}"
    return {
        "name": "wait-gcs-ready",
        "image": container.get("image", ""),
        "command": _SHELL,
        "args": [_WAIT.format(address=target)],
        "env": [*duplicate(container.get("env") or []), {"name": "FQ_RAY_IP", "value": address}],
        "volumeMounts": duplicate(container.get("volumeMounts") or []),
        "resources": {"limits": dict(small), "requests": dict(small)},
    }


def _add_shared_memory(spec: Object, container: Object) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        return
    mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
    resources = container.get("resources") or {}
    size = (resources.get("requests") or {}).get("memory") or (resources.get("limits") or {}).get("memory")
    memory = {"medium": "Memory"} | ({"sizeLimit": size} if size else {})
    spec.setdefault("volumes", []).append({"name": "shared-mem", "emptyDir": memory})


def _set_command(container: Object, annotations: dict[str, str], start: str) -> None:
    own = " ".join([*(container.get("command") or []), *(container.get("args") or [])])
    if annotations.get("ray.io/overwrite-container-cmd", "").lower() == "true" or "ray start" in own:
        return
    generated = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
    container |= {"command": list(_SHELL), "args": [f"{own} && {generated}" if own else generated]}


def _add_operator_env(container: Object, node_type: str, address: str, start: str, ray_cluster: Object) -> None:
    def field(name: str, path: str) -> Object:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    if node_type == "worker":
        _add_env(container, {"name": "FQ_RAY_IP", "value": address})
        _add_env(container, {"name": "RAY_IP", "value": address.partition(".")[0]})
    _add_env(container, field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"))
    _add_env(container, field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"))
    _add_env(container, field("RAY_CLOUD_INSTANCE_ID", "metadata.name"))
    _add_env(container, field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"))
    for name, value in (
        ("KUBERAY_GEN_RAY_START_CMD", start),
        ("RAY_PORT", str(PORTS["gcs-server"])),
        ("RAY_ADDRESS", f"{address}:{PORTS['gcs-server']}"),
        ("RAY_USAGE_STATS_KUBERAY_IN_USE", "1"),
        ("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1"),
    ):
        _add_env(container, {"name": name, "value": value})
    if node_type == "head":
        origin = ray_cluster["metadata"].get("labels", {}).get("ray.io/originated-from-crd", "RayCluster")
        _add_env(
            container,
            {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": f"kuberay_version={VERSION};kuberay_crd={origin}"},
        )


def _add_probes(container: Object, params: dict[str, str]) -> None:
    check = {"httpGet": {"path": "/api/healthz", "port": int(params["dashboard-agent-listen-port"])}}
    container.setdefault(
        "livenessProbe", {**check, "initialDelaySeconds": 30, "failureThreshold": 120, "periodSeconds": 5}
    )
    container.setdefault(
        "readinessProbe", {**check, "initialDelaySeconds": 10, "failureThreshold": 10, "periodSeconds": 5}
    )


def _add_env(container: Object, entry: Object) -> None:
    env = container.setdefault("env", [])
    if all(known["name"] != entry["name"] for known in env):
        env.append(entry)


def submitter_job(job: Object, status: Object, ray_cluster: Object) -> Object:
    """The batch Job that submits a RayJob, named as the RayJob."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    labels = {"ray.io/originated-from-cr-name": name, "ray.io/originated-from-crd": "RayJob"}
    labels["app.kubernetes.io/created-by"] = "kuberay-operator"
    template = duplicate(job["spec"].get("submitterPodTemplate")) or _stock_submitter(job, ray_cluster)
    container = template["spec"]["containers"][0]
    container.setdefault("command", ["/bin/bash", "-ce", "--"])
    container["env"] = [
        *(container.get("env") or []),
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "RAY_DASHBOARD_ADDRESS", "value": status["dashboardURL"]},
        {"name": "RAY_JOB_SUBMISSION_ID", "value": status["jobId"]},
    ]
    add_auth(container, auth_secret_name(ray_cluster))
    template.setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    limit = (job["spec"].get("submitterConfig") or {}).get("backoffLimit", 2)
    metadata = {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": [owner_reference(job)]}
    return {"metadata": metadata, "spec": {"backoffLimit": limit, "template": template}}


def _stock_submitter(job: Object, ray_cluster: Object) -> Object:
    image = ray_cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].get("image", "")
    command = f"ray job submit --address http://$RAY_DASHBOARD_ADDRESS -- {job['spec'].get('entrypoint', '')} ;"
    resources = {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "200Mi"}}
    container = {"name": "ray-job-submitter", "image": image, "args": [command], "resources": resources}
    return {"spec": {"restartPolicy": "Never", "containers": [container]}}
