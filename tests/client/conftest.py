"""A connection to the emulated API server, and one to a server that answers by heart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import Cluster
from tests.kube.apiserver import ApiServer
from tests.scripted import Answer, Script, Scripted, kubeconfig


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", api.url)))
    return Cluster.connect()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Makes a connection to a server that gives these answers."""
    with ExitStack() as stack:

        def made(*answers: Answer, user: dict[str, Any] | None = None) -> tuple[Cluster, Scripted]:
            server = stack.enter_context(Scripted(*answers))
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "scripted", server.url, user)))
            return Cluster.connect(), server

        yield made
