"""Why pods do not run: what the cluster refused to create, why a pod has no node, image, volume or network, or died.

The ladder is climbed from what explains most to what explains least; the first rung that says something is what the
user hears, for as many pods as it holds for. Words come from kubelet, API server and operator; tables turn them into
sentences. It reads objects; it asks a cluster for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from launcher.diagnose.observed import (
    Event,
    Object,
    Rule,
    View,
    Why,
    amount,
    bound,
    condition,
    first,
    holds,
    is_gpu,
    items,
    number,
    role,
    seconds,
    span,
    spell,
    text,
)  # fmt: skip
from launcher.diagnose.scheduling import requests, unscheduled

DESCRIBE = "kubectl describe pod {pod} -n {ns}"
OWNER = DESCRIBE + "; ask the owner of the cluster"
LOGS = "kubectl logs {pod} -n {ns} --previous"
IMAGE = "correct the image in the description of the pool, or push it; " + DESCRIBE
RETRIED = "it is tried again by itself; " + DESCRIBE
REPLACED = "nothing to do: the pod is replaced; kubectl get pods -n {ns}"

# -- what the API server refused to create

REFUSALS = (
    Rule(r'error looking up service account (\S+?)/(\S+?):', "there is no service account {1} in namespace {0}",
         "kubectl get serviceaccount -n {ns}; the owner of the cluster creates it", True),
    Rule(r'violates PodSecurity "(.+?)": (.+)', 'namespace {ns} forbids such pods (Pod Security {0}): {1}',
         "kubectl get namespace {ns} --show-labels; ask the owner of the cluster", True),
    Rule(r"maximum (\S+) usage per (\w+) is (\S+), but \w+ is ([^\s,\]]+?)\.?(?:[\s,\]]|$)",
         "namespace {ns} allows at most {2} of {0} per {1}, and {3} is asked for",
         "kubectl get limitrange -n {ns}; ask for less with --set resources.cpus_per_worker=N, or ask the owner", True),
    Rule(r"minimum (\S+) usage per (\w+) is (\S+), but \w+ is ([^\s,\]]+?)\.?(?:[\s,\]]|$)",
         "namespace {ns} wants at least {2} of {0} per {1}, and {3} is asked for",
         "kubectl get limitrange -n {ns}; ask the owner of the cluster", True),
    Rule(r"failed quota: (\S+?): must specify (.+)", "the quota {0} of namespace {ns} wants pods to state {1}",
         "kubectl get resourcequota {0} -n {ns}; ask the owner of the cluster", True),
    Rule(r'admission webhook "(.+?)" denied the request: (.+)', "the cluster's rule {0} refuses the pod: {1}",
         "ask the owner of the cluster", True),
    Rule(r"no PriorityClass with name (\S+) was found", "there is no priority class {0}",
         "kubectl get priorityclass; choose one with --set resources.priority=NAME", True),
    Rule(r'User "(.+?)" cannot (\w+) resource "(\S+?)"', "the operator ({0}) may not {1} {2}",
         "ask the owner of the cluster to install KubeRay with its roles", True),
    Rule(r"is forbidden: (.+)", "the cluster forbids the pod: {0}", "ask the owner of the cluster", True),
    Rule(r"(.+)", "the pod cannot be created: {0}", "kubectl get events -n {ns}; ask the owner of the cluster"),
)  # fmt: skip
FAILED_CREATES = ("FailedToCreateHeadPod", "FailedToCreateWorkerPod", "FailedToCreateRayCluster", "FailedCreate",
                  "FailedToCreateRayJobSubmitter")  # fmt: skip
"""Reasons of events; the first two are those of the RayCluster's pods."""


