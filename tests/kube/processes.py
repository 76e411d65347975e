"""A kubelet with real processes: `ray start` for heads and workers, the submitter's own command, all on this machine.

    kubelet = ProcessKubelet(api, nodes=[Node("cpu-0", cpu="4"), Node("gpu-0", cpu="4", gpus=2, tainted=True)])

Each container is a process tree under `shim.py`, with a clean environment, in the pod's own folder. Nothing isolates
it: resources are booked, not enforced, and every pod has the address 127.0.0.1. The head service of a RayCluster keeps
its two local ports over all head pods. One Ray node starts at a time; several at once run into each other's timeouts.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.kube.cluster import Cluster
from tests.kube.container import Container
from tests.kube.dashboard import Dashboard
from tests.kube.errors import ApiError
from tests.kube.kubelet import gpus_in_use
from tests.kube.podfiles import NotReady, Translation, environment, make_volumes
from tests.kube.podstatus import container_status, pod_status, role_of, running, terminated, waiting
from tests.kube.rayjob import JobInfo
from tests.kube.raynode import HeadPorts, answers, local_addresses, ray_command
from tests.kube.scheduler import Node, schedule
from tests.kube.schema import Object

START_TIMEOUT = 120.0
# A raylet that outlives its head asks once a second, not every ten, whether the new head still knows it: with this
# worker containers restart and join a new head seconds after it is up, without it after most of a minute.
RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_liveness_self_check_interval_ms": "1000"}


class PodRun:
    """One pod on this machine."""

    def __init__(self, pod: Object, folder: Path) -> None:
        self.uid: str = pod["metadata"]["uid"]
        self.namespace: str = pod["metadata"]["namespace"]
        self.name: str = pod["metadata"]["name"]
        self.role = role_of(pod)
        self.folder = folder
        self.containers: list[Container] = []
        self.waits_for_head = self.role == "worker"
        self.problem: NotReady | None = None
        self.retry_at = 0.0
        self.kill_at: float | None = None


class ProcessKubelet:
    """Runs pods as processes of this machine."""

    def __init__(
        self,
        cluster: Cluster,
        nodes: Sequence[Node],
        *,
        env: dict[str, str] | None = None,
        restart_delay: float = 1.0,
    ) -> None:
        """`env`: for every container, under its own. `restart_delay`: pause before a container's second restart."""
        # AF_UNIX paths are short, and Ray puts sockets far below its folder.
        self.folder = Path(tempfile.mkdtemp(prefix="kl-", dir="/tmp"))
        self._cluster = cluster
        self._env = {**RAY_ENV, **(env or {})}
        self._restart_delay = restart_delay
        self._runs: dict[str, PodRun] = {}
        self._ports: dict[tuple[str, str], HeadPorts] = {}
        # Controllers and kubelet ask for them, each in a thread of its own.
        self._ports_lock = threading.Lock()
        self._starting = ""
        self._dashboard = Dashboard(cluster)
        for node in nodes:
            cluster.create("nodes", node.manifest())

    def ray_job(self, ray_cluster: Object, job_id: str) -> JobInfo | None:
        """What the real dashboard says of a job."""
        return self._dashboard.job(ray_cluster, self._head_ports(ray_cluster), job_id)

    def stop_ray_job(self, ray_cluster: Object, job_id: str) -> None:
        """Asks the real dashboard to stop a job."""
        self._dashboard.stop(ray_cluster, self._head_ports(ray_cluster), job_id)

    def step(self) -> None:
        """One look at every pod."""
        pods = self._cluster.list("pods")
        self._register_services(pods)
        for uid in set(self._runs) - {pod["metadata"]["uid"] for pod in pods}:
            self._forget(self._runs[uid])
        for pod in pods:
            try:
                self._look(pod)
            except ApiError as error:
                if error.status != 404:
                    raise

    def close(self) -> None:
        """Kills every process and removes every file."""
        runs = list(self._runs.values())
        for container in [container for run in runs for container in run.containers]:
            container.kill()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for run in runs:
                stack.callback(self._forget, run)

    def gpus_in_use(self, label: str = "") -> int:
        """GPUs of the pods that are not over, of those with matching labels."""
        return gpus_in_use(self._cluster, label)

    def processes(self, pod: str) -> list[psutil.Process]:
        """The processes of a pod's containers, each container's main process first."""
        return [process for container in self._run(pod).containers for process in container.processes()]

    def kill(self, pod: str, number: int, *, match: str = "") -> int:
        """Sends a signal to the main process of a pod's first container, or to all whose command line contains `match`.

        SIGKILL without `match` ends the whole container, as an out-of-memory kill does. Returns how many were hit.
        """
        container = self._run(pod).containers[0]
        if number == 9 and not match:
            container.kill()
            return 1
        found = [one for one in container.processes() if match in " ".join(_command_line(one))]
        hit = 0
        for process in found if match else found[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                hit += 1
        return hit

    def lose_node(self, name: str) -> None:
        """A machine is gone (a spot instance reclaimed): its processes die, its pods and its Node object vanish."""
        for pod in self._cluster.list("pods"):
            if pod["spec"].get("nodeName") == name:
                run = self._runs.get(pod["metadata"]["uid"])
                for container in run.containers if run else []:
                    container.kill()
        self._cluster.delete("nodes", None, name)
        for pod in self._cluster.list("pods"):
            if pod["spec"].get("nodeName") == name:
                self._cluster.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"], grace=0)

    def add_node(self, node: Node) -> None:
        """A machine joins."""
        self._cluster.create("nodes", node.manifest())

    def _run(self, pod: str) -> PodRun:
        return next(run for run in list(self._runs.values()) if run.name == pod)

    def _look(self, pod: Object) -> None:
        run = self._runs.get(pod["metadata"]["uid"])
        if "deletionTimestamp" in pod["metadata"]:
            return self._end(pod, run)
        if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return None
        if not pod["spec"].get("nodeName"):
            schedule(self._cluster, pod)
            return None
        if run is None:
            folder = self.folder / pod["metadata"]["uid"][:8]
            folder.mkdir()
            run = self._runs[pod["metadata"]["uid"]] = PodRun(pod, folder)
        if not run.containers:
            self._prepare(pod, run)
        for container in run.containers:
            container.look(pod["spec"].get("restartPolicy", "Always"), self._restart_delay)
        if self._starting == run.uid and run.containers and not run.containers[0].starting(START_TIMEOUT):
            self._starting = ""
        return self._write_status(pod, run)

    def _prepare(self, pod: Object, run: PodRun) -> None:
        """Starts a pod's containers once everything they need is there."""
        ray_node = run.role in ("head", "worker")
        if time.monotonic() < run.retry_at or (ray_node and self._starting not in ("", run.uid)):
            return
        ports = self._ports_of(pod)
        if run.waits_for_head and ports is not None:
            if not answers(ports.gcs):
                run.retry_at = time.monotonic() + 0.3
                return
            run.waits_for_head = False
        try:
            volumes = make_volumes(self._cluster, pod, run.folder, self.folder)
            addresses = local_addresses(self._cluster, self._ports)
            for spec in pod["spec"]["containers"]:
                first = ray_node and spec is pod["spec"]["containers"][0]
                container = self._container(
                    pod, run, spec, Translation(spec, volumes, addresses), ports if first else None
                )
                run.containers.append(container)
        except NotReady as error:
            run.containers.clear()
            run.problem, run.retry_at = error, time.monotonic() + 1
            kind, text = (
                ("FailedMount", str(error)) if error.reason == "ContainerCreating" else ("Failed", f"Error: {error}")
            )
            self._cluster.event(pod, kind, text, kind="Warning", component="kubelet")
            return
        run.problem = None
        self._starting = run.uid if ray_node else self._starting
        for container in run.containers:
            container.start()
        if ray_node and ports is not None:
            self._cluster.pod_ports[run.namespace, run.name] = ports.pod_ports() if run.role == "head" else {}

    def _container(
        self, pod: Object, run: PodRun, spec: Object, translate: Translation, ports: HeadPorts | None
    ) -> Container:
        declared = environment(self._cluster, pod, spec)
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(run.folder),
            "LANG": "C.UTF-8",
            "HOSTNAME": run.name,
            **self._env,
            **{name: translate(value) for name, value in declared.items()},
        }
        words = [translate(word) for word in [*(spec.get("command") or []), *(spec.get("args") or [])]]
        probe = None
        if ports is not None:
            words, probe = ray_command(words, run.role, ports, self.folder)
            env["RAY_ADDRESS"] = f"127.0.0.1:{ports.gcs}"
        elif words and words[0] in ("python", "python3"):
            words[0] = sys.executable
        text = "Ray runtime started" if probe else ""
        return Container(self._cluster, run.namespace, run.name, spec, words, env, run.folder, probe, text)

    def _end(self, pod: Object, run: PodRun | None) -> None:
        """A deleted pod: SIGTERM, after the grace period SIGKILL, and when all is over the object goes."""
        if run is not None and run.containers:
            if run.kill_at is None:
                run.kill_at = time.monotonic() + float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
                for container in run.containers:
                    container.terminate()
            elif time.monotonic() >= run.kill_at:
                for container in run.containers:
                    container.kill()
            if any(container.alive() for container in run.containers):
                return
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        if run is not None:
            self._forget(run)
        self._cluster.delete("pods", namespace, name, grace=0)

    def _forget(self, run: PodRun) -> None:
        for container in run.containers:
            container.close()
        self._runs.pop(run.uid, None)
        if self._starting == run.uid:
            self._starting = ""
        self._cluster.pod_ports.pop((run.namespace, run.name), None)
        self._cluster.forget_logs(run.namespace, run.name)
        shutil.rmtree(run.folder, ignore_errors=True)

    def _write_status(self, pod: Object, run: PodRun) -> None:
        inits = pod["spec"].get("initContainers") or []
        if run.containers:
            statuses = [container.status() for container in run.containers]
            early = [container_status(spec, _done(pod, spec), ready=True) for spec in inits]
        else:
            reason = run.problem.reason if run.problem else "PodInitializing" if inits else "ContainerCreating"
            message = str(run.problem) if run.problem and reason != "ContainerCreating" else ""
            statuses = [container_status(spec, waiting(reason, message)) for spec in pod["spec"]["containers"]]
            early = [container_status(spec, _present(pod, spec, running())) for spec in inits]
        phase = _phase(run.containers, pod["spec"].get("restartPolicy", "Always"))
        status = pod_status(pod, phase, statuses, early)
        if status != pod.get("status"):
            self._cluster.update_status("pods", run.namespace, run.name, status, replace=True)

    def _ports_of(self, pod: Object) -> HeadPorts | None:
        name = (pod["metadata"].get("labels") or {}).get("ray.io/cluster")
        if name is None:
            return None
        return self._ports_at(pod["metadata"]["namespace"], name)

    def _head_ports(self, ray_cluster: Object) -> HeadPorts:
        return self._ports_at(ray_cluster["metadata"]["namespace"], ray_cluster["metadata"]["name"])

    def _ports_at(self, namespace: str, ray_cluster: str) -> HeadPorts:
        # No `setdefault`: it would make new ports, and use them up, at every look at a cluster that has its own.
        with self._ports_lock:
            if (namespace, ray_cluster) not in self._ports:
                self._ports[namespace, ray_cluster] = HeadPorts()
            return self._ports[namespace, ray_cluster]

    def _register_services(self, pods: list[Object]) -> None:
        """Services lead to the head that their selector names, as long as there is a head pod."""
        heads = {(run.namespace, run.name) for run in self._runs.values() if run.role == "head"}
        led = {
            (pod["metadata"]["namespace"], pod["metadata"]["labels"]["ray.io/cluster"])
            for pod in pods
            if (pod["metadata"]["namespace"], pod["metadata"]["name"]) in heads
        }
        for service in self._cluster.list("services"):
            key = (service["metadata"]["namespace"], service["metadata"]["name"])
            target = (key[0], (service["spec"].get("selector") or {}).get("ray.io/cluster"))
            if target in led:
                self._cluster.service_backends[key] = self._ports_at(*target).backends()
            else:
                self._cluster.service_backends.pop(key, None)


def _phase(containers: list[Container], policy: str) -> str:
    if not containers:
        return "Pending"
    if any(container.alive() or container.will_restart(policy) for container in containers):
        return "Running"
    return "Failed" if any(container.exit_code for container in containers) else "Succeeded"


def _present(pod: Object, spec: Object, fresh: Object) -> Object:
    """The state an init container already has, if it is of the same kind: its times must not move."""
    known = pod.get("status", {}).get("initContainerStatuses") or []
    old: Object = next((entry["state"] for entry in known if entry["name"] == spec["name"]), {})
    return old if old.keys() == fresh.keys() else fresh


def _done(pod: Object, spec: Object) -> Object:
    return _present(pod, spec, terminated(0))


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []
