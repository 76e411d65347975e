"""Why a pod has no node: the scheduler's refusals, the capacity of the nodes, and what the autoscaler does about it.

The scheduler tells each pod "0/6 nodes are available: 2 Insufficient nvidia.com/gpu, 4 node(s) had ...": true of every
node, but most nodes were never meant for the pod. The cause told to the user is that of the nodes nearest to fitting.
It reads objects; it asks a cluster for nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from launcher.diagnose.observed import (
    Event,
    Object,
    Rule,
    View,
    Why,
    amount,
    bound,
    dig,
    first,
    is_gpu,
    items,
    role,
    seconds,
    span,
    spell,
    text,
)  # fmt: skip

GRACE = 120.0
"""Seconds before silence of an autoscaler counts as a no: it is asked after the scheduler, and takes its time."""
SLOW_NODE = 900.0
"""Seconds after which a node that was asked for is late; cluster-autoscaler gives up on one after as long."""

WAIT = "it starts by itself when there is room; launch cancel {name} gives its place up"
MAY_GROW = "nothing to do yet: an autoscaler may add a node"
OTHER_KIND = "launch pools lists the kinds of nodes; choose another with --gpu, or fewer --workers"
OWNER = "kubectl describe pod {pod} -n {ns}; ask the owner of the cluster"
CLAIMS = "kubectl get pvc -n {ns}; ask the owner of the cluster"

VOLUMES = (
    Rule(r'persistentvolumeclaim "(.+?)" not found', "there is no volume claim {0} in namespace {ns}", CLAIMS, True),
    Rule(r'persistentvolumeclaim "(.+?)" is being deleted', "its volume claim {0} is being deleted", CLAIMS, True),
    Rule(r"unbound immediate PersistentVolumeClaims", "its volume claim {claims} has no volume", CLAIMS, True),
    Rule(r"find available persistent volumes to bind", "no volume fits its claim {claims}", CLAIMS, True),
    Rule(r"volume node affinity conflict", "its volume {claims} is in another zone than the nodes", CLAIMS, True),
    Rule(r"exceed max volume count", "the nodes hold as many volumes as they can", WAIT),
)
"""Asked first: a pod without its volume is refused by every node."""

STARTING_TAINTS = (
    "node.cloudprovider.kubernetes.io/uninitialized", "karpenter.sh/unregistered", "node.cilium.io/agent-not-ready",
    "ebs.csi.aws.com/agent-not-ready", "efs.csi.aws.com/agent-not-ready",
)  # fmt: skip
SICK_TAINTS = (
    "not-ready", "unreachable", "network-unavailable", "memory-pressure", "disk-pressure", "pid-pressure",
    "out-of-service",
)  # fmt: skip
"""What Kubernetes itself puts on a node behind `node.kubernetes.io/`."""
SYSTEM_TAINTS = ("node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master")
"""Of nodes that are no run's business."""

OTHERS = (
    Rule(r"Too many pods", "the nodes hold as many pods as they may", WAIT),
    Rule(r"free ports for the requested pod ports", "a port it asks for is taken on every node", OWNER, True),
    Rule(r"pod topology spread constraints", "no node satisfies how its pods are to be spread", OWNER),
    Rule(r"anti-affinity rules", "every node has a pod that it must not share a node with", OWNER),
    Rule(r"pod affinity rules", "no node has the pods that it must be beside", OWNER),
    Rule(r"affinity/selector", "no node has what its selector asks for{selector}", OTHER_KIND, True),
    Rule(r"were unschedulable", "the nodes are closed to new pods (cordoned)", "kubectl get nodes; " + OWNER),
    Rule(r"no nodes available to schedule pods", "the cluster has no node", "kubectl get nodes; " + OWNER, True),
)

