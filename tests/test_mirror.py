"""A mirror shows what the server has, whatever happens between them, and says when it may not."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import mirror as module
from launcher.cluster import CONFIG_MAPS, PODS, Cluster
from launcher.errors import InfrastructureError
from launcher.mirror import Mirror
from launcher.scene import Watcher
from tests.contract.grounds import until
from tests.kube.apiserver import ApiServer

SOON = 20.0


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A connection, and pauses that a test can wait for."""
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, namespace="team")))
    monkeypatch.setattr(module, "PAUSE_SECONDS", (0.05, 0.2))
    return Cluster.connect()


@pytest.fixture
def mirror(cluster: Cluster) -> Iterator[Callable[..., Mirror]]:
    """Makes mirrors that are closed in the end."""
    made: list[Mirror] = []

    def make(**options: Any) -> Mirror:
        made.append(Mirror(cluster, CONFIG_MAPS, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def put(api: ApiServer, name: str, value: str = "", **labels: str) -> None:
    api.create("configmaps", {"metadata": {"name": name, "namespace": "team", "labels": labels}, "data": {"v": value}})


def change(api: ApiServer, name: str, value: str) -> None:
    api.patch("configmaps", "team", name, {"data": {"v": value}})


def remove(api: ApiServer, name: str) -> None:
    api.delete("configmaps", "team", name)


def on_server(api: ApiServer) -> list[tuple[str, str, str]]:
    return sorted(_key(item) for item in api.list("configmaps", "team"))


def in_mirror(copy: Mirror) -> list[tuple[str, str, str]]:
    return sorted(_key(item) for item in copy.objects())


def _key(item: dict[str, Any]) -> tuple[str, str, str]:
    return item["metadata"]["uid"], item["metadata"]["name"], (item.get("data") or {}).get("v", "")


def same(api: ApiServer, copy: Mirror) -> None:
    """Waits until both have the same objects, once each, and the mirror has no trouble."""
    until(lambda: copy.trouble is None and in_mirror(copy) == on_server(api), SOON)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mirror")]


# -- what it shows


def test_it_follows_what_is_made_changed_and_deleted(api: ApiServer, mirror: Callable[..., Mirror]) -> None:
    put(api, "early", "1")
    copy = mirror()
    assert copy.ready(SOON)
    same(api, copy)
    put(api, "late", "1")
    change(api, "early", "2")
    same(api, copy)
    remove(api, "late")
    put(api, "late", "another of that name")
    same(api, copy)
    assert [request.verb for request in api.requests] == ["list", "watch"], "it is told, and does not ask"


def test_only_what_matches_is_shown_and_what_no_longer_does_goes(api: ApiServer, mirror: Callable[..., Mirror]) -> None:
    put(api, "a", app="x")
    put(api, "b", app="y")
    by_label, by_name = mirror(labels="app=x"), mirror(fields="metadata.name=b")
    until(lambda: [item["metadata"]["name"] for item in by_label.objects()] == ["a"], SOON)
    until(lambda: [item["metadata"]["name"] for item in by_name.objects()] == ["b"], SOON)
    api.patch("configmaps", "team", "a", {"metadata": {"labels": {"app": "y"}}})
    api.patch("configmaps", "team", "b", {"metadata": {"labels": {"app": "x"}}})
    until(lambda: [item["metadata"]["name"] for item in by_label.objects()] == ["b"], SOON)


def test_whoever_waits_is_woken_by_each_change(api: ApiServer, mirror: Callable[..., Mirror]) -> None:
    changed = threading.Condition()
    copy = mirror(changed=changed)
    assert copy.ready(SOON)
    with changed:
        maker = threading.Thread(target=put, args=(api, "a"))
        maker.start()
        assert changed.wait_for(lambda: len(copy.objects()) == 1, SOON)
    maker.join()


def test_of_many_objects_only_what_is_wanted_is_kept(api: ApiServer, mirror: Callable[..., Mirror]) -> None:
    for number in range(300):
        put(api, f"c{number}", "x" * 1000)
    copy = mirror(trim=lambda item: {"metadata": {"uid": item["metadata"]["uid"]}})
    until(lambda: len(copy.objects()) == 300, SOON)
    change(api, "c0", "y" * 1000)
    put(api, "late", "x" * 1000)
    until(lambda: len(copy.objects()) == 301, SOON)
    assert all(item.keys() == {"metadata"} and item["metadata"].keys() == {"uid"} for item in copy.objects())


# -- what may happen


def _expires_in_the_stream(api: ApiServer) -> None:
    api.compact(open_watches=True)


def _has_expired_as_a_status(api: ApiServer) -> None:
    put(api, "meanwhile")
    api.compact(as_status=True)
    api.drop_connections()


def _drops_connections(api: ApiServer) -> None:
    api.drop_connections()


def _is_busy(api: ApiServer) -> None:
    api.fail_next(2, 503, "(list|watch) .*configmaps")
    api.drop_connections()


def _forbids_for_a_while(api: ApiServer) -> None:
    api.denied |= {("list", "configmaps"), ("watch", "configmaps")}
    api.drop_connections()
    threading.Timer(0.3, api.denied.clear).start()


def _restarts(api: ApiServer) -> None:
    api.stop()
    api.start()


FAULTS = (_expires_in_the_stream, _has_expired_as_a_status, _drops_connections, _is_busy,
          _forbids_for_a_while, _restarts)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_it_survives_a_server_that(
    api: ApiServer, mirror: Callable[..., Mirror], fault: Callable[[ApiServer], None]
) -> None:
    for name in "abc":
        put(api, name, "1")
    copy = mirror()
    same(api, copy)
    until(lambda: any(request.verb == "watch" for request in api.requests), SOON)
    fault(api)
    remove(api, "a")
    change(api, "b", "2")
    put(api, "d")
    same(api, copy)
    change(api, "b", "3")
    same(api, copy)


def test_while_the_server_is_away_it_says_so_and_shows_what_was_last_seen(
    api: ApiServer, mirror: Callable[..., Mirror]
) -> None:
    put(api, "a", "1")
    copy = mirror()
    same(api, copy)
    api.stop()
    until(lambda: isinstance(copy.trouble, InfrastructureError), SOON)
    assert [name for _, name, _ in in_mirror(copy)] == ["a"]
    change(api, "a", "2")
    api.start()
    same(api, copy)


def test_a_list_that_hangs_is_asked_again(
    api: ApiServer, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Cluster._request.__kwdefaults__ or {}, "read_seconds", 0.3)
    put(api, "a")
    api.hang_next("list .*configmaps", count=2)
    copy = mirror()
    assert not copy.ready(0.1)
    until(lambda: copy.trouble is not None, SOON)
    same(api, copy)


def test_a_server_that_forgets_at_once_is_not_asked_in_a_tight_loop(
    api: ApiServer, mirror: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", (0.5, 30.0))
    api.fail_next(1000, 410, "watch .*configmaps")
    mirror()
    threading.Event().wait(1.0)
    assert 3 <= len(api.requests) <= 12


@pytest.mark.parametrize("seed", [1])
def test_after_any_operations_and_faults_both_are_the_same(
    api: ApiServer, mirror: Callable[..., Mirror], seed: int
) -> None:
    chance = random.Random(seed)
    copies = [mirror(), mirror()]
    alive: list[str] = []
    for number in range(120):
        match chance.randrange(4) if alive else 0:
            case 0 | 1:
                alive.append(f"c{number}")
                put(api, alive[-1], str(number))
            case 2:
                change(api, chance.choice(alive), str(number))
            case _:
                remove(api, alive.pop(chance.randrange(len(alive))))
        if chance.random() < 0.06:
            chance.choice([_expires_in_the_stream, _drops_connections, _restarts, _is_busy])(api)
            threading.Event().wait(chance.uniform(0, 0.1))
    for copy in copies:
        same(api, copy)
    assert len(on_server(api)) >= len(alive) > 0


# -- closing


def test_closing_ends_the_thread_and_its_connection(api: ApiServer, cluster: Cluster) -> None:
    before = threads()
    made = [Mirror(cluster, CONFIG_MAPS), Mirror(cluster, PODS)]
    until(lambda: sum(request.verb == "watch" for request in api.requests) == 2, SOON)
    for each in made:
        each.close()
    until(lambda: threads() == before, 2.0)
    port, here = int(api.url.rpartition(":")[2]), psutil.Process()
    open_ones = [item for item in here.net_connections("tcp4") if item.raddr and item.raddr.port == port]
    assert [item.status for item in open_ones if item.status == psutil.CONN_ESTABLISHED] == []
    assert all(each.trouble is None for each in made)
    Mirror(cluster, PODS).close()
    until(lambda: threads() == before, 2.0)


def test_one_that_never_reached_a_server_is_closed_too(api: ApiServer, cluster: Cluster) -> None:
    before = threads()
    api.stop()
    lost = Mirror(cluster, PODS)
    until(lambda: lost.trouble is not None, SOON)
    lost.close()
    until(lambda: threads() == before, SOON)
    assert lost.objects() == ()


def test_what_was_not_seen_yet_is_not_taken_for_gone(
    api: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose RayJob is not in a list that did not come must not be written off."""
    api.hang_next("list .*rayjobs")
    watcher = Watcher(cluster, "run")
    with pytest.raises(InfrastructureError, match="slow to answer"):
        watcher.scene(0.2)
    monkeypatch.undo()
    api.release()
    until(lambda: _seen(watcher), SOON)
    watcher.close()


def _seen(watcher: Watcher) -> bool:
    try:
        return watcher.scene(0.1).rayjob is None
    except InfrastructureError:
        return False
