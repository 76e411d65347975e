"""A kubelet without processes: pods run at once, or suffer what a test has chosen for their role.

    kubelet = ScriptedKubelet(api)
    kubelet.play("worker", image_pull_failure())
    kubelet.set_job("RUNNING")

Ray jobs and submitters are scripted as well. For real processes see `processes.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.kube.cluster import Cluster
from tests.kube.errors import ApiError
from tests.kube.podstatus import (
    container_status,
    pod_status,
    role_of,
    running,
    terminated,
    unschedulable,
    waiting,
)
from tests.kube.quantities import GPU, alive, requests
from tests.kube.rayjob import TERMINAL, JobInfo
from tests.kube.scheduler import Node, schedule
from tests.kube.schema import Object

LARGE_NODES = (
    Node("cpu-0", cpu="64", memory="256Gi"),
    *(Node(f"gpu-{index}", cpu="96", memory="1024Gi", gpus=8, tainted=True) for index in range(4)),
)


@dataclass(frozen=True)
class Play:
    """What happens to a pod. Made by the functions below."""

    kind: str = "run"
    reason: str = ""
    message: str = ""
    event: str = ""
    event_message: str = ""
    exit_code: int = 0
    restarts: int = 0
    after: float = 0.0


def run(*, after: float = 0.0) -> Play:
    """Runs and is ready, after some seconds in ContainerCreating."""
    return Play(after=after)


def unschedulable_pod(message: str = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.") -> Play:
    """Stays Pending: no node can take it."""
    return Play("unschedulable", message=message)


def image_pull_failure(image: str = "registry.example/missing:1") -> Play:
    """Stays Pending: its image cannot be pulled."""
    message = f'Back-off pulling image "{image}"'
    failed = (
        f'Failed to pull image "{image}": rpc error: code = NotFound desc = failed to pull and unpack image: not found'
    )
    return Play("waiting", "ImagePullBackOff", message, "Failed", failed)


def creating(message: str = 'MountVolume.SetUp failed for volume "code" : configmap "code" not found') -> Play:
    """Stays Pending in ContainerCreating: a volume cannot be mounted."""
    return Play("waiting", "ContainerCreating", "", "FailedMount", message)


def config_error(message: str = 'secret "credentials" not found') -> Play:
    """Stays Pending: its environment cannot be made."""
    return Play("waiting", "CreateContainerConfigError", message, "Failed", f"Error: {message}")


def crash_loop(exit_code: int = 1, *, reason: str = "Error", restarts: int = 3) -> Play:
    """Ends again and again; `OOMKilled` with 137 is a reason too."""
    return Play("crash", reason, exit_code=exit_code, restarts=restarts)


def ended(exit_code: int, *, reason: str = "", message: str = "") -> Play:
    """Has ended for good."""
    return Play("ended", reason, message, exit_code=exit_code)


class ScriptedKubelet:
    """Runs pods on paper."""

    def __init__(self, cluster: Cluster, nodes: tuple[Node, ...] = LARGE_NODES) -> None:
        # Whether the submitter ends by itself once the Ray job has, and with which exit code.
        self.submitter_follows = True
        self.submitter_exit_codes = {"SUCCEEDED": 0, "FAILED": 0, "STOPPED": 0}
        self.dashboard_down = False
        self.stop_requests: list[str] = []
        self._cluster = cluster
        self._plays: dict[str, Play] = {}
        self._jobs: dict[str, JobInfo] = {}
        self._applied: dict[str, Play] = {}
        self._seen: dict[str, float] = {}
        for node in nodes:
            cluster.create("nodes", node.manifest())

    def play(self, role: str, play: Play) -> None:
        """Chooses what happens to the pods of a role (`head`, `worker`, `submitter`), or to the pod of that name."""
        self._plays[role] = play
        self._wake()

    def set_job(self, status: str, message: str = "", *, submission_id: str = "*") -> None:
        """Scripts what the dashboards say: of one job, or of any. Before the first call they know no job (404)."""
        now = int(time.time() * 1000)
        began = self._jobs[submission_id].start_time if submission_id in self._jobs else now
        self._jobs[submission_id] = JobInfo(status, message, began, now if status in TERMINAL else 0)
        self._wake()

    def forget_job(self) -> None:
        """The dashboards know no job any more, as after the head was replaced."""
        self._jobs.clear()

    def finish_submitter(self, exit_code: int) -> None:
        """Ends the present submitter pods, and any later one, with this exit code."""
        self.play("submitter", ended(exit_code))

    def ray_job(self, ray_cluster: Object, job_id: str) -> JobInfo | None:
        """What the script says of a job."""
        if self.dashboard_down or not ray_cluster:
            raise ConnectionRefusedError("the dashboard does not answer")
        return self._jobs.get(job_id, self._jobs.get("*"))

    def stop_ray_job(self, ray_cluster: Object, job_id: str) -> None:
        """Notes the wish; the script decides what comes of it."""
        if self.dashboard_down or not ray_cluster:
            raise ConnectionRefusedError("the dashboard does not answer")
        self.stop_requests.append(job_id)

    def step(self) -> None:
        """One look at every pod."""
        for pod in self._cluster.list("pods"):
            try:
                self._look(pod)
            except ApiError as error:
                if error.status != 404:
                    raise

    def close(self) -> None:
        """Nothing runs."""

    def gpus_in_use(self, label: str = "") -> int:
        """GPUs of the pods that are not over, of those with matching labels."""
        return gpus_in_use(self._cluster, label)

    def _look(self, pod: Object) -> None:
        metadata = pod["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        if "deletionTimestamp" in metadata:
            self._cluster.delete("pods", namespace, name, grace=0)
            self._cluster.forget_logs(namespace, name)
            return
        play = self._play_of(pod)
        if play.kind == "unschedulable":
            if self._applied.get(metadata["uid"]) != play:
                self._cluster.update_status("pods", namespace, name, unschedulable(pod, play.message), replace=True)
                text = play.message
                self._cluster.event(pod, "FailedScheduling", text, kind="Warning", component="default-scheduler")
                self._applied[metadata["uid"]] = play
            return
        if not pod["spec"].get("nodeName") and not schedule(self._cluster, pod):
            return
        began = self._seen.setdefault(metadata["uid"], time.monotonic())
        waits = time.monotonic() - began < play.after
        chosen = Play("waiting", "ContainerCreating", after=play.after) if waits else play
        if self._applied.get(metadata["uid"]) != chosen and alive(pod):
            self._apply(pod, chosen)
            self._applied[metadata["uid"]] = chosen

    def _play_of(self, pod: Object) -> Play:
        role = role_of(pod)
        chosen = self._plays.get(pod["metadata"]["name"]) or self._plays.get(role)
        if chosen is not None or role != "submitter" or not self.submitter_follows:
            return chosen or Play()
        job = self._jobs.get(_submission_id(pod), self._jobs.get("*"))
        if job is not None and job.status in TERMINAL:
            return ended(self.submitter_exit_codes[job.status])
        return Play()

    def _apply(self, pod: Object, play: Play) -> None:
        state, ready, restarts, last = running(), True, 0, None
        phase = "Running"
        if play.kind == "waiting":
            state, ready, phase = waiting(play.reason, play.message), False, "Pending"
        elif play.kind == "crash":
            name = f"{pod['metadata']['name']}_{pod['metadata']['namespace']}"
            back_off = f"back-off 40s restarting failed container={pod['spec']['containers'][0]['name']} pod={name}"
            state, ready, restarts = waiting("CrashLoopBackOff", back_off), False, play.restarts
            last = terminated(play.exit_code, play.reason)
            message = f"Back-off restarting failed container in pod {name}"
            self._cluster.event(pod, "BackOff", message, kind="Warning", component="kubelet")
        elif play.kind == "ended":
            state, ready = terminated(play.exit_code, play.reason, play.message), False
            phase = "Failed" if play.exit_code else "Succeeded"
        if play.event:
            self._cluster.event(pod, play.event, play.event_message, kind="Warning", component="kubelet")
        containers = [
            container_status(entry, state, ready=ready, restarts=restarts, last=last)
            for entry in pod["spec"]["containers"]
        ]
        done = terminated(0) if play.kind != "waiting" else waiting("PodInitializing")
        inits = [container_status(entry, done, ready=True) for entry in pod["spec"].get("initContainers") or []]
        status = pod_status(pod, phase, containers, inits)
        self._cluster.update_status("pods", pod["metadata"]["namespace"], pod["metadata"]["name"], status, replace=True)

    def _wake(self) -> None:
        with self._cluster.store.changed:
            self._cluster.store.changed.notify_all()


def gpus_in_use(cluster: Cluster, label: str = "") -> int:
    """GPUs requested by pods that exist and are not over."""
    return int(sum(requests(pod).get(GPU, 0) for pod in cluster.list("pods", labels=label) if alive(pod)))


def _submission_id(pod: Object) -> str:
    env = pod["spec"]["containers"][0].get("env") or []
    return next((str(entry.get("value")) for entry in env if entry["name"] == "RAY_JOB_SUBMISSION_ID"), "*")
