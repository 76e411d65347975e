"""What goes wrong on the way to a cluster: told to whoever has to act, and repeated only where that is safe."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cluster as module
from launcher.cluster import CONFIG_MAPS, PODS, Cluster, ConflictError, ExpiredError
from launcher.errors import InfrastructureError, LaunchError, SiteError
from tests.kube.apiserver import ApiServer
from tests.scripted import OK, Answer, Script, Scripted, certificate, config_map, failure, kubeconfig

# -- what goes wrong, and what is tried again


@pytest.mark.parametrize(
    ("status", "kind", "says", "hint"),
    [
        (401, SiteError, "the cluster does not accept the credentials", "renew them"),
        (403, SiteError, "words of the server", "launch doctor"),
        (404, SiteError, "the cluster does not know configmaps", "launch doctor"),
        (409, ConflictError, "words of the server", ""),
        (410, ExpiredError, "words of the server", ""),
        (400, SiteError, "the cluster refuses the request: words of the server", "--dry-run"),
        (413, SiteError, "the cluster refuses the request: words of the server", "--dry-run"),
        (422, SiteError, "the cluster refuses the request: words of the server", "--dry-run"),
        (500, InfrastructureError, "the API server answered 500: words of the server", "try again"),
        (504, InfrastructureError, "the API server answered 504: words of the server", "try again"),
    ],
)
def test_a_refusal_is_told_to_whoever_has_to_act(
    script: Script, status: int, kind: type[LaunchError], says: str, hint: str
) -> None:
    cluster, server = script((status, {}, {"kind": "Status", "message": "words of the server"}))
    error = failure(lambda: cluster.create(CONFIG_MAPS, config_map("a")), kind)
    assert error.what.startswith(says)
    assert hint in error.hint
    assert error.where == "here/team"
    assert len(server.asked) == 1, "a create may have had its effect"


def test_quota_and_missing_namespaces_have_hints_of_their_own(script: Script, api: ApiServer, tmp_path: Path) -> None:
    cluster, _ = script((403, {}, {"message": "exceeded quota: gpus"}))
    assert failure(lambda: cluster.create(PODS, {})).hint == "ask for the quota to be raised"
    kubeconfig(tmp_path / "scripted", api.url)
    nowhere = Cluster.connect(None, "nowhere")
    error = failure(lambda: nowhere.create(CONFIG_MAPS, config_map("a")))
    assert (error.what, "--namespace" in error.hint) == ("there is no namespace nowhere", True)


BUSY: Answer = (503, {}, {"message": "busy"})
ASKS: dict[str, Callable[[Cluster], object]] = {
    "GET": lambda cluster: cluster.get(PODS, "a"),
    "PATCH": lambda cluster: cluster.patch(PODS, "a", {}),
    "DELETE": lambda cluster: cluster.delete(PODS, "a"),
}


@pytest.mark.parametrize("verb", ASKS)
@pytest.mark.parametrize(
    "trouble", [BUSY, None, (500, {}, b"<html>"), (429, {}, {})], ids=["503", "drop", "500", "429"]
)
def test_what_may_be_repeated_is(script: Script, verb: str, trouble: Answer) -> None:
    cluster, server = script(trouble, OK)
    ASKS[verb](cluster)
    assert [method for method, _, _ in server.asked] == [verb, verb]


@pytest.mark.parametrize("trouble", [BUSY, (503, {"Retry-After": "1"}, {}), None], ids=["503", "later", "drop"])
def test_a_create_that_may_have_arrived_is_not_repeated(script: Script, trouble: Answer) -> None:
    cluster, server = script(trouble, OK)
    failure(lambda: cluster.create(PODS, {}), InfrastructureError)
    assert len(server.asked) == 1


def test_a_create_that_was_turned_away_is_repeated_when_the_server_says(script: Script) -> None:
    cluster, server = script((429, {"Retry-After": "1"}, {}), OK)
    began = time.monotonic()
    cluster.create(PODS, {})
    assert len(server.asked) == 2
    assert time.monotonic() - began >= 1


def test_no_server_can_ask_for_patience_for_ever(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)
    cluster, server = script((503, {"Retry-After": "86400"}, {}), OK)
    cluster.get(PODS, "a")
    assert len(server.asked) == 2


def test_a_server_that_stays_busy_is_given_up(script: Script) -> None:
    cluster, server = script(BUSY)
    assert failure(lambda: cluster.get(PODS, "a"), InfrastructureError).what == "the API server answered 503: busy"
    assert len(server.asked) == 5


def test_a_server_that_is_not_there_is_tried_and_told(cluster: Cluster, api: ApiServer) -> None:
    cluster.version()
    api.stop()
    restart = threading.Timer(0.1, api.start)
    restart.start()
    cluster.create(CONFIG_MAPS, config_map("a"))  # it cannot have arrived before
    restart.join()
    api.stop()
    error = failure(cluster.version, InfrastructureError)
    assert str(error).startswith("here/team: the API server does not answer (")
    assert "Connection refused" in error.what
    assert "runs in the cluster go on" in error.hint


def test_a_server_that_is_silent_is_asked_once(
    cluster: Cluster, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Cluster._request.__kwdefaults__ or {}, "read_seconds", 0.2)
    api.hang_next(count=9)
    assert "timed out" in failure(lambda: cluster.objects(PODS), InfrastructureError).what
    assert len(api.requests) == 1


@pytest.mark.parametrize("body", [b"<html>Log in to the hotel</html>", [], "text"])
def test_what_is_no_api_server_is_told(script: Script, body: Any) -> None:
    cluster, _ = script((200, {}, body))
    for call in (cluster.version, lambda: cluster.objects(PODS), lambda: cluster.get(PODS, "a")):
        assert "not an API server" in failure(call, InfrastructureError).what
    cluster, _ = script((200, {}, {"error": "no upstream"}))
    for call in (cluster.version, lambda: cluster.objects(PODS)):
        assert "not an API server" in failure(call, InfrastructureError).what
    cluster, _ = script((403, {}, body))
    failure(lambda: cluster.objects(PODS))


# -- TLS


def test_the_authority_of_the_kubeconfig_is_trusted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = certificate(tmp_path / "right"), certificate(tmp_path / "wrong")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with Scripted((200, {}, {"gitVersion": "v1"}), certificate=right / "both.pem") as server:

        def connect(ca: Path) -> Cluster:
            data = base64.b64encode((ca / "ca.pem").read_bytes()).decode()
            kubeconfig(tmp_path / "config", server.url, None, **{"certificate-authority-data": data})
            return Cluster.connect()

        assert connect(right).version() == "v1"
        error = failure(connect(wrong).version)
        assert str(error) == ("here/team: the certificate of the API server is not trusted: "
                              "unable to get local issuer certificate")  # fmt: skip
        assert error.hint == "fetch the kubeconfig anew"
        assert len(server.asked) == 1, "what is not trusted is told nothing"
