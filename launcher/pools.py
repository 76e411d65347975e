"""What a site offers to run on. `local`, this machine, is built in; nothing here starts anything."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import NotFoundError


@dataclass(frozen=True)
class Pool:
    """A named place with CPUs and GPUs.

    `memory` is in bytes. `gpu_type` is the vendor's name of the first GPU, and `bf16` whether it computes bfloat16.
    """

    name: str
    cpus: int
    memory: int
    gpus: int = 0
    gpu_type: str = ""
    bf16: bool = False


def find_pool(name: str) -> Pool:
    """The pool of that name, or `NotFoundError` that lists those there are."""
    if name == "local":
        return this_machine()
    raise NotFoundError(f"there is no pool {name}", where="--cluster",
                        hint="the pools are: local (this machine, also without --cluster)")  # fmt: skip


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