def refused(view: View) -> Why | None:
    """Why pods of the run cannot be created."""
    failure = condition(view.cluster, "ReplicaFailure")
    if text(failure, "status") == "True" and text(failure, "reason").startswith("FailedCreate"):
        kind, _, message = text(failure, "message").partition("\n")
        return _refusal(text(failure, "reason"), message or kind, view)
    # Where the RayCluster has conditions, they are newer than the events of its pods.
    known = FAILED_CREATES[2:] if items(view.cluster, "status", "conditions") else FAILED_CREATES
    told = [each for each in view.events if each.warning and each.reason in known]
    newest = max((seconds(pod, "metadata", "creationTimestamp") for pod in view.pods), default=0.0)
    return _refusal(told[-1].reason, told[-1].message, view) if told and told[-1].time >= newest else None


def _refusal(reason: str, message: str, view: View) -> Why | None:
    why = _over_quota(message, view) or first(REFUSALS, message, ns=view.namespace, name=view.name)
    if why is None or reason == "FailedToCreateRayCluster":
        return why
    missing = max(1, view.workers - len(view.of_role("worker")))
    workers = f"{missing} of {view.workers} workers" if view.workers > 1 else "the worker"
    return _of("the head" if "Head" in reason else workers if "Worker" in reason else "the submitter", why)


def _over_quota(message: str, view: View) -> Why | None:
    found = re.search(r"exceeded quota: (\S+), requested: (\S+), used: (\S+), limited: (\S+)", message)
    if not found:
        return None
    asked, used, limit = (dict(pair.split("=", 1) for pair in part.split(",") if "=" in pair)
                          for part in found.groups()[1:])  # fmt: skip
    # The message names only what is exceeded; GPUs are what the user thinks in.
    resource = min(asked, key=lambda each: not is_gpu(each), default="")
    more, taken, most = (amount(part.get(resource, "")) for part in (asked, used, limit))
    named = f"quota {found[1]} of namespace {view.namespace} allows {spell(resource, most)}"
    hint = f"kubectl get resourcequota {found[1]} -n {view.namespace}"
    less = f"{hint}; ask for less (--workers), or the owner of the cluster for more"
    own = sum(_counted(pod, resource) for pod in view.pods)
    if more > most:
        return Why(f"{named}, and a pod asks for {spell(resource, more)}", less, True)
    if own + more > most:
        return Why(f"{named}; this run has {spell(resource, own)} and needs {spell(resource, more)} more", less, True)
    return Why(f"{named}, {spell(resource, taken).split()[0]} of them are in use, and a pod asks for "
               f"{spell(resource, more)}",
               f"it starts by itself when others end; {hint}; launch cancel {view.name} gives it up")  # fmt: skip


def _counted(pod: Object, resource: str) -> float:
    """What a pod counts for in a quota of its namespace."""
    name = resource.removeprefix("requests.").removeprefix("limits.")
    return 1.0 if name == "pods" else requests(pod).get(name, 0.0)


# -- what became of a pod

