"""The emulated API server treats the official client and kubectl as a real one does."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube.apiserver import ApiServer
from tests.kube.controllers import Controllers
from tests.kube.kubelet import ScriptedKubelet
from tests.kube.manifests import rayjob
from tests.kube.patience import until
from tests.kube.schema import CRD_FOLDER, Object

kubernetes = pytest.importorskip("kubernetes")

needs_schemas = pytest.mark.skipif(
    not CRD_FOLDER.is_dir(), reason="the definitions of the custom resources are not here"
)

RAYJOBS = ("ray.io", "v1", "team", "rayjobs")


@pytest.fixture
def client(api: ApiServer, tmp_path: Path) -> Iterator[Any]:
    """The official client, configured by a kubeconfig file."""
    from kubernetes import config

    with config.new_client_from_config(str(api.kubeconfig(tmp_path, namespace="team"))) as made:
        yield made


@pytest.fixture
def custom(client: Any) -> Any:
    """Custom resources through the official client."""
    return kubernetes.client.CustomObjectsApi(client)


@pytest.fixture
def core(client: Any) -> Any:
    """Core resources through the official client."""
    return kubernetes.client.CoreV1Api(client)


def refusal(call: Callable[[], object]) -> Any:
    """The error a call ends with."""
    with pytest.raises(kubernetes.client.ApiException) as caught:
        call()
    return caught.value


def running_pod(api: ApiServer, name: str = "pod", **status: object) -> Object:
    """A pod that runs."""
    spec = {"containers": [{"name": "main", "image": "x"}], "nodeName": "node"}
    metadata = {"name": name, "namespace": "team"}
    return api.create("pods", {"metadata": metadata, "spec": spec, "status": {"phase": "Running", **status}})


def test_an_object_lives_as_in_kubernetes(custom: Any) -> None:
    made = custom.create_namespaced_custom_object(*RAYJOBS, rayjob("one"))
    assert made["metadata"]["uid"]
    assert made["metadata"]["generation"] == 1
    patched = custom.patch_namespaced_custom_object(
        *RAYJOBS, "one", {"spec": {"suspend": True}, "status": {"jobId": "x"}}
    )
    assert patched["metadata"]["generation"] == 2
    assert "status" not in patched
    done = custom.patch_namespaced_custom_object_status(
        *RAYJOBS, "one", {"status": {"jobId": "x"}, "spec": {"jobId": "y"}}
    )
    assert done["status"]["jobId"] == "x"
    assert done["spec"]["jobId"] == "one"
    assert done["metadata"]["generation"] == 2
    stale = refusal(lambda: custom.replace_namespaced_custom_object(*RAYJOBS, "one", made))
    assert (stale.status, "the object has been modified" in stale.body) == (409, True)
    assert custom.delete_namespaced_custom_object(*RAYJOBS, "one")["status"] == "Success"
    gone = refusal(lambda: custom.get_namespaced_custom_object(*RAYJOBS, "one"))
    assert (gone.status, 'rayjobs.ray.io \\"one\\" not found' in gone.body) == (404, True)


def test_of_two_that_create_the_same_name_one_wins(api: ApiServer, custom: Any) -> None:
    def create(_: int) -> int:
        try:
            custom.create_namespaced_custom_object(*RAYJOBS, rayjob("same"))
        except kubernetes.client.ApiException as error:
            return int(error.status)
        return 201

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(create, range(8))) == [201] + [409] * 7
    assert len(api.list("rayjobs")) == 1


@needs_schemas
def test_strict_validation_names_the_unknown_field_and_others_drop_it(custom: Any) -> None:
    wrong = rayjob("wrong", ttlSecondAfterFinished=1)
    error = refusal(lambda: custom.create_namespaced_custom_object(*RAYJOBS, wrong, field_validation="Strict"))
    assert error.status == 400
    assert 'strict decoding error: unknown field \\"spec.ttlSecondAfterFinished\\"' in error.body
    assert "ttlSecondAfterFinished" not in custom.create_namespaced_custom_object(*RAYJOBS, wrong)["spec"]
    mistyped = rayjob("mistyped", ttlSecondsAfterFinished="60")
    error = refusal(lambda: custom.create_namespaced_custom_object(*RAYJOBS, mistyped))
    assert (error.status, "must be of type integer" in error.body) == (422, True)


def test_a_dry_run_checks_and_keeps_nothing(api: ApiServer, custom: Any) -> None:
    assert custom.create_namespaced_custom_object(*RAYJOBS, rayjob("dry"), dry_run="All")["metadata"]["uid"]
    assert (
        refusal(lambda: custom.create_namespaced_custom_object(*RAYJOBS, rayjob("No_Name"), dry_run="All")).status
        == 422
    )
    assert api.list("rayjobs") == []


def test_names_labels_namespaces_and_sizes_are_checked(core: Any, custom: Any) -> None:
    def config_map(name: str, data: dict[str, str], **metadata: object) -> Object:
        return {"metadata": {"name": name, **metadata}, "data": data}

    def create(body: Object) -> Any:
        return refusal(lambda: core.create_namespaced_config_map("team", body))

    for body in (config_map("UPPER", {}), config_map("x" * 254, {}), config_map("l", {}, labels={"a": "b c"})):
        assert create(body).status == 422
    assert "may not be more than 1048576 bytes" in create(config_map("large", {"a": "x" * 1_100_000})).body
    error = refusal(lambda: custom.create_namespaced_custom_object("ray.io", "v1", "nowhere", "rayjobs", rayjob("x")))
    assert (error.status, 'namespaces \\"nowhere\\" not found' in error.body) == (404, True)
    secret = core.create_namespaced_secret("team", {"metadata": {"generateName": "s-"}, "stringData": {"a": "b"}})
    assert (secret.data, secret.metadata.name[:2]) == ({"a": "Yg=="}, "s-")


def test_selectors_choose_and_unknown_fields_are_refused(api: ApiServer, core: Any) -> None:
    for index, phase in enumerate(("Running", "Pending", "Failed")):
        labels = {"app": "a" if index else "b"}
        api.create("pods", {
            "metadata": {"name": f"p{index}", "namespace": "team", "labels": labels},
            "spec": {"containers": [{"name": "c"}]},
            "status": {"phase": phase},
        })  # fmt: skip

    def names(**selectors: str) -> list[str]:
        return [pod.metadata.name for pod in core.list_namespaced_pod("team", **selectors).items]

    assert names(label_selector="app=a") == ["p1", "p2"]
    assert names(label_selector="app in (b,c),!other") == ["p0"]
    assert names(field_selector="status.phase!=Failed,metadata.name!=p0") == ["p1"]
    assert refusal(lambda: names(field_selector="spec.image=x")).status == 400


def test_denied_verbs_are_refused_in_the_words_of_rbac_and_reviews_say_so(
    api: ApiServer, client: Any, core: Any
) -> None:
    api.denied |= {("list", "pods"), ("get", "pods/log")}
    error = refusal(lambda: core.list_namespaced_pod("team"))
    words = 'User \\"jane\\" cannot list resource \\"pods\\" in API group \\"\\" in the namespace \\"team\\"'
    assert (error.status, words in error.body) == (403, True)
    review = kubernetes.client.AuthorizationV1Api(client).create_self_subject_access_review
    for subresource, verb, allowed in (("log", "get", False), ("", "list", False), ("", "get", True)):
        attributes = {"verb": verb, "resource": "pods", "subresource": subresource, "namespace": "team"}
        assert review({"spec": {"resourceAttributes": attributes}}).status.allowed is allowed


def test_a_watch_sees_changes_in_order_and_ends_on_time(api: ApiServer, core: Any) -> None:
    api.create("configmaps", {"metadata": {"name": "a", "namespace": "team", "labels": {"x": "y"}}})

    def change() -> None:
        api.patch("configmaps", "team", "a", {"data": {"k": "v"}})
        api.patch("configmaps", "team", "a", {"metadata": {"labels": {"x": "z"}}})

    timer = threading.Timer(0.2, change)
    timer.start()
    stream = kubernetes.watch.Watch().stream
    began = time.monotonic()
    events = [
        event["type"]
        for event in stream(core.list_namespaced_config_map, "team", label_selector="x=y", timeout_seconds=1)
    ]
    timer.join()
    assert events == ["ADDED", "MODIFIED", "DELETED"]
    assert 0.9 < time.monotonic() - began < 3


@pytest.mark.parametrize("as_status", [True, False])
def test_a_watch_from_a_forgotten_version_is_gone(api: ApiServer, core: Any, as_status: bool) -> None:
    version = core.list_namespaced_config_map("team").metadata.resource_version
    api.create("configmaps", {"metadata": {"name": "later", "namespace": "team"}})
    api.compact(as_status=as_status)
    stream = kubernetes.watch.Watch().stream
    arguments = {"resource_version": version, "timeout_seconds": 5}
    assert refusal(lambda: list(stream(core.list_namespaced_config_map, "team", **arguments))).status == 410


def test_open_watches_can_expire_and_connections_can_drop(api: ApiServer, core: Any) -> None:
    stream = kubernetes.watch.Watch().stream
    threading.Timer(0.3, lambda: api.compact(open_watches=True)).start()
    assert refusal(lambda: list(stream(core.list_namespaced_config_map, "team", timeout_seconds=10))).status == 410
    threading.Timer(0.3, api.drop_connections).start()
    began = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)broken|incomplete|prematurely"):
        list(stream(core.list_namespaced_config_map, "team", timeout_seconds=10))
    assert time.monotonic() - began < 5


def test_logs_are_followed_to_the_end_and_cut_as_asked(api: ApiServer, core: Any) -> None:
    running_pod(api)
    api.log("team", "pod", "zero\none")

    def write() -> None:
        api.log("team", "pod", "two")
        api.update_status("pods", "team", "pod", {"phase": "Succeeded"})

    threading.Timer(0.2, write).start()
    assert list(kubernetes.watch.Watch().stream(core.read_namespaced_pod_log, "pod", "team")) == ["zero", "one", "two"]
    read = core.read_namespaced_pod_log
    assert read("pod", "team", tail_lines=1) == "two\n"
    assert read("pod", "team", timestamps=True, tail_lines=1).endswith("Z two\n")
    assert read("pod", "team", since_seconds=60) == "zero\none\ntwo\n"
    assert refusal(lambda: read("pod", "team", previous=True)).status == 400
    api.open_log("team", "pod", "main").write("next life")
    assert read("pod", "team", previous=True).startswith("zero")
    assert read("pod", "team") == "next life\n"


class _Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Says who asked for what."""
        body = f"{self.path} {self.headers.get('X-Ray-Authorization')} {self.headers.get('Authorization')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of an HTTP server that says what it was asked."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_service_proxy_passes_requests_on_without_the_callers_authorization(
    api: ApiServer, client: Any, echo: int
) -> None:
    ports = [{"name": "dashboard", "port": 8265}]
    api.create("services", {"metadata": {"name": "head", "namespace": "team"}, "spec": {"ports": ports}})

    def get(name: str) -> Any:
        path = f"/api/v1/namespaces/team/services/{name}/proxy/api/version"
        headers = {"X-Ray-Authorization": "Bearer t", "Authorization": "Bearer mine"}
        return client.call_api("GET", client.configuration.host + path + "?a=b", headers)

    assert get("head:dashboard").status == 503
    api.service_backends["team", "head"] = {8265: f"http://127.0.0.1:{echo}"}
    for name in ("head:dashboard", "http:head:8265", "head"):
        assert get(name).read() == b"/api/version?a=b Bearer t None"
    assert get("nobody:80").status == 404


