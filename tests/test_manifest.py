"""The objects of a run, byte for byte, valid by every rule that a cluster has for them.

The golden files are what `--dry-run` prints. After a change that is meant, `RAYLAUNCH_GOLDEN=write pytest
tests/test_manifest.py` writes them anew; the diff in git is then what has to be looked at.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.labels import KUEUE_PRIORITY_LABEL, QUEUE_LABEL, ROLE_LABEL, RUN_LABEL
from launcher.manifest import Submission
from launcher.operate import manifest_text
from launcher.pools import Pool
from launcher.runs import driver_command
from launcher.site import quantity
from launcher.spec import NAME_PATTERN, Spec
from tests.kube.schema import CRD_FOLDER, validator
from tests.kube.validation import rayjob_error
from tests.pools import plan, pool, site
from tests.pools.manifests import CASES, objects, templates, text, words

GOLDEN = Path(__file__).parent / "golden"
every_case = pytest.mark.parametrize("case", CASES)


# -- what it is, byte for byte


@every_case
def test_the_manifest_is_the_golden_text(case: str) -> None:
    golden = GOLDEN / f"manifest_{case}.yaml"
    if os.environ.get("RAYLAUNCH_GOLDEN") == "write":
        golden.write_text(text(case))
    wanted = golden.read_text() if golden.exists() else ""
    difference = difflib.unified_diff(wanted.splitlines(), text(case).splitlines(), golden.name, "now", lineterm="")
    assert text(case) == wanted, "\n".join(["", *difference])


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("manifest_*")} == {f"manifest_{case}.yaml" for case in CASES}


# -- what a cluster makes of it


@every_case
def test_the_ray_job_is_valid_for_kuberay(case: str) -> None:
    """Without unknown fields, which a server would drop without a word."""
    _, job = objects(case)
    assert rayjob_error(job) == ""
    checker = validator("ray.io", "v1", "rayjobs")
    if checker is None:
        pytest.skip(f"KubeRay's definitions are not at {CRD_FOLDER}")
    assert checker.errors(job) == []
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "typo"
    assert len(checker.errors(job)) == 1


@pytest.mark.parametrize("version", ["1.33", "1.36"])
@every_case
def test_every_pod_is_valid_for_kubernetes(case: str, version: str) -> None:
    config, job = objects(case)
    kubernetes_validate.validate(config, version, strict=True)
    for role, template in templates(job).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = role
        kubernetes_validate.validate(pod, version, strict=True)
        pod["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(kubernetes_validate.ValidationError, match="'resource' was unexpected"):
            kubernetes_validate.validate(pod, version, strict=True)


@every_case
def test_the_run_ends_by_every_clock_and_is_tried_again_by_nobody_but_us(case: str) -> None:
    _, job = objects(case)
    spec, layout = job["spec"], CASES[case]().layout
    assert layout is not None
    assert len(job["metadata"]["name"]) <= 47
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["preRunningDeadlineSeconds"] == layout.start_seconds >= 1
    assert spec["activeDeadlineSeconds"] == layout.max_seconds >= 1
    # Deletion rules and these clocks exclude each other, and no rule covers a stopped job.
    assert "deletionStrategy" not in spec
    assert "suspend" not in spec, "Kueue sets it itself; without Kueue nobody would ever clear it"
    assert spec["backoffLimit"] == 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == layout.pods


@every_case
def test_the_dashboard_is_closed(case: str) -> None:
    config, job = objects(case)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress")
    assert [item["kind"] for item in (config, job)] == ["ConfigMap", "RayJob"]
    assert not [word for word in words(job) if re.search("ingress|LoadBalancer|NodePort|hostPort", word, re.IGNORECASE)]


@every_case
def test_the_head_trains_nothing_and_workers_get_what_they_ask_for(case: str) -> None:
    _, job = objects(case)
    layout, where = CASES[case]().layout, CASES[case]().pool.site
    assert layout is not None
    assert where is not None
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert {key: head["rayStartParams"][key] for key in ("num-cpus", "num-gpus")} == {"num-cpus": "0", "num-gpus": "0"}
    for role, template in templates(job).items():
        (container,) = template["spec"]["containers"]
        asked = container["resources"]
        assert asked["requests"] == asked["limits"]
        assert (where.gpu_resource in asked["limits"]) == (role == "worker" and layout.gpus > 0)
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = templates(job)["worker"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["memory"].removesuffix("Mi")) * 2**20 <= layout.memory
    assert workers["rayStartParams"]["num-cpus"] == limits["cpu"] == str(layout.cpus)
    assert workers["rayStartParams"].get("num-gpus", "0") == limits.get(where.gpu_resource, "0") == str(layout.gpus)


@every_case
def test_a_pod_goes_where_its_offer_is(case: str) -> None:
    _, job = objects(case)
    layout, where = CASES[case]().layout, CASES[case]().pool.site
    assert layout is not None
    assert where is not None
    for role, template in templates(job).items():
        selector = layout.node_type.node_selector | layout.offer.node_selector
        wanted = selector if role == "worker" else where.head.node_selector
        assert template["spec"].get("nodeSelector", {}) == wanted
        keys = {item["key"] for item in template["spec"]["tolerations"]}
        # The head is never on a node that is taken away.
        own = (*layout.node_type.tolerations, *layout.offer.tolerations) if role == "worker" else ()
        lost = {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
        assert keys == {item.key for item in own} | lost


@every_case
def test_the_queue_and_the_priority_are_where_they_count(case: str) -> None:
    _, job = objects(case)
    made = CASES[case]()
    queue, priority = made.pool.site.queue if made.pool.site else None, made.spec.resources.priority
    labels = job["metadata"]["labels"]
    assert labels.get(QUEUE_LABEL) == queue
    assert labels.get(KUEUE_PRIORITY_LABEL) == (priority if queue else None)
    classes = {template["spec"].get("priorityClassName") for template in templates(job).values()}
    assert classes == {None if queue else priority}
    # Kueue counts the head, each group of workers and the submitter, and takes 18 at most.
    assert 2 + len(job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 18


@every_case
def test_everything_of_a_run_is_found_by_its_labels(case: str) -> None:
    config, job = objects(case)
    name, where = job["metadata"]["name"], CASES[case]().pool.site
    assert where is not None
    assert {item["metadata"]["labels"][RUN_LABEL] for item in (config, job)} == {name}
    assert {item["metadata"].get("namespace") for item in (config, job)} == {where.namespace}
    for role, template in templates(job).items():
        assert template["metadata"]["labels"][RUN_LABEL] == name
        assert template["metadata"]["labels"][ROLE_LABEL] == role
    submitter = templates(job)["submitter"]["spec"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in submitter["volumes"]


@every_case
def test_the_spec_and_the_plan_arrive_whole(case: str) -> None:
    config, _ = objects(case)
    assert set(config["data"]) == {"spec.json", "plan.json"}
    assert Spec.model_validate_json(config["data"]["spec.json"]) == CASES[case]().spec
    assert json.loads(config["data"]["plan.json"]) == json.loads(json.dumps(CASES[case]().to_json()))


@every_case
def test_the_head_has_room_for_the_drivers_of_trials_of_several_workers(case: str) -> None:
    _, job = objects(case)
    where, made = CASES[case]().pool.site, CASES[case]().spec
    assert where is not None
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    memory = quantity(templates(job)["head"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    if case != "sweep":
        assert "resources" not in head["rayStartParams"]
        assert memory == quantity(where.head.memory)
        return
    assert made.sweep is not None
    assert (made.sweep.concurrent, made.resources.workers) == (2, 4)
    assert memory == quantity(where.head.memory) + 3 * 2**30
    # KubeRay's command is a shell's; Ray wants JSON.
    words = f"ray start --head --resources={head['rayStartParams']['resources']} --block"
    found = subprocess.run(["/bin/bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    (given,) = (line for line in found.stdout.splitlines() if line.startswith("--resources="))
    assert json.loads(given.removeprefix("--resources=")) == {"trial": 2}


def test_what_earlier_attempts_cost_shortens_this_one() -> None:
    made = CASES["spot_queue"]()
    first, second = (
        Submission(made.spec, made.pool, {}, "s3://b/run", "a", spent=spent).ray_job() for spent in (0.0, 250.0)
    )
    assert second["spec"]["activeDeadlineSeconds"] == pytest.approx(first["spec"]["activeDeadlineSeconds"] / 2, abs=1)


# -- what a user may type


ODD = [
    "$(HOME)", "$HOME `id` \\", "a b\tc", "it's; rm -rf \"x\" & | > < * ? # ~ !", "new\nline", "$$(RAY)", "-x", "ünï",
    "{a,b}", "%s {0}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `bash -c`, which is how Ray starts a driver, hands to `python` as its arguments."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "python").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {folder}/argv\n")
    (folder / "python").chmod(0o755)

    def run(command: str) -> list[str]:
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/root"}
        subprocess.run(["/bin/bash", "-c", command], env=environment, check=True, timeout=30)
        return (folder / "argv").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]

    return run


@pytest.mark.parametrize("odd", ODD)
def test_odd_addresses_reach_the_driver_and_the_submitter_unchanged(odd: str, shell: Any) -> None:
    uri, storage = f"s3://data/{odd}", f"s3://runs/{odd}"
    made = plan(pool("cpu-pool"), uri=uri, storage=storage)
    config, job = yaml.safe_load_all(manifest_text(made, f"{storage}/{made.spec.name}"))
    assert shell(job["spec"]["entrypoint"]) == ["-m", "trainers.driver", f"{storage}/{made.spec.name}"]
    spec = Spec.model_validate_json(config["data"]["spec.json"])
    assert (spec.data.uri, spec.storage) == (uri, storage)
    (container,) = templates(job)["submitter"]["spec"]["containers"]
    known = {"HOME": "/root", "RAY": "x"} | {item["name"]: item["value"] for item in container["env"]}
    argv = [expanded(word, known) for word in container["command"]]
    assert argv[:4] == ["python", "-m", "trainers.submitter", f"{storage}/{made.spec.name}"]
    assert "args" not in container


def expanded(word: str, known: dict[str, str]) -> str:
    """What a kubelet makes of a word of a command: `$(NAME)` is filled in where the name is known, `$$` is `$`."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))", lambda found: "$" if found[1] is None else known.get(found[1], found[0]), word
    )


@settings(max_examples=30, deadline=None)
@given(uri=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_any_address_is_one_argument_of_the_driver(uri: str, shell: Any) -> None:
    assert shlex.split(driver_command(uri)) == ["python", "-m", "trainers.driver", uri]
    assert shell(driver_command(uri)) == ["-m", "trainers.driver", uri]


LABEL = r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"


@example(name="a", kind=f"{'a' * 39}-b")
@example(name="a", kind=f"{'a' * 39}.b")
@settings(deadline=None)
@given(name=st.from_regex(NAME_PATTERN.strip("^$"), fullmatch=True), kind=st.from_regex(LABEL, fullmatch=True))
def test_any_name_of_a_run_and_of_a_node_type_makes_valid_objects(name: str, kind: str) -> None:
    node = site("cpu-pool").node_types[0].model_copy(update={"name": kind})
    where = Pool.of("pool", site("cpu-pool").model_copy(update={"node_types": (node,)}))
    _, job = yaml.safe_load_all(manifest_text(plan(where, name=name), f"s3://runs/{name}"))
    assert job["metadata"]["name"] == name
    assert rayjob_error(job) == ""
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    # It becomes the value of a label, and a part of the names of pods.
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", workers["groupName"])
