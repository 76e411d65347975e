"""The connection to a cluster: where it leads, and what it reads, writes and watches there."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cluster import CONFIG_MAPS, EVENTS, LOCAL_QUEUES, PODS, RAY_JOBS, Cluster, ConflictError, ExpiredError
from launcher.errors import InfrastructureError, SiteError, UserError
from tests.kube.apiserver import ApiServer
from tests.kube.manifests import rayjob
from tests.kube.schema import CRD_FOLDER
from tests.scripted import OK, Script, config_map, failure, kubeconfig

# -- where it leads


def test_the_current_context_and_its_namespace_are_meant_unless_others_are_named(
    api: ApiServer, cluster: Cluster
) -> None:
    assert (cluster.context, cluster.namespace, cluster.where) == ("here", "team", "here/team")
    there = Cluster.connect("there")
    assert (there.context, there.namespace) == ("there", "default")
    assert Cluster.connect("there", "elsewhere").namespace == "elsewhere"
    assert Cluster.connect(None, "elsewhere").where == "here/elsewhere"
    assert api.requests == [], "nothing is asked yet"


def test_an_unknown_context_names_the_nearest_and_all(cluster: Cluster) -> None:
    del cluster
    error = failure(lambda: Cluster.connect("their"), UserError)
    assert str(error) == "--context: the kubeconfig has no context their; did you mean there?"
    assert error.hint == "it has here, there"


def test_the_variable_may_change_and_name_several_files(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, api: ApiServer
) -> None:
    cluster.create(CONFIG_MAPS, config_map("first"))
    with ApiServer() as other:
        path = other.kubeconfig(tmp_path / "other", namespace="team", context="other")
        monkeypatch.setenv("KUBECONFIG", str(path))
        assert Cluster.connect().get(CONFIG_MAPS, "first") is None
        monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'config'}:{path}:{tmp_path / 'not there'}")
        assert Cluster.connect("here").get(CONFIG_MAPS, "first") is not None
        assert Cluster.connect("other").get(CONFIG_MAPS, "first") is None
        assert (len(api.requests), len(other.requests)) == (2, 2)


def test_without_a_current_context_one_has_to_be_named(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kubeconfig(tmp_path / "config", api.url)
    document = yaml.safe_load(path.read_text())
    del document["current-context"]
    path.write_text(yaml.safe_dump(document))
    monkeypatch.setenv("KUBECONFIG", str(path))
    error = failure(Cluster.connect, UserError)
    assert (error.what, error.hint) == ("the kubeconfig has no current context", "it has here, there")
    assert Cluster.connect("here").version() == "v1.33.5"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "text", "contexts: 1", "a: b", "contexts: [{name: a}]",
                                  "contexts: [{name: a, context: b}]", "contexts: [1]"])  # fmt: skip
def test_a_kubeconfig_that_is_none_is_one_clear_error(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    error = failure(Cluster.connect, (SiteError, UserError))  # type: ignore[arg-type]
    assert "kubeconfig" in error.what


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("clusters", []),
        ("clusters", [{"name": "c", "cluster": {"server": "https://x", "certificate-authority": "/not/there"}}]),
    ],
)
def test_a_context_that_leads_nowhere_is_named(
    part: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kubeconfig(tmp_path / "config", "http://x")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), part: change}))
    monkeypatch.setenv("KUBECONFIG", str(path))
    error = failure(Cluster.connect)
    assert (error.where, "kubectl --context here" in error.hint) == ("here", True)


def plugin(*words: str) -> dict[str, Any]:
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": words[0], "args": list(words[1:]),
                     "interactiveMode": "Never"}}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("aws-that-is-not-there", "eks", "get-token"), "No such file or directory: 'aws-that-is-not-there'"),
        ((sys.executable, "-c", "import sys; sys.exit('log in first')"), "log in first"),
        ((sys.executable, "-c", "print('{}')"), "malformed response"),
    ],
)
def test_a_command_that_gives_no_credentials_is_one_clear_error(
    script: Script, words: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure(lambda: script(OK, user=plugin(*words)))
    assert says in error.what
    assert "the command of the kubeconfig gives no credentials" in error.what
    assert capfd.readouterr().err == "", "it is said once"


def test_a_command_gives_the_token_and_every_request_says_who_asks(script: Script) -> None:
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t"}}
    cluster, server = script(OK, user=plugin(sys.executable, "-c", f"print({json.dumps(json.dumps(answer))})"))
    cluster.get(PODS, "a")
    cluster.create(CONFIG_MAPS, config_map("a"))
    for _, _, headers in server.asked:
        assert (headers["Authorization"], headers["User-Agent"]) == ("Bearer t", "raylaunch")


# -- objects


def test_objects_are_made_read_changed_and_deleted(cluster: Cluster) -> None:
    assert cluster.get(CONFIG_MAPS, "a") is None
    made = cluster.create(CONFIG_MAPS, config_map("a", x="y"))
    assert cluster.get(CONFIG_MAPS, "a") == made
    cluster.create(CONFIG_MAPS, config_map("b"))
    assert [item["metadata"]["name"] for item in cluster.objects(CONFIG_MAPS, labels="x=y")] == ["a"]
    assert [item["metadata"]["name"] for item in cluster.objects(CONFIG_MAPS, fields="metadata.name=b")] == ["b"]
    assert cluster.patch(CONFIG_MAPS, "a", {"data": {"a": None, "c": "d"}})["data"] == {"c": "d"}
    cluster.delete(CONFIG_MAPS, "a", uid="of another")
    assert cluster.get(CONFIG_MAPS, "a") is not None
    cluster.delete(CONFIG_MAPS, "a", uid=made["metadata"]["uid"])
    cluster.delete(CONFIG_MAPS, "a")
    assert cluster.get(CONFIG_MAPS, "a") is None


def test_other_namespaces_are_only_seen_when_asked_for(api: ApiServer, cluster: Cluster) -> None:
    api.create("configmaps", {"metadata": {"name": "far", "namespace": "default"}})
    assert cluster.objects(CONFIG_MAPS) == []
    assert [item["metadata"]["name"] for item in cluster.objects(CONFIG_MAPS, everywhere=True)] == ["far"]


def test_a_list_is_read_to_its_last_page(api: ApiServer, cluster: Cluster) -> None:
    for number in range(1_001):
        api.create("configmaps", {"metadata": {"name": f"c{number:04}", "namespace": "team", "labels": {"x": "y"}}})
    found, version = cluster.snapshot(CONFIG_MAPS, labels="x=y")
    assert [item["metadata"]["name"] for item in found] == [f"c{number:04}" for number in range(1_001)]
    assert [request.query.get("continue") for request in api.requests] == [None, "500", "1000"]
    assert int(version) >= 1_001


@pytest.mark.skipif(not CRD_FOLDER.is_dir(), reason=f"KubeRay's definitions are not at {CRD_FOLDER}")
def test_an_unknown_field_is_refused_in_the_servers_words(cluster: Cluster) -> None:
    body = rayjob("one", ttlSecondAfterFinished=1)
    body["metadata"]["namespace"] = "team"
    assert 'unknown field "spec.ttlSecondAfterFinished"' in failure(lambda: cluster.create(RAY_JOBS, body)).what
    assert cluster.objects(RAY_JOBS) == []


def test_a_dry_run_makes_nothing_and_a_taken_name_is_refused_in_the_servers_words(cluster: Cluster) -> None:
    body = rayjob("one")
    body["metadata"]["namespace"] = "team"
    assert cluster.create(RAY_JOBS, body, dry_run=True)["metadata"]["uid"]
    assert cluster.objects(RAY_JOBS) == []
    cluster.create(RAY_JOBS, body)
    assert "already exists" in failure(lambda: cluster.create(RAY_JOBS, body), ConflictError).what


def test_the_log_of_a_container_that_never_ran_is_empty(api: ApiServer, cluster: Cluster) -> None:
    spec = {"containers": [{"name": "main", "image": "x"}]}
    api.create("pods", {"metadata": {"name": "pod", "namespace": "team"}, "spec": spec, "status": {"phase": "Pending"}})
    assert cluster.pod_log("pod", "main") == ""
    assert cluster.pod_log("nobody", "main") == ""
    api.log("team", "pod", "one\ntwo\nthree")
    assert cluster.pod_log("pod", "main", tail=2) == "two\nthree\n"
    assert cluster.pod_log("pod", "main", previous=True) == ""


def test_rights_and_kinds_are_asked_for(api: ApiServer, cluster: Cluster) -> None:
    api.denied |= {("create", "rayjobs"), ("get", "pods/log")}
    rights = [cluster.allowed("create", RAY_JOBS), cluster.allowed("list", RAY_JOBS), cluster.allowed("get", PODS),
              cluster.allowed("get", PODS, "log")]  # fmt: skip
    assert rights == [False, True, True, False]
    assert (cluster.serves(RAY_JOBS), cluster.serves(PODS), cluster.serves(LOCAL_QUEUES)) == (True, True, False)


# -- watching


def lines(*events: dict[str, Any] | bytes) -> bytes:
    return b"".join(event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n" for event in events)


def item(version: str) -> dict[str, Any]:
    return {"metadata": {"name": "a", "uid": "u", "resourceVersion": version}}


EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}


def test_changes_and_bookmarks_come_in_order_and_a_watch_ends_on_time(script: Script) -> None:
    events = [{"type": kind, "object": item(str(number))} for number, kind in
              enumerate(("ADDED", "MODIFIED", "BOOKMARK", "DELETED"))]  # fmt: skip
    cluster, server = script((200, {}, lines(events[0], b"\n", *events[1:])))
    seen = list(cluster.watch(PODS, "7", labels="x=y", seconds=9))
    assert seen == [(event["type"], event["object"]) for event in events]
    (asked,) = [path for _, path, _ in server.asked]
    assert "labelSelector=x%3Dy&resourceVersion=7&watch=true&allowWatchBookmarks=true&timeoutSeconds=9" in asked


def test_a_forgotten_version_is_told_in_the_stream_or_as_a_status(cluster: Cluster, api: ApiServer) -> None:
    _, version = cluster.snapshot(CONFIG_MAPS)
    cluster.create(CONFIG_MAPS, config_map("a"))
    for as_status in (False, True):
        api.compact(as_status=as_status)
        failure(lambda: list(cluster.watch(CONFIG_MAPS, version, seconds=5)), ExpiredError)


@pytest.mark.parametrize("rest", [b"{\n", b"[]\n", {"type": "ERROR", "object": {"code": 500, "message": "x"}}])
def test_a_stream_of_something_else_is_an_error_of_the_network(script: Script, rest: Any) -> None:
    cluster, _ = script((200, {}, lines({"type": "ADDED", "object": item("1")}, rest)))
    watch = iter(cluster.watch(EVENTS, "1", seconds=5))
    assert next(watch)[0] == "ADDED"
    failure(lambda: next(watch), InfrastructureError)


def test_a_stream_that_breaks_is_an_error_of_the_network(cluster: Cluster, api: ApiServer) -> None:
    _, version = cluster.snapshot(CONFIG_MAPS)
    watch = iter(cluster.watch(CONFIG_MAPS, version, seconds=60))
    cluster.create(CONFIG_MAPS, config_map("a"))
    assert next(watch)[0] == "ADDED"
    api.drop_connections()
    failure(lambda: next(watch), InfrastructureError)


def test_a_watch_that_is_left_early_does_not_disturb_what_comes_after_it(cluster: Cluster, api: ApiServer) -> None:
    _, version = cluster.snapshot(CONFIG_MAPS)
    for number in range(20):
        cluster.create(CONFIG_MAPS, config_map(f"a{number}"))
        watch = iter(cluster.watch(CONFIG_MAPS, version, seconds=30))
        next(watch)
        watch.close()  # type: ignore[attr-defined]
        before = len(api.requests)
        assert len(cluster.objects(CONFIG_MAPS)) == number + 1
        assert len(api.requests) == before + 1, "nothing had to be repeated"


def test_another_thread_can_end_a_watch(cluster: Cluster) -> None:
    watch = cluster.watch(EVENTS, cluster.snapshot(EVENTS)[1], seconds=60)
    closer = threading.Timer(0.2, watch.close)
    closer.start()
    began = time.monotonic()
    failure(lambda: list(watch), InfrastructureError)
    assert time.monotonic() - began < 5
    watch.close()