POD_ENDS = (
    Rule(r"^Evicted The node was low on resource: ([\w-]+)", "evicted from {node}, which ran short of {0}", REPLACED),
    Rule(r"^Evicted (.*)", "evicted from {node}: {0}", REPLACED),
    Rule(r"^(?:Terminated|Shutdown|NodeShutdown)", "{node} was shut down", REPLACED),
    Rule(r"^NodeLost", "{node} was lost", REPLACED),
    Rule(r"^Preempt", "it lost its place on {node} to a pod with a higher priority", REPLACED),
    Rule(r"^(?:OutOf\w+|UnexpectedAdmissionError|NodeAffinity) (.*)", "{node} refused it: {0}", REPLACED),
)
DISRUPTIONS = (
    Rule(r"^PreemptionByScheduler", "it lost its place on {node} to a pod with a higher priority", REPLACED),
    Rule(r"^DeletionByTaintManager", "{node} stopped answering or was closed", REPLACED),
    Rule(r"^EvictionByEvictionAPI", "it was evicted, since {node} is being emptied", REPLACED),
    Rule(r"^DeletionByPodGC", "{node} is gone", REPLACED),
    Rule(r"^TerminationByKubelet", "{node} stopped it, being short of memory or disk, or shutting down", REPLACED),
)
REFUSES = "its registry refuses the cluster (unauthorized)"
ALLOW = "ask the owner of the cluster to let its nodes pull from there; " + DESCRIBE
PULLS = (
    Rule(r"not present with pull policy", "{node} does not have it, and may not pull it", IMAGE, True),
    Rule(r"toomanyrequests|rate limit|429 Too Many", "its registry lets no more be pulled for now (rate limit)",
         RETRIED),
    Rule(r"no match for platform|no matching manifest", "it is not built for the processor of {node}", IMAGE, True),
    Rule(r"no space left on device", "{node} has no disk space left for it", OWNER),
    Rule(r"x509|certificate", "the certificate of its registry is not trusted", OWNER, True),
    Rule(r"lookup (\S+?)(?: on \S+)?: no such host", "its registry {0} has no address (no such host)", IMAGE, True),
    Rule(r"no such host", "its registry has no address (no such host)", IMAGE, True),
    Rule(r"timeout|deadline exceeded|connection refused|connection reset|\bEOF\b|server misbehaving|"
         r"\b50\d (?:Internal|Bad|Service|Gateway)",
         "its registry does not answer", RETRIED),
    Rule(r"no basic auth|unauthorized|authentication required|403 Forbidden", REFUSES, ALLOW, True),
    Rule(r"does not exist or may require", "it does not exist, or the cluster has no login for it", IMAGE, True),
    Rule(r"authorization failed|denied|forbidden", REFUSES, ALLOW, True),
    Rule(r"not found|manifest unknown", "there is no such image", IMAGE, True),
)  # fmt: skip
CONFIGS = (
    Rule(r'secret "(.+?)" not found', "there is no Secret {0} in namespace {ns}",
         "kubectl get secret {0} -n {ns}; its owner creates it, the pod then starts by itself", True),
    Rule(r'configmap "(.+?)" not found', "there is no ConfigMap {0} in namespace {ns}",
         "kubectl get configmap {0} -n {ns}; the pod starts by itself when it is there", True),
    Rule(r"couldn't find key (\S+) in (Secret|ConfigMap) (\S+)", "{1} {2} has no key {0}", OWNER, True),
    Rule(r"runAsNonRoot", "the image runs as root, which the pod may not", IMAGE, True),
    Rule(r"(.+)", "its container is configured wrongly: {0}", OWNER, True),
)  # fmt: skip
STARTS = (
    Rule(r'exec: \\?"(.+?)\\?": (?:executable file not found|stat .*no such file)', "the image has no program {0}",
         IMAGE, True),
    Rule(r"exec format error", "the image is not built for the processor of {node}", IMAGE, True),
    Rule(r"(.*(?:nvidia|libcuda|NVML|CUDA).*)", "the GPU of {node} cannot be used: {0}", OWNER),
    Rule(r"(.+)", "its container cannot start: {0}", OWNER),
)  # fmt: skip


def died(pod: Object, view: View) -> Why | None:
    """How the pod as a whole was ended."""
    names = view.names(pod)
    if text(pod, "status", "phase") == "Failed":
        ended = first(POD_ENDS, f"{text(pod, 'status', 'reason')} {text(pod, 'status', 'message')}", **names)
        if ended:
            return ended
    if holds(pod, "DisruptionTarget"):
        return first(DISRUPTIONS, text(condition(pod, "DisruptionTarget"), "reason"), **names)
    return None


def container(pod: Object, view: View) -> Why | None:
    """What stops a container of the pod."""
    statuses = items(pod, "status", "initContainerStatuses") + items(pod, "status", "containerStatuses")
    return next(filter(None, (_container(status, pod, view) for status in statuses)), None)