SCALE_UP = (
    Rule(r"pod triggered scale-up: \[\{(\S+) (\d+)->(\d+)", "node group {0} goes from {1} to {2}"),
    Rule(r"Pod should schedule on: nodeclaim/([^\s,]+)", "Karpenter's {0}"),
    Rule(r"Pod should schedule on: node/([^\s,]+)", "Karpenter's {0}"),
)
NO_SCALE_UP = (
    Rule(r"in backoff after failed scale-up", "the last attempt to add a node failed, and is made again"),
    Rule(r"exceed limits for nodepool(?: \(NodePool=(.+?)\))?", "node pool {0} is at its limit"),
    Rule(r"limits have been exhausted for nodepool(?: \(NodePool=(.+?)\))?", "node pool {0} is at its limit"),
    Rule(r"max (?:node group size|cluster \w+ limit) reached", "its node group is at its largest"),
    Rule(r"max (?:limit|total nodes in cluster) reached", "its node group is at its largest"),
    Rule(r"no instance type (?:has|had) enough resources", "no instance type is large enough", hopeless=True),
    Rule(r"no instance type", "no instance type of its node pools satisfies the pod", hopeless=True),
    Rule(r"incompatible requirements, (?:key|label) \"?([^\s,\"]+)", "no node pool offers {0} as asked", hopeless=True),
    Rule(r"did not tolerate taint \(taint=(.+?)\)", "its node pools are reserved (taint {0})", hopeless=True),
    Rule(r"no nodepools found", "it has no node pool", hopeless=True),
    Rule(r"Insufficient (\S+?)(?:,|$)", "a new node would not have enough {0}", hopeless=True),
    Rule(r"untolerated taint \{(.+?)\}", "new nodes are reserved (taint {0})", hopeless=True),
    Rule(r"affinity/selector", "no node group has the nodes that it asks for", hopeless=True),
)
NO_MACHINES = ("FailedScaleUp", "FailedToScaleUpGroup", "InsufficientCapacityError")


def unscheduled(pod: Object, view: View) -> Why | None:
    """Why the pod has no node; None if it has one, or if nothing is known yet."""
    if bound(pod):
        return None
    events = view.events_of(pod)
    cause = _cause(pod, events, view)
    answer = next((each for each in reversed(events) if _is_answer(each)), None)
    if answer is None:
        # An autoscaler that is about to add a node has not said so yet.
        fresh = view.now - seconds(pod, "metadata", "creationTimestamp") < GRACE
        return replace(cause, hint=MAY_GROW, hopeless=False) if cause and cause.hopeless and fresh else cause
    if answer.reason in ("TriggeredScaleUp", "Nominated"):
        return _growing(answer, view)
    if answer.reason in NO_MACHINES:
        return Why("the cloud has no free machine of that kind for a new node",
                   f"it is asked again by itself; launch pools lists other kinds for --gpu, launch cancel {view.name} "
                   "gives the place up")  # fmt: skip
    return _not_growing(answer, cause, view)


def _is_answer(event: Event) -> bool:
    return event.reason in ("TriggeredScaleUp", "Nominated", "NotTriggerScaleUp", *NO_MACHINES) or _karpenter(event)


def _karpenter(event: Event) -> bool:
    return event.reason == "FailedScheduling" and event.message.startswith("Failed to schedule pod")


def _growing(event: Event, view: View) -> Why:
    found = first(SCALE_UP, event.message)
    detail = f" ({found.reason})" if found else ""
    ago = view.now - event.time
    if ago < SLOW_NODE:
        return Why(f"a node is being added{detail}, asked for {span(ago)} ago",
                   f"nothing to do: a new node takes minutes; launch cancel {view.name} gives it up")  # fmt: skip
    return Why(f"a node was asked for {span(ago)} ago{detail} and has not come",
               "kubectl get nodes; ask the owner of the cluster whether the cloud has such machines")  # fmt: skip


def _not_growing(event: Event, cause: Why | None, view: View) -> Why:
    found = first(NO_SCALE_UP, event.message) or Why(event.message.partition(": ")[2] or "it gave no reason", "", True)
    reason = cause.reason if cause else "no node fits"
    # The autoscaler may not be in charge of the nodes that are meant. Where they may be read and would do if they
    # were empty, what runs there ends one day; a full node group is no end either.
    would_do = bool(view.nodes) and cause is not None and not cause.hopeless
    hopeless = (found.hopeless and not would_do) or bool(cause and cause.hopeless)
    hint = WAIT.format(name=view.name) if not hopeless else cause.hint if cause and cause.hopeless else OTHER_KIND
    return Why(f"{reason}, and the autoscaler adds no node: {found.reason}", hint, hopeless)


def _cause(pod: Object, events: list[Event], view: View) -> Why | None:
    """What keeps the pod off the nodes there are."""
    status = next((each for each in items(pod, "status", "conditions") if text(each, "type") == "PodScheduled"), {})
    if text(status, "reason") == "SchedulingGated":
        return Why("it is held back by a scheduling gate", OWNER.format(**view.names(pod)))
    told = [each.message for each in events if each.reason == "FailedScheduling" and not _karpenter(each)]
    message = told[-1] if told else text(status, "message") if text(status, "reason") == "Unschedulable" else ""
    claims = [text(volume, "persistentVolumeClaim", "claimName") for volume in items(pod, "spec", "volumes")]
    names = view.names(pod) | {"claims": ", ".join(filter(None, claims)) or "of a pod", "selector": _selector(pod)}
    return first(VOLUMES, message, **names) or _from_nodes(pod, view) or _from_message(pod, message, names, view)


