"""The controllers of the emulated cluster: KubeRay, batch Jobs, garbage collection, optionally Kueue, and the kubelet.

    with ApiServer() as api, Controllers(api, ScriptedKubelet(api), speed=20) as controllers:

One thread looks at everything after every change and at least ten times a second. `speed` shortens every timer (TTLs,
deadlines, back-offs, grace periods). `paused` is an operator that is down: RayJobs and RayClusters stand still, the
rest goes on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from tests.kube.batchjob import JobController
from tests.kube.clock import Clock
from tests.kube.cluster import Cluster, Objects
from tests.kube.errors import ApiError
from tests.kube.evidence import describe
from tests.kube.kueue import Kueue
from tests.kube.patience import WATCHED
from tests.kube.raycluster import RayClusterController
from tests.kube.rayjob import Dashboards, RayJobController
from tests.kube.schema import Object
from tests.kube.store import Key

INTERVAL = 0.1
# No step waits for anything this long; one that takes longer waits for what will never come.
LONGEST_STEP = 120.0


class Kubelet(Dashboards, Protocol):
    """What runs the pods, and knows the dashboards in them."""

    def step(self) -> None:
        """Schedules, starts, watches and ends pods; never waits for long."""

    def close(self) -> None:
        """Ends everything it has started."""


class Loop:
    """A thread that takes steps: after every change of the cluster, and at least every tenth of a second."""

    def __init__(self, cluster: Cluster, step: Callable[[], None], name: str) -> None:
        self.error: Exception | None = None
        self._cluster = cluster
        self._step = step
        self._began: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the present step."""
        self._over.set()
        self._thread.join(LONGEST_STEP)
        if self._thread.is_alive() and self.error is None:
            self.error = RuntimeError(f"the emulation hangs: {self.evidence()}")

    def check(self) -> None:
        """Raises if the thread has died, or hangs in a step."""
        if self.error is not None:
            raise AssertionError(f"the emulation has failed: {self.evidence()}") from self.error
        if self._step_lasts() > LONGEST_STEP:
            raise AssertionError(f"the emulation hangs: {self.evidence()}")

    def evidence(self) -> str:
        """What the thread does."""
        if self.error is not None:
            return f"thread {self._thread.name} has died:\n" + "".join(traceback.format_exception(self.error))
        stack = "".join(traceback.format_stack(sys._current_frames().get(self._thread.ident or 0)))
        where = "between two steps" if self._began is None else f"{self._step_lasts():.1f} s into a step"
        return f"thread {self._thread.name} is {where}:\n{stack}"

    def _step_lasts(self) -> float:
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self) -> None:
        while not self._over.is_set():
            seen = self._cluster.store.version
            self._began = time.monotonic()
            try:
                self._step()
            except Exception as error:  # raised by the test's next wait, or by the end of the `with` block
                self.error = error
                return
            finally:
                self._began = None
            with self._cluster.store.changed:
                if self._cluster.store.version == seen:
                    self._cluster.store.changed.wait(INTERVAL)
            self._over.wait(0.005)


class Controllers:
    """All controllers of a cluster, and its kubelet."""

    def __init__(self, cluster: Cluster, kubelet: Kubelet, *, speed: float = 1.0) -> None:
        self.paused = False
        self.kueue: Kueue | None = None
        self.clock = Clock(speed)
        self.kubelet = kubelet
        self._cluster = cluster
        self._rayjobs = RayJobController(cluster, kubelet, self.clock)
        self._rayclusters = RayClusterController(cluster, self.clock)
        self._jobs = JobController(cluster, self.clock)
        self._loops = [Loop(cluster, self._step, "controllers"), Loop(cluster, kubelet.step, "kubelet")]

    def __enter__(self) -> Self:
        for loop in self._loops:
            loop.start()
        WATCHED.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        WATCHED.remove(self)
        for loop in self._loops:
            loop.stop()
        failures = [loop.error for loop in self._loops if loop.error is not None]
        try:
            self.kubelet.close()
        except Exception as problem:
            failures.append(problem)
        for failure in failures:
            if error is None:
                raise failure
            error.add_note("The emulation itself had failed:\n" + "".join(traceback.format_exception(failure)))

    def check(self) -> None:
        """Raises if a thread of the emulation no longer works."""
        for loop in self._loops:
            loop.check()

    def evidence(self) -> str:
        """The cluster, and what the emulation's threads do."""
        return "\n".join([describe(self._cluster), *(loop.evidence() for loop in self._loops)])

    def enable_kueue(self, quota_gpus: int, *, namespace: str = "default", queue: str = "gpu-queue") -> Kueue:
        """Installs Kueue with one queue. RayJobs created afterwards with its label wait for quota."""
        self.kueue = Kueue(self._cluster, quota_gpus, namespace=namespace, queue=queue)
        return self.kueue

    def _step(self) -> None:
        if self.kueue is not None:
            self.kueue.step()
        if not self.paused:
            self._each("rayjobs", self._rayjobs.reconcile)
            self._each("rayclusters", self._rayclusters.reconcile)
        self._each("jobs", self._jobs.reconcile)
        self._collect_garbage()

    def _each(self, plural: str, reconcile: Callable[[Object], None]) -> None:
        """Looks at every object of a kind; one that vanishes meanwhile is no error."""
        for thing in self._cluster.list(plural):
            try:
                reconcile(thing)
            except ApiError as error:
                if error.status not in (404, 409):
                    raise

    def _collect_garbage(self) -> None:
        """What has lost all its owners goes; deletions in the foreground or with orphans are completed."""
        things = self._cluster.store.everything()
        present = {thing["metadata"]["uid"] for _, thing in things}
        for key, thing in things:
            metadata = thing["metadata"]
            owners = metadata.get("ownerReferences") or []
            if owners and "deletionTimestamp" not in metadata and not any(owner["uid"] in present for owner in owners):
                self._cluster.delete(_plural(key), key.namespace, key.name)
            for finalizer in ("foregroundDeletion", "orphan"):
                if "deletionTimestamp" in metadata and finalizer in (metadata.get("finalizers") or []):
                    self._finalize(key, thing, finalizer)

    def _finalize(self, key: Key, thing: Object, finalizer: str) -> None:
        uid = thing["metadata"]["uid"]
        dependents = [
            (other_key, other)
            for other_key, other in self._cluster.store.everything()
            if any(owner["uid"] == uid for owner in other["metadata"].get("ownerReferences") or [])
        ]
        for other_key, other in dependents:
            if finalizer == "orphan":
                kept: Objects = [owner for owner in other["metadata"]["ownerReferences"] if owner["uid"] != uid]
                changes = {"metadata": {"ownerReferences": kept}}
                self._cluster.patch(_plural(other_key), other_key.namespace, other_key.name, changes)
            elif "deletionTimestamp" not in other["metadata"]:
                self._cluster.delete(_plural(other_key), other_key.namespace, other_key.name)
        if finalizer == "orphan" or not dependents:
            left = [name for name in thing["metadata"]["finalizers"] if name != finalizer]
            with contextlib.suppress(ApiError):
                self._cluster.patch(_plural(key), key.namespace, key.name, {"metadata": {"finalizers": left}})


def _plural(key: Key) -> str:
    return key.plural