def test_a_port_forward_reaches_the_pods_real_port(api: ApiServer, core: Any, echo: int) -> None:
    running_pod(api)
    api.pod_ports["team", "pod"] = {8265: echo}
    forward = kubernetes.stream.portforward(core.connect_get_namespaced_pod_portforward, "pod", "team", ports="8265,99")
    with closing(forward.socket(8265)) as connection:
        connection.settimeout(5)
        connection.sendall(b"GET /hello HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert answer.endswith(b"/hello None None")
    until(lambda: forward.error(99))
    forward.close()
    forward.websocket.shutdown()  # the client forgets to, when it is the server that ends the connection


def test_faults_hit_the_requests_they_are_meant_for(api: ApiServer, core: Any) -> None:
    api.fail_next(2, 503, match="list .*/pods")
    core.list_namespaced_config_map("team")
    assert [refusal(lambda: core.list_namespaced_pod("team")).status for _ in range(2)] == [503, 503]
    assert core.list_namespaced_pod("team").items == []
    api.hang_next("pods", count=4)  # the client tries a read again three times by itself
    with pytest.raises(Exception, match="timed out"):
        core.list_namespaced_pod("team", _request_timeout=0.3)
    assert [request.verb for request in api.requests if "/pods" in request.path] == ["list"] * 7


def test_a_hook_runs_between_the_deed_and_the_answer(api: ApiServer, core: Any) -> None:
    seen: list[object] = []
    api.crash_after("create", "configmaps", lambda: seen.append(api.get("configmaps", "team", "a")))
    core.create_namespaced_config_map("team", {"metadata": {"name": "a"}})
    assert seen[0] is not None
    api.crash_after("create", "configmaps", lambda: False)
    with pytest.raises(Exception, match=r"(?i)aborted|disconnected|retries"):
        core.create_namespaced_config_map("team", {"metadata": {"name": "b"}})
    assert api.get("configmaps", "team", "b") is not None


def test_a_restarted_server_has_its_address_and_its_objects(api: ApiServer, core: Any) -> None:
    core.create_namespaced_config_map("team", {"metadata": {"name": "kept"}})
    address = api.url
    api.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0
    api.start()
    assert (api.url, core.read_namespaced_config_map("kept", "team").metadata.name) == (address, "kept")


def test_owned_objects_go_after_their_owner_and_a_jobs_pods_stay_unless_asked(
    api: ApiServer, client: Any, core: Any
) -> None:
    batch = kubernetes.client.BatchV1Api(client)
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    kubelet = ScriptedKubelet(api)
    with Controllers(api, kubelet, speed=50):
        for name, policy in (("kept", None), ("gone", "Background")):
            batch.create_namespaced_job("team", {"metadata": {"name": name}, "spec": {"template": template}})
            until(partial(api.list, "pods", "team", f"job-name={name}"))
            batch.delete_namespaced_job(name, "team", **({"propagation_policy": policy} if policy else {}))
        until(lambda: not api.list("pods", "team", "job-name=gone") and not api.list("jobs"))
        assert core.list_namespaced_pod("team", label_selector="job-name=kept").items
        orphan = {"apiVersion": "v1", "kind": "ConfigMap", "name": "never", "uid": "was-there"}
        core.create_namespaced_secret("team", {"metadata": {"name": "lost", "ownerReferences": [orphan]}})
        until(lambda: api.get("secrets", "team", "lost") is None)


def test_both_event_kinds_show_the_same_events(api: ApiServer, client: Any, core: Any) -> None:
    pod = running_pod(api)
    api.event(pod, "FailedScheduling", "0/3 nodes", kind="Warning", component="default-scheduler")
    api.event(pod, "Created", "pod made", component="rayjob-controller", modern=True)
    found = core.list_namespaced_event("team", field_selector="involvedObject.name=pod,type=Warning").items
    assert [event.message for event in found] == ["0/3 nodes"]
    # Not deserialised: the client's model of a modern event refuses the null `eventTime` of an old one.
    listing = kubernetes.client.EventsV1Api(client).list_namespaced_event
    modern = json.loads(listing("team", field_selector="regarding.name=pod", _preload_content=False).data)["items"]
    assert {event["note"]: event["eventTime"] is None for event in modern} == {"0/3 nodes": True, "pod made": False}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_applies_reads_and_deletes(api: ApiServer, tmp_path: Path) -> None:
    config = api.kubeconfig(tmp_path, namespace="team")
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(rayjob("by-kubectl")))

    def kubectl(*words: str) -> str:
        command = ["kubectl", f"--kubeconfig={config}", f"--cache-dir={tmp_path}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "server dry run" in kubectl("apply", "--dry-run=server", "-f", str(manifest))
    assert api.list("rayjobs") == []
    assert "created" in kubectl("apply", "-f", str(manifest))
    assert "serverside-applied" in kubectl("apply", "--server-side", "--force-conflicts", "-f", str(manifest))
    assert "by-kubectl" in kubectl("get", "rayjobs")
    assert "deleted" in kubectl("delete", "rayjob", "by-kubectl")
