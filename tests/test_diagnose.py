"""Recorded situations have exactly the sentences beside them; no mutilation of them makes `diagnose` fail."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.diagnose import LONGEST, Scene, Verdict, diagnose, pods, queueing, scheduling
from launcher.diagnose.observed import Rule, first, seconds, span, spell
from launcher.diagnose.scheduling import GRACE, requests
from launcher.errors import Exit, NeverStartedError, from_record
from launcher.runs import Status

PENDING = Path(__file__).parent / "pending"
PARTS = ("rayjob", "raycluster", "pods", "events", "workload", "nodes")


class Loader(yaml.SafeLoader):
    """YAML in which a time is text, as in the JSON that the API server sends."""


Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.load(path.read_text(), Loader)
    return document


def scene_of(document: dict[str, Any]) -> Scene:
    pods, events, nodes = (document.get(part) for part in ("pods", "events", "nodes"))
    return Scene(
        document.get("rayjob"), document.get("raycluster"), tuple(pods or ()), tuple(events or ()),
        document.get("workload"), None if nodes is None else tuple(nodes),
    )  # fmt: skip


def moment(document: dict[str, Any]) -> float:
    return seconds(document, "now")


def judge(document: dict[str, Any], later: float = 0.0) -> Verdict:
    return diagnose(scene_of(document), moment(document) + later)


SITUATIONS = {path.stem.partition("-")[2]: load(path) for path in sorted(PENDING.glob("*.yaml"))}
situations = pytest.mark.parametrize("document", SITUATIONS.values(), ids=SITUATIONS.keys())


def check(verdict: Verdict) -> None:
    """What holds of every verdict."""
    for sentence in (verdict.reason, verdict.hint):
        assert len(sentence) <= LONGEST
        assert sentence == sentence.strip()
        assert sentence.isprintable()
        assert not sentence.endswith((".", ":", ";"))
    assert verdict.hint or not verdict.hopeless
    assert verdict.reason or verdict.status in (Status.RUNNING, Status.SUCCEEDED)
    assert (verdict.error is not None) == (verdict.status in (Status.FAILED, Status.INTERRUPTED))
    if verdict.error:
        assert (verdict.error.what, verdict.error.hint) == (verdict.reason, verdict.hint)
    assert not (verdict.hopeless and verdict.status.final)


@situations
def test_a_recorded_situation_has_its_sentences(document: dict[str, Any]) -> None:
    verdict = judge(document)
    told = {"status": verdict.status.value, "reason": verdict.reason, "hint": verdict.hint,
            "hopeless": verdict.hopeless}  # fmt: skip
    if verdict.error:
        told["error"] = type(verdict.error).__name__
    assert told == document["expect"]
    check(verdict)


@situations
def test_the_order_of_what_the_cluster_lists_does_not_matter(document: dict[str, Any]) -> None:
    shuffled = copy.deepcopy(document)
    for part in ("events", "nodes"):
        random.Random(1).shuffle(shuffled.get(part) or [])
    assert judge(shuffled).reason == judge(document).reason


@situations
def test_events_of_the_old_and_of_the_new_kind_say_the_same(document: dict[str, Any]) -> None:
    renamed = copy.deepcopy(document)
    for event in renamed.get("events") or []:
        event["regarding"] = event.pop("involvedObject", None) or event["regarding"]
        event["note"] = event.pop("message", None) or event["note"]
        event["series"] = {"lastObservedTime": event.pop("lastTimestamp") or event.pop("eventTime")}
        event["reportingController"] = event.pop("source", {}).get("component", "")
    assert judge(renamed).reason == judge(document).reason


def test_events_of_an_earlier_pod_of_that_name_are_not_its_own() -> None:
    document = copy.deepcopy(SITUATIONS["no-addresses"])
    document["pods"][1]["metadata"]["uid"] = "new"
    document["events"][0]["involvedObject"]["uid"] = "old"
    assert "address" not in judge(document).reason


def test_pods_of_an_earlier_attempt_are_not_its_own() -> None:
    document = copy.deepcopy(SITUATIONS["no-addresses"])
    document["pods"][1]["metadata"]["labels"]["ray.io/cluster"] = "flowers-9k4tz"
    assert "address" in judge(document).reason
    document["pods"][1]["metadata"]["labels"]["ray.io/cluster"] = "flowers-older"
    assert "address" not in judge(document).reason


def test_an_error_of_a_run_that_never_started_keeps_its_exit_code() -> None:
    error = judge(SITUATIONS["never-started"]).error
    assert isinstance(error, NeverStartedError)
    assert error.where == "RayJob ml/flowers"
    assert from_record(error.to_record()).exit_code is Exit.NEVER_STARTED


def test_an_autoscaler_is_given_time_before_a_run_is_called_hopeless() -> None:
    document = SITUATIONS["never-fits"]
    created = seconds(document["pods"][-1], "metadata", "creationTimestamp")
    before, after = (judge(document, created - moment(document) + GRACE + step) for step in (-1, 1))
    assert (before.reason, before.hopeless, after.hopeless) == (after.reason, False, True)
    assert before.hint == "nothing to do yet: an autoscaler may add a node"


def test_the_last_answer_of_an_autoscaler_counts() -> None:
    document = copy.deepcopy(SITUATIONS["scale-up-impossible"])
    grown = copy.deepcopy(SITUATIONS["scale-up"]["events"][1])
    for event, late in ((grown, False), (copy.deepcopy(grown), True)):
        event["involvedObject"]["name"] = document["events"][0]["involvedObject"]["name"]
        event["lastTimestamp"] = "2026-11-23T12:09:30Z" if late else "2026-11-23T12:08:30Z"
        scene = scene_of(document | {"pods": document["pods"][:2], "events": [document["events"][0], event]})
        assert diagnose(scene, moment(document)).hopeless is not late


def test_an_autoscaler_that_adds_nothing_is_no_end_where_nodes_empty_one_day() -> None:
    document = SITUATIONS["scale-up-impossible"] | {"nodes": SITUATIONS["scale-up-at-maximum"]["nodes"]}
    assert not judge(document).hopeless


def test_what_the_operator_has_just_been_given_is_not_called_forgotten() -> None:
    document = SITUATIONS["operator-absent"]
    young = judge(document, -590)
    assert (young.status, young.hopeless) == (Status.PENDING, False)


@pytest.mark.parametrize("state", ["", "Initializing"])
def test_a_run_starts_when_its_last_pod_has_a_node(state: str) -> None:
    document = copy.deepcopy(SITUATIONS["no-addresses"])
    document["rayjob"]["status"]["jobDeploymentStatus"] = state
    assert judge(document).status is Status.STARTING
    assert judge(document | {"pods": document["pods"][:-1]}).status is Status.PENDING


@pytest.mark.parametrize(
    "secret",
    [
        "https://robot:hunter2hunter2@registry.acme.internal/v2/",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hunter2hunter2&X-Amz-Expires=60",
        "Authorization: Bearer hunter2hunter2.abc",
        "aws_secret_access_key=hunter2hunter2",
        'password="hunter2hunter2"',
        "ghp_hunter2hunter2hunter2",
    ],
)
@pytest.mark.parametrize("name", ["validation-failed", "driver-failed", "submission-failed", "retrying"])
def test_no_sentence_repeats_a_credential(name: str, secret: str) -> None:
    document = copy.deepcopy(SITUATIONS[name])
    document["rayjob"]["status"]["message"] = f"it broke at {secret}, and now it is broken"
    verdict = judge(document)
    assert "it broke at" in verdict.reason
    assert "hunter2" not in f"{verdict.reason} {verdict.hint} {verdict.error}"


def test_a_pod_asks_for_its_containers_together_or_for_its_largest_init_container() -> None:
    def asks(**resources: str) -> dict[str, Any]:
        return {"resources": {"requests": resources}}

    pod = {"spec": {"containers": [asks(cpu="1500m", memory="1Gi"), {"resources": {"limits": {"nvidia.com/gpu": "2"}}}],
                    "initContainers": [asks(cpu="1", memory="2Gi")]}}  # fmt: skip
    assert requests(pod) == {"cpu": 1.5, "memory": 2**31, "nvidia.com/gpu": 2}


def test_numbers_are_spelled_in_the_words_of_a_person() -> None:
    assert [span(each) for each in (3, 99, 100, 5399, 5400, 3600 * 12)] == [
        "3 s", "99 s", "2 min", "90 min", "1.5 hours", "12 hours",
    ]  # fmt: skip
    assert [spell(*each) for each in (("nvidia.com/gpu", 1), ("cpu", 2.5), ("requests.memory", 2**35))] == [
        "1 GPU", "2.5 CPU cores", "32 GiB of memory",
    ]  # fmt: skip


MESSAGES = (
    (pods.PULLS, "image operating system ... no match for platform in manifest", "it is not built for"),
    (pods.PULLS, "dial tcp 10.0.0.1:443: i/o timeout", "its registry does not answer"),
    (pods.PULLS, "write /var/lib/containerd/x: no space left on device", "node gpu-1 has no disk space left for it"),
    (pods.PULLS, "tls: failed to verify certificate: x509: certificate signed by unknown authority", "is not trusted"),
    (pods.PULLS, "unexpected status from HEAD request to https://ghcr.io/v2/: 403 Forbidden", "refuses the cluster"),
    (pods.PULLS, "pull access denied, repository does not exist or may require authorization", "it does not exist, or"),
    (pods.STARTS, 'exec: "ray": executable file not found in $PATH: unknown', "the image has no program ray"),
    (pods.STARTS, "exec /usr/bin/python: exec format error", "is not built for the processor of node gpu-1"),
    (pods.STARTS, "nvidia-container-cli: initialization error: nvml error: driver not loaded", "GPU of node gpu-1"),
    (pods.CONFIGS, "couldn't find key token in Secret ml/flowers", "Secret ml/flowers has no key token"),
    (pods.POD_ENDS, "Evicted The node was low on resource: ephemeral-storage. Threshold", "short of ephemeral-storage"),
    (pods.POD_ENDS, "Terminated Pod was terminated in response to imminent node shutdown.", "node gpu-1 was shut down"),
    (pods.POD_ENDS, "OutOfcpu Node didn't have enough resource: cpu", "node gpu-1 refused it: Node didn't have"),
    (pods.POD_ENDS, "UnexpectedAdmissionError Pod was rejected: no healthy devices", "node gpu-1 refused it: Pod was"),
    (pods.DISRUPTIONS, "DeletionByTaintManager", "node gpu-1 stopped answering or was closed"),
    (
        pods.REFUSALS,
        'admission webhook "policy.acme.io" denied the request: no owner label',
        "refuses the pod: no owner",
    ),
    (pods.REFUSALS, "no PriorityClass with name urgent was found", "there is no priority class urgent"),
    (pods.REFUSALS, 'User "system:serviceaccount:ray:op" cannot create resource "pods" in', "may not create pods"),
    (pods.REFUSALS, "minimum cpu usage per Container is 1, but request is 500m.", "at least 1 of cpu per Container"),
    (pods.REFUSALS, "failed quota: q: must specify cpu for: ray-head", "wants pods to state cpu for: ray-head"),
    (
        pods.ON_NODE["FailedAttachVolume"],
        'Multi-Attach error for volume "pvc-1" Volume is',
        "volume pvc-1 is still held",
    ),
    (
        pods.ON_NODE["FailedMount"],
        'MountVolume.SetUp failed for volume "c" : rpc error',
        "volume c cannot be mounted: rpc",
    ),
    (scheduling.NO_SCALE_UP, "1 in backoff after failed scale-up", "the last attempt to add a node failed"),
    (scheduling.NO_SCALE_UP, "exceed limits for nodepool (NodePool=gpu)", "node pool gpu is at its limit"),
    (scheduling.NO_SCALE_UP, "did not tolerate taint (taint=dedicated=b:NoSchedule)", "reserved (taint dedicated=b"),
    (scheduling.NO_SCALE_UP, 'incompatible requirements, label "x/y" does not have known', "no node pool offers x/y"),
    (scheduling.SCALE_UP, "Pod should schedule on: node/ip-10-0-0-1", "Karpenter's ip-10-0-0-1"),
    (scheduling.VOLUMES, '0/3 nodes are available: persistentvolumeclaim "data" not found.', "no volume claim data"),
    (scheduling.OTHERS, "3 node(s) didn't match pod anti-affinity rules", "a pod that it must not share"),
    (queueing.HELD, "Workload no longer fits after processing another workload", "another run got the quota"),
    (queueing.HELD, "LocalQueue team-a is stopped", "queue team-a is stopped"),
    (queueing.HELD, "workload namespace doesn't match ClusterQueue selector", "does not take runs of namespace ml"),
    (queueing.EVICTIONS, "PodsReadyTimeout Exceeded the PodsReady timeout ml/x", "its pods were not ready in time"),
)
NAMES = {"name": "flowers", "ns": "ml", "pod": "p", "node": "node gpu-1", "queue": "team-a", "claims": "c",
         "selector": ""}  # fmt: skip


@pytest.mark.parametrize(("table", "message", "said"), MESSAGES)
def test_a_message_is_put_in_words(table: tuple[Rule, ...], message: str, said: str) -> None:
    why = first(table, message, **NAMES)
    assert why is not None
    assert said in why.reason


def test_every_rule_names_only_what_it_is_given() -> None:
    """A `{1}` without a second group would raise, and only on the day that the message comes."""
    given_names = {"SCALE_UP": set(), "NO_SCALE_UP": set(), "REFUSALS": {"name", "ns"},
                   "VOLUMES": set(NAMES) - {"queue"}, "OTHERS": set(NAMES) - {"queue"},
                   "HELD": {"name", "ns", "queue"}, "EVICTIONS": {"name", "ns", "queue"}}  # fmt: skip
    seen = 0
    for module in (pods, scheduling, queueing):
        for title, table in vars(module).items():
            rows = [row for part in table.values() for row in part] if title == "ON_NODE" else table
            for rule in rows if isinstance(rows, list | tuple) else ():
                if isinstance(rule, Rule):
                    groups = {str(number) for number in range(re.compile(rule.pattern).groups)}
                    fields = {field for part in (rule.reason, rule.hint) for _, field, *_ in Formatter().parse(part)}
                    assert fields - {None} <= groups | given_names.get(title, {"name", "ns", "pod", "node"}), rule
                    seen += 1
    assert seen > 90


def test_every_state_of_a_rayjob_is_known() -> None:
    for state in ("", "Initializing", "Running", "Waiting", "Suspending", "Suspended", "Retrying", "Complete",
                  "Failed", "ValidationFailed", "Unheard"):  # fmt: skip
        for job in ("", "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "UNHEARD"):
            status = {"jobDeploymentStatus": state, "jobStatus": job, "reason": "Unheard"}
            check(diagnose(Scene(rayjob={"metadata": {"name": "flowers"}, "status": status}), 0.0))
            if job == "SUCCEEDED":
                continue
            assert diagnose(Scene(rayjob={"status": status}), 0.0).status is not Status.SUCCEEDED


# -- mutilation

JUNK: tuple[Any, ...] = (
    None, "", "{0} {pod} %s \x1b[31m\n.", "9" * 400, 0, -1, True, 1e308, float("nan"), [], [None, "x", {}], {}, {"": 1},
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key within a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _mutilated(document: dict[str, Any], cuts: list[tuple[int, int]]) -> dict[str, Any]:
    broken = copy.deepcopy({part: document[part] for part in PARTS if part in document})
    for where, how in cuts:
        places = [place for part in broken.values() for place in _places(part)]
        if not places:
            break
        container, key = places[where % len(places)]
        if how >= len(JUNK):
            del container[key]
        else:
            container[key] = copy.deepcopy(JUNK[how])
    return broken


cuts = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, len(JUNK) + 3)), min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(list(SITUATIONS)), cuts, st.sets(st.sampled_from(PARTS)), st.floats(-1e10, 1e10))
def test_no_mutilation_makes_it_fail(name: str, cuts: list[tuple[int, int]], gone: set[str], later: float) -> None:
    document = SITUATIONS[name]
    broken = {part: value for part, value in _mutilated(document, cuts).items() if part not in gone}
    check(diagnose(scene_of(broken), moment(document) + later))


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
names = st.sampled_from(
    ["metadata", "spec", "status", "conditions", "type", "reason", "message", "labels", "state", "name"]
) | st.text(max_size=3)


def branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5)


anything = leaves | branches(leaves | branches(leaves | branches(leaves)))
anythings = st.dictionaries(st.sampled_from(["metadata", "spec", "status", "type", "reason"]), anything)


@settings(max_examples=300, deadline=None)
@given(st.none() | anythings, anythings, st.lists(anythings, max_size=3), st.none() | anythings)
def test_no_object_makes_it_fail(job: Any, cluster: Any, others: list[Any], workload: Any) -> None:
    many = tuple(others)
    check(diagnose(Scene(job, cluster, many, many, workload, many), 1.7e9))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([name for name in SITUATIONS if SITUATIONS[name].get("events")]), st.data())
def test_nobody_but_its_pods_and_events_explains_a_pod(name: str, data: st.DataObject) -> None:
    """Without its events a pod is explained by less, never by something else that is wrong."""
    document = SITUATIONS[name]
    kept = data.draw(st.lists(st.sampled_from(document["events"]), max_size=3))
    verdict = judge(document | {"events": kept})
    check(verdict)
    assert verdict.status == document["expect"]["status"]


def test_a_scene_is_left_as_it_was() -> None:
    for document in SITUATIONS.values():
        before = json.dumps(document)
        judge(document)
        assert json.dumps(document) == before
