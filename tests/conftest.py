"""An S3 that answers over HTTP, and the two places where storage can lie. Nothing here stands in for our code."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.s3 import forget_s3_client, s3_client
from tests.kube.apiserver import ApiServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server of this process (moto), for the whole session."""
    from moto.server import ThreadedMotoServer

    # A line per request would drown everything else that a failed test has to say.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server's address, with an environment that leads to it and to no real cloud."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_PROFILE", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    forget_s3_client()
    yield s3_endpoint
    forget_s3_client()


@pytest.fixture
def bucket(s3: str) -> str:
    """Address of a new, empty bucket."""
    assert s3
    name = f"bucket-{next(_numbers)}"
    s3_client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of an empty storage: each test runs once on a folder and once on S3."""
    if request.param == "folder":
        return str(tmp_path / "storage")
    return f"{request.getfixturevalue('bucket')}/some/prefix"


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """An emulated API server with a namespace `team`."""
    with ApiServer() as server:
        server.add_namespace("team")
        yield server