def _from_message(pod: Object, message: str, names: dict[str, str], view: View) -> Why | None:
    blamed = re.split(r"\.? preemption: ", message, maxsplit=1)[0]
    asks = requests(pod)
    short = sorted(set(re.findall(r"Insufficient ([^\s,]+?)[.,]*(?:\s|$)", blamed)), key=_importance)
    taints = re.findall(r"untolerated taint(?:\(s\))?(?: \{(.*?)\})?", blamed)
    own = [taint for taint in taints if taint.partition(":")[0] not in SYSTEM_TAINTS]
    reserved = [taint for taint in own if not _passing(taint)]
    # Nodes that are kept for pods with GPUs are nearer to fitting such a pod than those that have none.
    if any("gpu" in taint for taint in reserved) and any(map(is_gpu, asks)):
        return _reserved(next(taint for taint in reserved if "gpu" in taint))
    if short:
        return _insufficient(pod, short[0].rstrip("."), view)
    if any(_passing(taint) == "starting" for taint in own):
        return Why("a new node is not ready for pods yet", "nothing to do: it takes a minute or two")
    if reserved:
        return _reserved(reserved[0])
    if own:
        return Why("the nodes it could use are not ready", "kubectl get nodes; ask the owner of the cluster")
    if known := first(OTHERS, blamed, **names):
        return known
    rest = blamed.partition("nodes are available: ")[2] or blamed
    return Why(f"no node takes it: {rest}", OWNER.format(**names)) if rest else None


def _importance(resource: str) -> int:
    return 0 if is_gpu(resource) else {"memory": 1, "cpu": 2}.get(resource, 3)


def _passing(taint: str) -> str:
    """`starting` or `sick` for a taint that goes away by itself, else an empty string."""
    key = taint.partition(":")[0].strip()
    if key in STARTING_TAINTS:
        return "starting"
    sick = key.removeprefix("node.kubernetes.io/") in SICK_TAINTS or key == "node.kubernetes.io/unschedulable"
    return "sick" if sick else ""


def _reserved(taint: str) -> Why:
    named = f" (taint {re.sub(r': *', '=', taint, count=1).rstrip('=')})" if taint else ""
    return Why(f"the nodes it could use are reserved{named}, and the run may not use reserved nodes",
               "choose another kind with --gpu, or ask the owner of the cluster to add a toleration to the pool",
               True)  # fmt: skip


def _insufficient(pod: Object, resource: str, view: View) -> Why:
    asked = requests(pod).get(resource, 0.0)
    what = spell(resource, asked, "free ") if asked else f"enough free {'GPUs' if is_gpu(resource) else resource}"
    total = sum(_allocatable(node).get(resource, 0.0) for node in view.nodes or () if _open(pod, node))
    held = sum(requests(each).get(resource, 0.0) for each in view.pods if bound(each))
    share = f" (of {total:g} in all, this run holds {held:g})" if is_gpu(resource) and total else ""
    return Why(f"no node has {what}{share}", WAIT.format(name=view.name))


# -- the nodes, where they may be read


def _from_nodes(pod: Object, view: View) -> Why | None:
    """What would keep the pod off even if all nodes were empty."""
    asks = requests(pod)
    if not view.nodes or not asks:
        return None
    large = [node for node in view.nodes if _fits(asks, _allocatable(node)) >= 1]
    if not large:
        return _too_large(asks, view)
    unblocked = [node for node in large if _open(pod, node)]
    if not unblocked:
        blocking = [taint for node in large for taint in _blocking_taints(pod, node) if _matches(pod, node)]
        if blocking:
            return _reserved(blocking[0])
        return Why(f"no node has what its selector asks for{_selector(pod)}", OTHER_KIND, True)
    peers = view.workers if role(pod) == "worker" else 1
    places = sum(_fits(asks, _allocatable(node)) for node in unblocked)
    if places < peers:
        each = ", ".join(spell(resource, asks[resource]) for resource in sorted(asks, key=_importance)[:1])
        return Why(f"{peers} such pods with {each} each were asked for, and the cluster has room for {places}",
                   OTHER_KIND, True)  # fmt: skip
    return None


