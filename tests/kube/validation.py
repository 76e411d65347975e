"""The rules KubeRay v1.7.0 checks before it touches a RayJob (`utils/validation.go`); the API server checks none."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from tests.kube.schema import Object

MAX_NAME = 47
_DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_INVALID = "The RayJob spec is invalid: "
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def rayjob_error(job: Object) -> str:
    """The first rule a RayJob breaks, in KubeRay's words, or nothing."""
    return next(_errors(job), "")


def _errors(job: Object) -> Iterator[str]:
    name, spec = job["metadata"]["name"], job["spec"]
    if len(name) > MAX_NAME:
        yield f"The RayJob metadata is invalid: RayJob name should be no more than {MAX_NAME} characters"
    if not re.fullmatch(_DNS_1035, name):
        yield "The RayJob metadata is invalid: RayJob name should be a valid DNS1035 label: [a DNS-1035 label must consist of lower case alphanumeric characters or '-']"  # noqa: E501
    yield from _lifecycle_errors(spec)
    yield from _mode_errors(spec)
    if spec.get("rayClusterSpec"):
        if (spec["rayClusterSpec"].get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield f"{_INVALID}K8s token auth mode is currently not supported for RayJob"
        yield from (_INVALID + text for text in cluster_errors(spec["rayClusterSpec"]))
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except yaml.YAMLError as error:
        yield f"failed to unmarshal RuntimeEnvYAML: {spec['runtimeEnvYAML']}: {error}"
    for field, lowest in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        if spec.get(field) is not None and spec[field] < lowest:
            yield f"{_INVALID}{field} must be a positive integer"


def _lifecycle_errors(spec: Object) -> Iterator[str]:
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    strategy = spec.get("deletionStrategy")
    if spec.get("suspend") and not shutdown:
        yield f"{_INVALID}a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if ttl < 0:
        yield f"{_INVALID}TTLSecondsAfterFinished must be a non-negative integer"
    if not shutdown and ttl > 0:
        yield f"{_INVALID}a RayJob with shutdownAfterJobFinishes set to false cannot have TTLSecondsAfterFinished"
    if strategy is None:
        return
    legacy, rules = strategy.get("onSuccess") or strategy.get("onFailure"), strategy.get("deletionRules")
    if rules and shutdown:
        both = "spec.shutdownAfterJobFinishes and spec.deletionStrategy.deletionRules are mutually exclusive"
        yield _INVALID + both
    if rules and legacy:
        yield f"{_INVALID}Cannot use both legacy onSuccess/onFailure fields and deletionRules simultaneously"
    if not rules and not legacy:
        yield f"{_INVALID}DeletionStrategy requires either BOTH onSuccess and onFailure, OR the deletionRules field (cannot be empty)"  # noqa: E501
    for index, rule in enumerate(rules or []):
        condition = rule.get("condition") or {}
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield f"deletionRules[{index}]: exactly one of JobStatus and JobDeploymentStatus must be set"


def _mode_errors(spec: Object) -> Iterator[str]:
    selector, mode = spec.get("clusterSelector") or {}, spec.get("submissionMode")
    retries = spec.get("backoffLimit") or 0
    if spec.get("suspend") and selector:
        yield f"{_INVALID}the ClusterSelector mode doesn't support the suspend operation"
    if not spec.get("rayClusterSpec") and not selector:
        yield f"{_INVALID}one of RayClusterSpec or ClusterSelector must be set"
    if selector and not selector.get("ray.io/cluster"):
        yield "cluster name in ClusterSelector should not be empty"
    if selector and retries > 0:
        yield f"{_INVALID}BackoffLimit is incompatible with ClusterSelector mode"
    if mode == "InteractiveMode" and retries > 0:
        yield f"{_INVALID}BackoffLimit is incompatible with InteractiveMode"
    if mode == "SidecarMode" and spec.get("submitterPodTemplate"):
        yield "Currently, SidecarMode doesn't support SubmitterPodTemplate"
    if mode == "SidecarMode" and spec.get("submitterConfig"):
        yield "Currently, SidecarMode doesn't support SubmitterConfig"


def cluster_errors(spec: Object) -> Iterator[str]:
    """What is wrong with a RayClusterSpec."""
    head = spec["headGroupSpec"]
    if not head["template"]["spec"].get("containers"):
        yield "headGroupSpec should have at least one container"
    yield from _group_errors("Head", head)
    for group in spec.get("workerGroupSpecs") or []:
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not group["template"]["spec"].get("containers"):
            yield "workerGroupSpec should have at least one container"
        if not spec.get("enableInTreeAutoscaling") and (least is None or most is None):
            yield f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled"
        if least is not None and most is not None and least > most:
            yield f"worker group {name} has minReplicas {least} greater than maxReplicas {most}"
        yield from _group_errors(name, group)
    if (spec.get("authOptions") or {}).get("mode") == "token":
        yield from _auth_errors(str(spec.get("rayVersion") or ""))


def _group_errors(name: str, group: Object) -> Iterator[str]:
    params = group.get("rayStartParams") or {}
    if group.get("resources") and any(params.get(key) for key in _RESOURCE_PARAMS):
        both = "resource fields should not be set in both rayStartParams and Resources"
        yield f"{both} for {name} group; please use only one"
    if "labels" in params:
        instead = "please use the top-level Labels field instead"
        yield f"rayStartParams['labels'] is not supported for {name} group; {instead}"


def _auth_errors(version: str) -> Iterator[str]:
    if not version:
        yield "authOptions.mode is 'token' but RayVersion was not specified. Ray version 2.52.0 or later is required"
        return
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match is None:
        yield f"authOptions.mode is 'token' but RayVersion format is invalid: {version}"
    elif (int(match[1]), int(match[2])) < (2, 52):
        yield f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {version}"
