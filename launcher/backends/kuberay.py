"""Runs on a Kubernetes cluster, each as a KubeRay RayJob. All it knows is in the cluster and the run directory.

Nothing is kept on this machine: any other with a kubeconfig can take over at any moment, also between two requests.
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from launcher.backends import runs_of, stored_logs
from launcher.cluster import CONFIG_MAPS, RAY_JOBS, Cluster, ConflictError, Object
from launcher.diagnose import Scene, Verdict, diagnose
from launcher.errors import InfrastructureError, LaunchError, NotFinishedError, SiteError, UserError, printable
from launcher.labels import RUN_LABEL, STORAGE_NOTE
from launcher.manifest import Submission
from launcher.pools import Pool
from launcher.runs import Run, State, Status
from launcher.scene import Watcher, crashed, look

GONE_SECONDS = 60.0
"""How long an old RayJob may take to go."""
NEW_SECONDS = 60.0
"""A submission younger than this may be between the client's first request and its last."""
STALE_SECONDS = 10.0
"""How old a verdict on an unchanged scene may become: some sentences say for how long."""
ENDED = ("Complete", "Failed", "ValidationFailed")


class KubeRayBackend:
    """See `Backend`."""

    def __init__(self, pool: Pool, cluster: Cluster) -> None:
        self.pool = pool
        self.cluster = cluster
        self._watchers: dict[str, Watcher | None] = {}
        # Watches have threads of their own, which must not outlive whoever asked for them.
        weakref.finalize(self, _close, self._watchers)
        self._verdicts: dict[str, tuple[Any, Verdict]] = {}
        self._last_words: dict[tuple[str, int], str] = {}

    # -- submitting

    def submit(self, run: Run) -> None:
        self._clear_the_way(run)
        order = Submission(run.spec(), self.pool, run.plan(), run.uri, secrets.token_hex(4), spent=run.spent())
        # What is left of a cost is less each time, and the driver of a sweep must know when the cluster ends it.
        plan = order.plan | {"layout": order.layout.to_json()}
        order = replace(order, plan=plan)
        job = order.ray_job()
        # Says what the operator's schema, the quota and the policies of the namespace make of it, before anything is.
        self._create(job, order, dry_run=True)
        run.clear_cancel()
        run.write_json("plan.json", plan)
        run.update(status=Status.PENDING, reason="", hint="", error=None, ended=None, submitted=time.time())
        self.cluster.create(CONFIG_MAPS, order.config_map())
        try:
            made = self._create(job, order)
        except InfrastructureError:
            raise  # it may have been made: what it reads must stay
        except LaunchError:
            self.cluster.delete(CONFIG_MAPS, order.config_name)
            raise
        owner = {
            "apiVersion": "ray.io/v1", "kind": "RayJob", "name": run.name, "uid": made["metadata"]["uid"],
            "blockOwnerDeletion": False,
        }  # fmt: skip
        self.cluster.patch(CONFIG_MAPS, order.config_name, {"metadata": {"ownerReferences": [owner]}})
        if watcher := self._watchers.pop(run.name, None):
            watcher.close()

    def _create(self, job: Object, order: Submission, *, dry_run: bool = False) -> Object:
        name = job["metadata"]["name"]
        try:
            return self.cluster.create(RAY_JOBS, job, dry_run=dry_run)
        except ConflictError as error:
            if "already exists" in error.what:
                raise self._taken(name) from error
            raise SiteError(error.what, where=error.where, hint="try again") from error
        except InfrastructureError:
            # The answer was lost, which does not say that the request was.
            made = self.cluster.get(RAY_JOBS, name)
            if made is not None and order.config_name in str(made["spec"].get("submitterPodTemplate")):
                return made
            raise

    def _clear_the_way(self, run: Run) -> None:
        """Removes the RayJob of an earlier submission of the run, which must have ended."""
        old = self.cluster.get(RAY_JOBS, run.name)
        if old is None:
            return
        storage = _storage_of(old)
        if storage != run.storage:
            raise UserError(f"the cluster has a RayJob {run.name} that is not of this run (it is of {storage})",
                            where=self.cluster.where, hint="another --name")  # fmt: skip
        ended = (old.get("status") or {}).get("jobDeploymentStatus") in ENDED
        if not ended and not old["metadata"].get("deletionTimestamp"):
            raise self._taken(run.name)
        self._remove(old)

    def _job_of(self, run: Run) -> Object | None:
        """The RayJob of this run; one of another run with its name is none."""
        job = self.cluster.get(RAY_JOBS, run.name)
        return job if job is not None and _storage_of(job) == run.storage else None

    def _taken(self, name: str) -> UserError:
        return UserError(f"{name} is running already", where=self.cluster.where, hint=f"launch attach {name}")

    def _remove(self, job: Object) -> None:
        """Deletes the RayJob and waits until it has gone, and with it the right to its pods."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        self.cluster.delete(RAY_JOBS, name, uid=uid)
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.cluster.get(RAY_JOBS, name)) is not None and left["metadata"]["uid"] == uid:
            if time.monotonic() > deadline:
                raise SiteError(
                    f"the RayJob {name} does not go away", where=self.cluster.where,
                    hint=f"the KubeRay operator removes its finalizer: kubectl describe rayjob {name}",
                )  # fmt: skip
            time.sleep(0.5)

    # -- looking

    def status(self, run: Run) -> State:
        state = run.state()
        if state.status.final:
            return state
        scene = self._scene(run.name)
        verdict = self._with_last_words(scene, self._diagnosed(run.name, scene))
        if verdict.status.final:
            # What the run recorded itself is the better word, and it came before its cluster went.
            recorded = run.state()
            return recorded if recorded.status.final else self._settle(run, recorded, verdict)
        return _joined(run, state, verdict)

    def _scene(self, name: str) -> Scene:
        """The first look asks; whoever looks again is watching."""
        if name not in self._watchers:
            self._watchers[name] = None
            return look(self.cluster, name)
        watcher = self._watchers[name]
        if watcher is None:
            watcher = self._watchers[name] = Watcher(self.cluster, name)
        return watcher.scene()

    def _diagnosed(self, name: str, scene: Scene) -> Verdict:
        """The verdict on a scene; one that has not changed is not judged again at every look.

        Each waiting pod is compared with each node: measured, 2.6 s for 64 pods and 1,040 nodes.
        """
        seen = [scene.rayjob, scene.raycluster, scene.workload, *scene.pods, *scene.events, *(scene.nodes or ())]
        now = time.time()
        key = (now // STALE_SECONDS, *((item or {}).get("metadata", {}).get("resourceVersion") for item in seen))
        if self._verdicts.get(name, (None,))[0] != key:
            self._verdicts[name] = (key, diagnose(scene, now))
        return self._verdicts[name][1]

    def _with_last_words(self, scene: Scene, verdict: Verdict) -> Verdict:
        """The verdict with what a crashing container said last; asked once for each of its deaths."""
        for pod, status in crashed(scene):
            key = (pod["metadata"]["uid"], int(status.get("restartCount") or 0))
            if key not in self._last_words:
                try:
                    log = self.cluster.pod_log(pod["metadata"]["name"], status["name"], previous=True)
                except LaunchError:  # a reason without it is better than none
                    continue
                lines = [line.strip() for line in log.splitlines() if line.strip()]
                self._last_words[key] = printable(lines[-1])[:200] if lines else ""
            said = self._last_words[key]
            if said and verdict.reason and "crash" in verdict.reason:
                return replace(verdict, reason=f"{verdict.reason}: {said}")
        return verdict

    def _settle(self, run: Run, state: State, verdict: Verdict) -> State:
        """Records an end that the cluster knows and the run could not write down."""
        young = time.time() - max(state.submitted, state.created) < NEW_SECONDS
        if verdict.status is Status.INTERRUPTED and (young or run.owner() is not None):
            return state
        status, reason, error = verdict.status, verdict.reason, verdict.error
        if status is Status.SUCCEEDED:
            status, reason = Status.INTERRUPTED, "its Ray job ended without a record of how"
        if run.cancel_requested():
            status, error = Status.CANCELLED, None
        ended = replace(
            state, status=status, reason=reason, hint="", ended=time.time(),
            error=error.to_record() if error and status is Status.FAILED else None,
        )  # fmt: skip
        run.set_state(ended)
        return ended

    def logs(self, run: Run, only: str = "") -> Iterator[tuple[str, str]]:
        return stored_logs(run, lambda: self.status(run).status.final, only)

    def list(self, storage: str) -> Iterator[tuple[Run, State]]:
        jobs = {item["metadata"]["name"]: item for item in self.cluster.objects(RAY_JOBS, labels=RUN_LABEL)}
        for run in runs_of(self.pool.name, storage):
            try:
                state = run.state()
                if not state.status.final:
                    verdict = diagnose(Scene(rayjob=jobs.get(run.name)), time.time())
                    state = self.status(run) if verdict.status.final else _joined(run, state, verdict)
                yield run, state
            except SiteError as error:
                yield run, State(Status.INTERRUPTED, reason=str(error))

    # -- ending

    def cancel(self, run: Run, *, force: bool = False) -> None:
        job = self._job_of(run)
        final = run.state().status.final
        if not final:
            run.request_cancel(force=force)
            if run.owner() is not None and not force:
                return  # the driver saves, records the end, and KubeRay takes the pods
        if job is not None:
            self._remove(job)
        if not final:
            run.release()  # whoever held it is gone with its pod
            reason = "it was killed" if force else "it was cancelled before it trained"
            run.update(status=Status.CANCELLED, reason=reason, hint="", error=None, ended=time.time())
        run.clear_cancel()

    def delete(self, run: Run) -> None:
        if not self.status(run).status.final:
            raise NotFinishedError(f"{run.name} is still running", where=run.uri, hint=f"launch cancel {run.name}")
        if job := self._job_of(run):
            self._remove(job)
        run.delete()


def _storage_of(job: Object) -> str | None:
    return (job["metadata"].get("annotations") or {}).get(STORAGE_NOTE)


def _close(watchers: dict[str, Watcher | None]) -> None:
    for watcher in watchers.values():
        if watcher is not None:
            watcher.close()


def _joined(run: Run, state: State, verdict: Verdict) -> State:
    """Where a run stands that has not ended: the cluster knows until the driver speaks, then the driver does."""
    status, reason, hint = verdict.status, verdict.reason, verdict.hint
    if verdict.status is Status.RUNNING:
        status, reason, hint = state.status, state.reason, state.hint
        if status in (Status.PENDING, Status.QUEUED):
            status, reason = Status.STARTING, "the driver starts"
        elif run.owner() is None:
            status, reason = Status.RECOVERING, state.reason or "the driver was lost; it is started again"
    if run.cancel_requested():
        status = Status.CANCELLING
    return replace(state, status=status, reason=reason, hint=hint)
