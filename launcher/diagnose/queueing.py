"""Why Kueue lets a run wait: its words on a Workload, in those of a person. It reads objects, and queues nothing.

By default Kueue 0.19 gives its reasons as Pending or Inadmissible and says the rest in the message alone; finer
reasons come with its gate UnadmittedWorkloadsObservability. So the message is read first, and reasons only confirm.
"""

from __future__ import annotations

import re
from dataclasses import replace

from launcher.diagnose.observed import Object, Rule, View, Why, amount, condition, dig, first, holds, items, spell, text
from launcher.labels import QUEUE_LABEL

QUEUES = "kubectl get localqueue -n {ns}"
OWNER = QUEUES + "; ask the owner of the cluster"
WAIT = "it starts by itself in its turn; launch cancel {name} gives its place up"
RESUMES = "it goes on from its last checkpoint in its turn; launch cancel {name} gives it up"
LIMITS = "kubectl get limitrange -n {ns}; ask the owner of the cluster"
SOON = "nothing to do: it starts when they are gone"
EVENTS = "kubectl get events -n {ns}; " + WAIT
LESS = "fewer --workers, another kind with --gpu, or more quota from the owner of the cluster"

GONE, STOPPED = r"(?:doesn't exist|is terminating or missing)", r"is (?:inactive|stopped)"
HELD = (
    Rule(rf"LocalQueue (\S+) {GONE}", "there is no queue {0} in namespace {ns}", OWNER, True),
    Rule(rf"ClusterQueue (\S*) ?{GONE}", "queue {queue} leads to ClusterQueue {0}, which is not there", OWNER, True),
    Rule(rf"LocalQueue (\S+) {STOPPED}", "queue {0} is stopped", OWNER, True),
    Rule(rf"ClusterQueue (\S+) {STOPPED}", "queue {queue} is stopped (its ClusterQueue {0} is)", OWNER, True),
    Rule(r"namespace doesn't match", "queue {queue} does not take runs of namespace {ns}", OWNER, True),
    Rule(r"LimitRange constraints", "a pod breaks the limits of namespace {ns}", LIMITS, True),
    Rule(
        r"Pending the preemption of (\d+) workload", "queue {queue} makes room: {0} other runs are being stopped", SOON
    ),
    Rule(r"resource (\S+) unavailable in ClusterQueue", "queue {queue} offers no {0}", LESS, True),
    Rule(r"waiting for all admitted workloads", "queue {queue} waits for runs before it to be up", WAIT),
    Rule(r"no longer fits after processing", "another run got the quota of queue {queue} first", WAIT),
    Rule(r"Admission is gated by: (.+)", "it is held back by {0}", OWNER),
    Rule(r"topology", "queue {queue} finds no nodes close enough together now", WAIT),
    Rule(r"pending evaluation|equivalent workload", "it waits for its turn in queue {queue}", WAIT),
)
"""By the message of QuotaReserved."""
HIGHER = "a run with a higher priority took its place in queue {queue}"
EVICTIONS = (
    Rule(r"^Preempted .*due to prioritization", HIGHER, RESUMES),
    Rule(r"^Preempted .*reclamation", "queue {queue} had to give back quota that it had borrowed", RESUMES),
    Rule(r"^Preempted", "another run took its place in queue {queue}", RESUMES),
    Rule(r"^PodsReadyTimeout", "its pods were not ready in time, and queue {queue} put it back", EVENTS),
    Rule(r"^NodeFailures", "a node of it was lost, and queue {queue} put it back", RESUMES),
    Rule(r"^(?:ClusterQueueStopped|LocalQueueStopped)", "queue {queue} was stopped", OWNER, True),
    Rule(r"^AdmissionCheck (.*)", "queue {queue} put it back: {0}", RESUMES),
    Rule(r"^MaximumExecutionTimeExceeded", "it had its longest time in queue {queue}", OWNER, True),
    Rule(r"^Deactivated\w* (.*)", "Kueue gave it up: {0}", OWNER, True),
)
"""By the reason and the message of Evicted."""

SHORT = re.compile(r"insufficient unused quota for (\S+) in flavor (\S+?), (\S+?) more needed")
EXCESS = re.compile(
    r"insufficient quota for (\S+) in flavor (\S+?), previously considered podsets requests \((\S+?)\)"
    r" \+ current podset request \((\S+?)\) > maximum capacity \((\S+?)\)"
)
MISMATCH = re.compile(r"untolerated taint (.+?) in flavor (\S+)|flavor (\S+) doesn't match node affinity")


