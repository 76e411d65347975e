"""The emulated cluster with real Ray, for the tests that break it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.backends import Backend
from tests.contract.grounds import OnCluster
from tests.kube.site import Site, processes


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", processes) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


@pytest.fixture
def ground(site: Site) -> OnCluster:
    return OnCluster(site.pool())


@pytest.fixture
def engine(ground: OnCluster) -> Backend:
    return ground.backend()
