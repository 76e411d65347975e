"""Where a run on a cluster stands, and why it does not run, in one sentence and with what to do next.

`diagnose` is a pure function of what the cluster shows: no I/O, no clock, no client. It never raises, whatever an
object lacks, and it never repeats a credential. What a run did is not its business: the run directory knows that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.diagnose.observed import View, Why, bound, condition, dig, holds, number, seconds, span, text
from launcher.diagnose.pods import refused, waiting
from launcher.diagnose.queueing import admitted, evicted, queue_of, queued
from launcher.errors import BugError, InfrastructureError, LaunchError, NeverStartedError, SiteError, printable
from launcher.runs import Status


@dataclass(frozen=True)
class Scene:
    """What the cluster says of one run, as raw API objects (JSON as the API server sends it).

    `pods` are those of the head, the workers and the submitter; `events` those of all of these objects. `nodes` is
    None where they may not be read.
    """

    rayjob: dict[str, Any] | None = None
    raycluster: dict[str, Any] | None = None
    pods: tuple[dict[str, Any], ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    workload: dict[str, Any] | None = None
    nodes: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """Where a run stands as far as its cluster knows.

    `reason` is one sentence without a full stop, empty while all is well; `hint` is what to type or do next. `error`
    is set when it has ended badly. `hopeless` says that waiting will not help: somebody must act.
    """

    status: Status
    reason: str = ""
    hint: str = ""
    error: LaunchError | None = None
    hopeless: bool = False


UNTOUCHED = 30.0
"""Seconds after which an operator that works has taken notice of a new object."""


def diagnose(scene: Scene, now: float) -> Verdict:
    """Where the run of this scene stands at this time (Unix seconds)."""
    view = View.of(scene.rayjob, scene.raycluster, scene.pods, scene.events, scene.nodes, now)
    if not scene.rayjob:
        error = InfrastructureError("its RayJob is gone", where=view.name,
                                    hint=f"launch resume {view.name} goes on from its last checkpoint")  # fmt: skip
        return _ended(Status.INTERRUPTED, error)
    state = text(view.job, "status", "jobDeploymentStatus")
    if state in ENDS:
        return ENDS[state](view)
    if text(view.job, "metadata", "deletionTimestamp"):
        return _verdict(Status.CANCELLING, Why("its pods are being removed"))
    workload = scene.workload if isinstance(scene.workload, dict) else None
    if verdict := _in_queue(state, workload, view):
        return verdict
    return STATES.get(state, _unknown)(view)


# -- verdicts

LONGEST = 300
CREDENTIALS = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 …"),
    (re.compile(r"://[^/\s@]+@"), "://…@"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_\w{16,}|\bhf_\w{16,}|\beyJ[\w-]{8,}(?:\.[\w-]+)*"), "…"),
    (re.compile(r"(?i)\b([\w-]*(?:password|passwd|secret|token|signature|api[_-]?key|access[_-]?key|credential)[\w-]*"
                r"[\"']?\s*=\s*[\"']?)[^\s\"'&,;]+"), r"\1…"),
)  # fmt: skip
"""What a message of a registry, a volume or a webhook might carry and nobody else should read."""


def _line(words: str) -> str:
    """One line that is safe to print, without a full stop and without credentials."""
    for pattern, instead in CREDENTIALS:
        words = pattern.sub(instead, words)
    words = printable(" ".join(words.split())).rstrip(" .:;,")
    return words if len(words) <= LONGEST else words[: LONGEST - 1].rstrip(" .:;,") + "…"


def _verdict(status: Status, why: Why | None = None) -> Verdict:
    why = why or Why("")
    return Verdict(status, _line(why.reason), _line(why.hint), hopeless=why.hopeless)


def _waits(status: Status, why: Why, view: View) -> Verdict:
    """A verdict on a run that waits: if in vain, the hint also says how to end that."""
    cancel = f"launch cancel {view.name}"
    if why.hopeless and cancel not in why.hint:
        room = LONGEST - len(cancel) - len("; … ends the wait")
        why = Why(why.reason, f"{why.hint[:room]}; {cancel} ends the wait".removeprefix("; "), True)
    return _verdict(status, why)


def _ended(status: Status, error: LaunchError) -> Verdict:
    told = type(error)(_line(error.what), where=_line(error.where), hint=_line(error.hint))
    return Verdict(status, told.what, told.hint, told)


def _failed(kind: type[LaunchError], what: str, hint: str, view: View) -> Verdict:
    return _ended(Status.FAILED, kind(what, where=f"RayJob {view.namespace}/{text(view.job, 'metadata', 'name')}",
                                      hint=hint))  # fmt: skip


# -- before it runs


def _in_queue(state: str, workload: dict[str, Any] | None, view: View) -> Verdict | None:
    """The verdict on a run that Kueue, or whoever suspended it, does not let go."""
    if state not in ("", "Initializing", "Suspending", "Suspended"):
        return None
    suspended = dig(view.job, "spec", "suspend") is True
    if workload and not admitted(workload):
        if state == "Suspending" and (why := evicted(workload, view)):
            return _verdict(Status.RECOVERING, why)
        return _waits(Status.QUEUED, queued(workload, view), view)
    if workload and state == "Suspended" and not suspended:
        waited = view.now - seconds(condition(workload, "Admitted"), "lastTransitionTime")
        return _waits(Status.PENDING, _unnoticed(waited), view) if waited >= UNTOUCHED else None
    if workload or not suspended or state == "Suspending":
        return None
    queue = queue_of(view, workload)
    if not queue:
        return _waits(Status.QUEUED, Why("it is suspended, and no queue will let it go",
                                         f"kubectl get rayjob -n {view.namespace}; launch resume {view.name} starts it "
                                         "anew", hopeless=True), view)  # fmt: skip
    if view.age < UNTOUCHED:
        return _verdict(Status.QUEUED, Why(f"Kueue is about to put it into queue {queue}"))
    return _waits(Status.QUEUED, Why(f"Kueue has not put it into queue {queue} for {span(view.age)}",
                                     "kubectl get deploy -A | grep kueue; ask the owner of the cluster",
                                     hopeless=True), view)  # fmt: skip


def _new(view: View) -> Verdict:
    """The operator has not begun."""
    if not dig(view.job, "status") and not view.cluster:
        if view.age >= UNTOUCHED:
            return _waits(Status.PENDING, _unnoticed(view.age), view)
        return _verdict(Status.PENDING, Why("the KubeRay operator is about to pick it up"))
    return _initializing(view)


def _unnoticed(duration: float) -> Why:
    return Why(f"the KubeRay operator has not picked it up for {span(duration)}",
               "kubectl get deploy -A | grep kuberay; ask the owner of the cluster", hopeless=True)  # fmt: skip


def _initializing(view: View) -> Verdict:
    """The cluster of the run comes up."""
    heads, workers = view.of_role("head"), view.of_role("worker")
    placed = bool(heads) and len(workers) >= view.workers and all(map(bound, heads[-1:] + workers))
    status = Status.STARTING if placed else Status.PENDING
    return _waits(status, refused(view) or waiting(view) or _silent(view), view)


def _silent(view: View) -> Why:
    """How far it is when no pod has anything to tell."""
    if not view.pods:
        return Why("the KubeRay operator creates its pods")
    missing = view.workers + 1 - len(view.of_role("head")[-1:]) - len(view.of_role("worker"))
    if missing > 0:
        return Why(f"{missing} of {view.workers + 1} pods are being created")
    ready = all(holds(pod, "Ready") for pod in view.pods)
    return Why("its pods are ready; the driver is about to start" if ready else "its pods wait for nodes")


# -- while it runs


def _running(view: View) -> Verdict:
    job = text(view.job, "status", "jobStatus")
    if job in ("SUCCEEDED", "FAILED", "STOPPED"):
        return _verdict(Status.RUNNING, Why("the driver has ended; its last words are being collected"))
    if why := _head_lost(view):
        return _verdict(Status.RECOVERING, why)
    if job != "RUNNING":
        why = refused(view) or waiting(view, ("submitter",)) or Why("the head is up; the driver starts")
        return _waits(Status.STARTING, why, view)
    return _verdict(Status.RUNNING, waiting(view, ("head", "worker")))


def _head_lost(view: View) -> Why | None:
    """Why the head is not there, if it is not."""
    heads, state = view.of_role("head"), condition(view.cluster, "HeadPodReady")
    if heads and holds(heads[-1], "Ready"):
        return None
    if not heads and not view.pods and text(state, "status") != "False":
        return None  # The pods are not shown, and the operator misses nothing.
    back = f"nothing to do: the run goes on from its last checkpoint; launch status {view.name}"
    why = waiting(view, ("head",)) if heads else refused(view)
    if heads or why:
        why = why or Why("the head: it is not ready")
        return why if why.hopeless else Why(why.reason, back)
    message = text(state, "message") if text(state, "reason") != "HeadPodNotFound" else ""
    return Why(f"the head is gone and is being replaced{f': {message}' if message else ''}", back)


def _suspending(view: View) -> Verdict:
    hint = f"it goes on when it is let go; launch cancel {view.name} ends it"
    return _verdict(Status.RECOVERING, Why("it was suspended; its pods are being removed", hint))


def _suspended(_view: View) -> Verdict:
    return _verdict(Status.QUEUED, Why("it has been let go; the KubeRay operator is about to start it"))


def _retrying(view: View) -> Verdict:
    message = _first_line(text(view.job, "status", "message"))
    count = number(view.job, "status", "failed")
    reason = f"attempt {count} on the cluster ended" if count else "an attempt on the cluster ended"
    return _verdict(Status.RECOVERING, Why(f"{reason}{f' ({message})' if message else ''}; its pods are made anew",
                                           "nothing to do: it goes on from its last checkpoint"))  # fmt: skip


def _interactive(view: View) -> Verdict:
    return _verdict(Status.STARTING, Why("it waits for somebody to submit a job to it",
                                         f"launch cancel {view.name}, and launch it anew"))  # fmt: skip


def _unknown(view: View) -> Verdict:
    state = text(view.job, "status", "jobDeploymentStatus")
    return _verdict(Status.STARTING, Why(f"its RayJob is {state}, which this version of raylaunch does not know",
                                         f"kubectl describe rayjob -n {view.namespace}"))  # fmt: skip


# -- when it has ended


def _complete(view: View) -> Verdict:
    job = text(view.job, "status", "jobStatus")
    if job == "SUCCEEDED":
        return Verdict(Status.SUCCEEDED)
    if job == "STOPPED":
        return _verdict(Status.CANCELLED, Why("it was stopped", f"launch resume {view.name} goes on"))
    return _failed(InfrastructureError, f"its RayJob ended without a result ({job or 'no job status'})",
                   f"launch resume {view.name}", view)  # fmt: skip


def _invalid(view: View) -> Verdict:
    message = text(view.job, "status", "message") or "the KubeRay operator refuses the RayJob"
    return _failed(BugError, message, "launch --dry-run prints the RayJob; report this with it", view)


def _failure(view: View) -> Verdict:
    # What Ray calls a success is one: the submitter may have died after it.
    if text(view.job, "status", "jobStatus") == "SUCCEEDED":
        return Verdict(Status.SUCCEEDED)
    reason = text(view.job, "status", "reason")
    return FAILURES.get(reason, _driver_failed)(view)


def _never_started(view: View) -> Verdict:
    limit = number(view.job, "spec", "preRunningDeadlineSeconds")
    why = refused(view) or waiting(view)
    what = f"it did not start within {span(limit)}" if limit else "it did not start in time"
    longer = f"launch resume {view.name} --set limits.start_minutes={max(1, limit // 30)} waits longer"
    return _failed(NeverStartedError, f"{what}: {why.reason}" if why else what,
                   why.hint if why and why.hopeless else longer, view)  # fmt: skip


def _too_long(view: View) -> Verdict:
    limit = number(view.job, "spec", "activeDeadlineSeconds")
    what = f"it reached its limit of {_hours(limit)}" if limit else "it reached its limit of time"
    hours = f"{limit / 1800:g}" if limit else "N"
    return _failed(SiteError, what, f"launch resume {view.name} --max-hours {hours}", view)


def _hours(duration: float) -> str:
    return f"{duration / 3600:g} hour{'' if duration == 3600 else 's'}" if duration >= 3600 else span(duration)


def _not_submitted(view: View) -> Verdict:
    why = waiting(view, ("submitter",))
    words = why.reason if why else _first_line(text(view.job, "status", "message")) or "no reason was given"
    return _failed(InfrastructureError, f"its submitter failed, and the run was ended ({words})",
                   f"launch resume {view.name} goes on from its last checkpoint", view)  # fmt: skip


def _driver_failed(view: View) -> Verdict:
    """The driver leaves its own, better words in the run directory, unless it was killed."""
    message = _first_line(text(view.job, "status", "message"))
    resume = f"launch resume {view.name} goes on from its last checkpoint"
    if "head pod not found" in message.lower() or "not found in RayCluster" in message:
        return _failed(InfrastructureError, "the head was lost, and the driver with it", resume, view)
    why = waiting(view, ("head",))
    what = f"the driver failed: {message}" if message else "the driver failed"
    return _failed(InfrastructureError, f"{what} ({why.reason})" if why else what,
                   f"launch logs {view.name} says why; {resume}", view)  # fmt: skip


def _lost_sight(view: View) -> Verdict:
    found = re.search(r"timeout of (\d+)s", text(view.job, "status", "message"))
    why = waiting(view, ("head",))
    what = "the head did not answer" + (f" for {span(int(found[1][:9]))}" if found else "")
    return _failed(InfrastructureError, f"{what} ({why.reason})" if why else what,
                   f"launch resume {view.name} goes on from its last checkpoint", view)  # fmt: skip


def _out_of_step(view: View) -> Verdict:
    if "submitter" in text(view.job, "status", "message"):
        return _failed(InfrastructureError, "its submitter ended while the driver still ran",
                       f"launch resume {view.name} goes on from its last checkpoint", view)  # fmt: skip
    return _driver_failed(view)


def _first_line(message: str) -> str:
    """The message without the log that Ray hangs on it."""
    head = re.split(r",? last available logs|\n", message.strip(), maxsplit=1)[0]
    return head.rstrip(" .:;,")


STATES: dict[str, Callable[[View], Verdict]] = {
    "": _new, "Initializing": _initializing, "Running": _running, "Waiting": _interactive,
    "Suspending": _suspending, "Suspended": _suspended, "Retrying": _retrying,
}  # fmt: skip
ENDS: dict[str, Callable[[View], Verdict]] = {
    "Complete": _complete,
    "Failed": _failure,
    "ValidationFailed": _invalid,
}
FAILURES: dict[str, Callable[[View], Verdict]] = {
    "PreRunningDeadlineExceeded": _never_started, "DeadlineExceeded": _too_long, "SubmissionFailed": _not_submitted,
    "AppFailed": _driver_failed, "JobStatusCheckTimeoutExceeded": _lost_sight,
    "JobDeploymentStatusTransitionGracePeriodExceeded": _out_of_step,
}  # fmt: skip
"""By the reason that KubeRay gives for a failed RayJob."""