def _too_large(asks: dict[str, float], view: View) -> Why:
    largest = {each: max(_allocatable(node).get(each, 0.0) for node in view.nodes or ()) for each in asks}
    over = sorted((each for each in asks if asks[each] > largest[each]), key=_importance)
    if not over:
        wanted = " and ".join(spell(each, asks[each]) for each in sorted(asks, key=_importance)[:3])
        return Why(f"no node has {wanted} together", OTHER_KIND, True)
    resource = over[0]
    if not largest[resource]:
        return Why(f"it asks for {spell(resource, asks[resource])}, and no node of the cluster has any",
                   OTHER_KIND, True)  # fmt: skip
    return Why(f"it asks for {spell(resource, asks[resource])}, and the largest node has "
               f"{spell(resource, largest[resource])}", OTHER_KIND, True)  # fmt: skip


def requests(pod: Object) -> dict[str, float]:
    """What the pod asks of a node, by resource: that of its containers together, or of one init container."""

    def of(container: Object) -> dict[str, float]:
        limits, asked = dig(container, "resources", "limits"), dig(container, "resources", "requests")
        both = (limits if isinstance(limits, dict) else {}) | (asked if isinstance(asked, dict) else {})
        return {str(resource): amount(value) for resource, value in both.items()}

    total: dict[str, float] = {}
    for container in map(of, items(pod, "spec", "containers")):
        total = {each: total.get(each, 0.0) + container.get(each, 0.0) for each in total | container}
    for container in map(of, items(pod, "spec", "initContainers")):
        total = {each: max(total.get(each, 0.0), container.get(each, 0.0)) for each in total | container}
    return {resource: value for resource, value in total.items() if value > 0}


def _allocatable(node: Object) -> dict[str, float]:
    found = dig(node, "status", "allocatable")
    return {str(each): amount(value) for each, value in found.items()} if isinstance(found, dict) else {}


def _fits(asks: dict[str, float], has: dict[str, float]) -> int:
    """How many such pods an empty node holds."""
    return int(min((min(has.get(each, 0.0) / value, 1e6) for each, value in asks.items()), default=0.0))


def _open(pod: Object, node: Object) -> bool:
    """Whether the node's labels and lasting taints let the pod in."""
    return _matches(pod, node) and not _blocking_taints(pod, node)


def _blocking_taints(pod: Object, node: Object) -> list[str]:
    """Taints that the pod does not tolerate, but for those that go away by themselves."""
    tolerations = items(pod, "spec", "tolerations")
    taints = [each for each in items(node, "spec", "taints") if text(each, "effect") in ("NoSchedule", "NoExecute")]
    lasting = [taint for taint in taints if not _passing(text(taint, "key"))]
    return [
        f"{text(taint, 'key')}: {text(taint, 'value')}"
        for taint in lasting
        if not any(_tolerates(each, taint) for each in tolerations)
    ]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if text(toleration, "effect") not in ("", text(taint, "effect")):
        return False
    if text(toleration, "operator") == "Exists":
        return text(toleration, "key") in ("", text(taint, "key"))
    return all(text(toleration, part) == text(taint, part) for part in ("key", "value"))


def _matches(pod: Object, node: Object) -> bool:
    """Whether the node has the labels of the pod's selector and of one of its required affinity terms."""
    labels = dig(node, "metadata", "labels")
    wanted = dig(pod, "spec", "nodeSelector")
    if isinstance(wanted, dict) and any(text(labels, str(key)) != str(value) for key, value in wanted.items()):
        return False
    terms = items(pod, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution",
                  "nodeSelectorTerms")  # fmt: skip
    return not terms or any(
        all(_expression_holds(each, labels) for each in items(term, "matchExpressions")) for term in terms
    )


def _expression_holds(expression: Object, labels: Any) -> bool:
    value, values = text(labels, text(expression, "key")), dig(expression, "values")
    listed = [str(each) for each in values] if isinstance(values, list) else []
    checks = {"In": value in listed, "NotIn": value not in listed, "Exists": bool(value), "DoesNotExist": not value}
    # What is not known here (Gt, Lt) is left to the scheduler.
    return checks.get(text(expression, "operator"), True)


def _selector(pod: Object) -> str:
    wanted = dig(pod, "spec", "nodeSelector")
    pairs = [f"{key}={value}" for key, value in wanted.items()] if isinstance(wanted, dict) else []
    for term in items(pod, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution",
                      "nodeSelectorTerms")[:1]:  # fmt: skip
        for each in items(term, "matchExpressions"):
            values = dig(each, "values")
            listed = "|".join(str(value) for value in values) if isinstance(values, list) else ""
            pairs.append(f"{text(each, 'key')}={listed}".rstrip("="))
    return f" ({', '.join(pairs)})" if pairs else ""