def queue_of(view: View, workload: Object | None) -> str:
    """Name of the queue that the run is in, or an empty string."""
    return text(workload, "spec", "queueName") or text(view.job, "metadata", "labels", QUEUE_LABEL)


def admitted(workload: Object | None) -> bool:
    """Whether Kueue lets the run go."""
    return holds(workload, "Admitted") or holds(workload, "Finished")


def evicted(workload: Object | None, view: View) -> Why | None:
    """Why Kueue took the run off its nodes, if it did."""
    evicted = condition(workload, "Evicted")
    if text(evicted, "status") != "True":
        return None
    return first(EVICTIONS, f"{text(evicted, 'reason')} {text(evicted, 'message')}", **_names(view, workload))


def queued(workload: Object, view: View) -> Why:
    """Why Kueue does not let the run go yet."""
    names = _names(view, workload)
    if holds(workload, "QuotaReserved"):
        return _checks(workload, names)
    if dig(workload, "spec", "active") is False:
        gone = evicted(workload, view)
        return gone or Why("Kueue was told to hold it back (its Workload is inactive)", OWNER.format(**names), True)
    state = condition(workload, "QuotaReserved")
    reason, message = text(state, "reason"), text(state, "message")
    why = first(HELD, message, **names) or _quota(message, names)
    if why is None and reason in ("Misconfigured", "Inadmissible", "Suspended", "ExceedsMaxQuota", "NoMatchingFlavor"):
        why = Why(f"queue {names['queue']} does not take it: {message or reason}", OWNER.format(**names), True)
    gone = evicted(workload, view)
    if why is None or (gone and not why.hopeless):
        why = gone or why
    return why or Why(f"it waits for its turn in queue {names['queue']}", WAIT.format(**names))


def _names(view: View, workload: Object | None) -> dict[str, str]:
    return {"name": view.name, "ns": view.namespace, "queue": queue_of(view, workload) or "of Kueue"}


def _checks(workload: Object, names: dict[str, str]) -> Why:
    """It has its quota, and waits for what else the cluster wants to check, such as that nodes can be had."""
    checks = [each for each in items(workload, "status", "admissionChecks") if text(each, "state") != "Ready"]
    if not checks:
        return Why(f"queue {names['queue']} has let it in; it is about to start", WAIT.format(**names))
    check = min(checks, key=lambda each: text(each, "state") != "Rejected")
    words = ": ".join(filter(None, (text(check, "name"), text(check, "message"))))
    if text(check, "state") == "Rejected":
        return Why(f"queue {names['queue']} refuses it: {words}", OWNER.format(**names), True)
    return Why(f"it has its quota and waits for {words}", WAIT.format(**names))


def _quota(message: str, names: dict[str, str]) -> Why | None:
    """What quota is short: all podsets of a message, its parts, must fit; the flavors of one are a choice."""
    found = [_podset(part, names) for part in message.split("; ") if "flavor" in part]
    known = [why for why in found if why]
    return min(known, key=lambda why: not why.hopeless) if known else None


def _podset(message: str, names: dict[str, str]) -> Why | None:
    queue = names["queue"]
    if short := SHORT.search(message):
        resource, flavor, more = short.groups()
        return Why(f"queue {queue} has no quota free: {spell(resource, amount(more))} more must become free "
                   f"(flavor {flavor})", WAIT.format(**names))  # fmt: skip
    if excess := EXCESS.search(message):
        resource, flavor, before, now, most = excess.groups()
        return Why(f"it asks for {spell(resource, amount(before) + amount(now))}, and queue {queue} may give "
                   f"{spell(resource, amount(most))} at most (flavor {flavor})", LESS, True)  # fmt: skip
    if mismatch := MISMATCH.search(message):
        taint, *flavors = mismatch.groups()
        why = Why(f"no nodes of queue {queue} are of the kind that it asks for (flavor {flavors[0] or flavors[1]})",
                  LESS, True)  # fmt: skip
        return replace(why, reason=why.reason.replace(")", f", taint {taint})")) if taint else why
    return None