def _container(status: Object, pod: Object, view: View) -> Why | None:
    reason, message = text(status, "state", "waiting", "reason"), text(status, "state", "waiting", "message")
    names, image = view.names(pod), text(status, "image") or "of the pod"
    if reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable"):
        told = [each.message for each in view.events_of(pod) if each.message.startswith("Failed to pull image")]
        # Before Kubernetes 1.31 the back-off names no cause; the event of the pull does.
        why = first(PULLS, message, **names) or first(PULLS, told[-1] if told else "", **names)
        return _of(f"image {image} cannot be pulled", why or Why("no cause was given", RETRIED.format(**names)))
    if reason == "InvalidImageName":
        return Why(f"{image} is not a valid name of an image", IMAGE.format(**names), True)
    if reason in ("CreateContainerConfigError", "CreateContainerError"):
        return first(CONFIGS if reason == "CreateContainerConfigError" else STARTS, message or reason, **names)
    if reason in ("RunContainerError", "StartError", "PostStartHookError"):
        return first(STARTS, message or reason, **names)
    ended, again = status.get("state"), number(status, "restartCount")
    last = text(status, "lastState", "terminated", "reason")
    if reason == "CrashLoopBackOff":
        return _ended(status.get("lastState"), status, pod, view, again)
    code = number(ended, "terminated", "exitCode")
    if text(ended, "terminated", "reason") == "OOMKilled" or code:
        return _ended(ended, status, pod, view, again)
    if last == "OOMKilled" and not status.get("ready"):
        return _ended(status.get("lastState"), status, pod, view, again)
    return None


def _ended(state: object, status: Object, pod: Object, view: View, again: int) -> Why:
    names = view.names(pod)
    reason, code = text(state, "terminated", "reason"), number(state, "terminated", "exitCode")
    times = f", {again} times so far" if again > 1 else ""
    logs = (LOGS if again else LOGS.removesuffix(" --previous")).format(**names)
    if reason == "OOMKilled":
        named = (each for each in items(pod, "spec", "containers") if text(each, "name") == text(status, "name"))
        limit = next((text(each, "resources", "limits", "memory") for each in named), "")
        return Why(f"it ran out of memory{f' (its limit is {limit})' if limit else ''}{times}",
                   f"a kind of node with more memory (--gpu), or smaller batches (--batch-size); {logs}",
                   again >= 3)  # fmt: skip
    if reason in ("ContainerCannotRun", "StartError"):
        found = first(STARTS, text(state, "terminated", "message") or reason, **names)
        return found or Why("its container cannot start", OWNER.format(**names), True)
    what = "keeps crashing" if text(status, "state", "waiting", "reason") == "CrashLoopBackOff" else "ended"
    return Why(f"its container {text(status, 'name')} {what} with exit code {code}{times}", logs, again >= 3)


# -- what keeps a pod with a node from starting

SPOT = ("SpotInterrupted", "SpotInterruption", "SpotRebalanceRecommendation", "TerminateEvent", "PreemptScheduled")
SPOT_TAINTS = ("aws-node-termination-handler/spot-itn", "cloud.google.com/impending-node-termination")
ON_NODE = {
    "FailedMount": (
        Rule(r'(secret|configmap) "(.+?)" not found', "there is no {0} {1} in namespace {ns}",
             "kubectl get {0} {1} -n {ns}; the pod starts by itself when it is there", True),
        Rule(r'(?:MountVolume|MountDevice)\.\w+ failed for volume "(.+?)" : (.+)', "volume {0} cannot be mounted: {1}",
             OWNER),
        Rule(r"timed out waiting", "a volume of the pod is not mounted in time", OWNER),
        Rule(r"(.+)", "a volume cannot be mounted: {0}", OWNER),
    ),
    "FailedAttachVolume": (
        Rule(r'Multi-Attach error for volume "(.+?)"', "volume {0} is still held by another node", OWNER),
        Rule(r'AttachVolume.Attach failed for volume "(.+?)" : (.+)', "volume {0} cannot be attached: {1}", OWNER),
        Rule(r"(.+)", "a volume cannot be attached: {0}", OWNER),
    ),
    "FailedCreatePodSandBox": (
        Rule(r"failed to assign an IP address|no available IP|no IP addresses available|InsufficientFreeAddresses",
             "{node} has no free IP address for it", "ask the owner of the cluster: its subnets are full; " + DESCRIBE),
        Rule(r"(?:cni|network)", "{node} cannot give it a network", OWNER),
        Rule(r"(.+)", "{node} cannot prepare the pod: {0}", OWNER),
    ),
    "NodeNotReady": (Rule(r"", "{node} is not ready", REPLACED),),
}  # fmt: skip
PROGRESS = ("Scheduled", "SuccessfulAttachVolume", "Pulling", "Pulled", "Created", "Started")
"""Normal events before which a warning of the same pod has been overcome."""


