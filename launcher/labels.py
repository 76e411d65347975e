"""The labels and annotations by which a run's objects are known in a cluster."""

from __future__ import annotations

RUN_LABEL = "raylaunch.dev/run"
ROLE_LABEL = "raylaunch.dev/role"
"""`head`, `worker` or `submitter`, on pods."""
POOL_LABEL = "raylaunch.dev/pool"
POOL_MAPS = f"{POOL_LABEL},!{RUN_LABEL}"
"""Selects the ConfigMaps that describe pools; those of runs name their pool in the same label."""
STORAGE_NOTE = "raylaunch.dev/storage"
FINGERPRINT_NOTE = "raylaunch.dev/fingerprint"

NODE_TYPE_LABEL = "ray.io/node-type"
CLUSTER_LABEL = "ray.io/cluster"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
