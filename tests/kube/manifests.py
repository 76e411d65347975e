"""Small manifests for tests of the emulation itself."""

from __future__ import annotations

from typing import Any

from tests.kube.schema import Object

QUEUE = {"kueue.x-k8s.io/queue-name": "gpu-queue"}


def rayjob(name: str, *, labels: dict[str, str] | None = None, gpus: int = 1, workers: int = 2, **spec: Any) -> Object:
    """A RayJob as a launcher submits it: own submitter, token authentication, GPU workers, a TTL of a minute."""
    submitter = _container(
        "ray-job-submitter", command=["python", "/code/submit.py"], env=[{"name": "CODE", "value": "/code"}]
    )
    submitter["volumeMounts"] = [{"name": "code", "mountPath": "/code"}]
    code = [{"name": "code", "configMap": {"name": "code"}}]
    head = _container("ray-head", resources={"limits": {"cpu": "1", "memory": "2Gi"}})
    limits = {"cpu": "1", "memory": "2Gi", "nvidia.com/gpu": str(gpus)}
    worker = _container("ray-worker", resources={"limits": limits})
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    group = {
        "groupName": "gpu",
        "replicas": workers,
        "minReplicas": workers,
        "maxReplicas": workers,
        "rayStartParams": {},
        "template": {"spec": {"containers": [worker], "tolerations": tolerations}},
    }
    head_group = {
        "rayStartParams": {"num-cpus": "0"},
        "template": {"spec": {"restartPolicy": "Never", "containers": [head]}},
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            "submissionMode": "K8sJobMode",
            "jobId": name,
            "entrypoint": "python -c pass",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "submitterConfig": {"backoffLimit": 2},
            "submitterPodTemplate": {"spec": {"restartPolicy": "Never", "containers": [submitter], "volumes": code}},
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "authOptions": {"mode": "token"},
                "headGroupSpec": head_group,
                "workerGroupSpecs": [group],
            },
            **spec,
        },
    }


def _container(name: str, **fields: Any) -> Object:
    return {"name": name, "image": "registry.example/trainer:1", **fields}