def on_node(pod: Object, view: View) -> Why | None:
    """What its node has to say, as far as it is not overtaken by what came later."""
    where = text(pod, "spec", "nodeName")
    node = next((each for each in view.nodes or () if text(each, "metadata", "name") == where), None) if where else None
    names = view.names(pod)
    taints = [text(taint, "key") for taint in items(node, "spec", "taints")]
    told = [each for each in view.events if each.kind == "Node" and each.name == where and each.reason in SPOT]
    if any(taint in SPOT_TAINTS for taint in taints) or (told and view.now - told[-1].time < 600):
        return Why(f"the cloud takes its spot node {where} back", REPLACED.format(**names))
    if node and condition(node, "Ready") and not holds(node, "Ready"):
        since = seconds(condition(node, "Ready"), "lastTransitionTime")
        silent = f"has not answered for {span(view.now - since)}" if since else "does not answer"
        return Why(f"node {where} {silent}",
                   "nothing to do: the pod is replaced when the node stays away; kubectl get nodes")  # fmt: skip
    if not bound(pod) or holds(pod, "Ready"):
        return None
    for event in reversed(_fresh(pod, view)):
        if why := first(ON_NODE.get(event.reason, ()), event.message, **names):
            return why
    return None


def _fresh(pod: Object, view: View) -> list[Event]:
    events = view.events_of(pod)
    since = seconds(condition(pod, "PodScheduled"), "lastTransitionTime") if holds(pod, "PodScheduled") else 0.0
    overcome = max((each.time for each in events if not each.warning and each.reason in PROGRESS), default=0.0)
    return [each for each in events if each.warning and each.time >= max(since, overcome)]


def progress(pod: Object, view: View) -> Why | None:
    """How far a pod is that nothing stops."""
    if not bound(pod) or holds(pod, "Ready"):
        return None
    if any(text(each, "name") == "wait-gcs-ready" and text(each, "state", "running", "startedAt")
           for each in items(pod, "status", "initContainerStatuses")):  # fmt: skip
        return Why("waiting for the head to answer")
    steps = [each for each in view.events_of(pod) if each.reason in PROGRESS]
    if steps and steps[-1].reason == "Pulling":
        image = re.search(r'"(.+?)"', steps[-1].message)
        return Why(f"pulling image {image[1] if image else ''} for {span(view.now - steps[-1].time)}")
    started = any(text(each, "state", "running", "startedAt") for each in items(pod, "status", "containerStatuses"))
    return Why("started, and not ready yet" if started else "its containers are being created")


LADDER: tuple[Callable[[Object, View], Why | None], ...] = (died, container, on_node, unscheduled, progress)
ORDER = ("head", "worker", "submitter")


def waiting(view: View, roles: tuple[str, ...] = ORDER) -> Why | None:
    """Why the pods of these roles do not run, told of as many of them as it holds for."""
    # Of the head and the submitter there is one; what is left of earlier ones says nothing of now.
    pods = [pod for wanted in roles for pod in view.of_role(wanted)[0 if wanted == "worker" else -1 :]]
    for rung in LADDER:
        found = [(pod, why) for pod in pods if (why := rung(pod, view))]
        if found:
            pod, why = min(found, key=lambda pair: not pair[1].hopeless)
            same = sum(each.reason == why.reason and role(other) == role(pod) for other, each in found)
            many = view.workers > 1 and role(pod) == "worker"
            return _of(f"{same} of {view.workers} workers" if many else f"the {role(pod)}", why)
    return None


def _of(what: str, why: Why) -> Why:
    return Why(f"{what}: {why.reason}", why.hint, why.hopeless)
