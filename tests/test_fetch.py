"""Fetching from a bucket: the right bytes for many threads, and what happens when S3 or the credentials fail."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from launcher.errors import DataError, InfrastructureError, LaunchError, SiteError, UserError
from launcher.s3 import forget_s3_client, s3_client
from launcher.storage import open_store
from tests.broken_s3 import BrokenS3
from tests.scripted import certificate
from trainers.data.counts import Counts
from trainers.data.fetch import Bucket

WHOLE = bytes(range(256)) * 40
"""The object `key` of the bucket that misbehaves."""


@pytest.fixture
def counts() -> Counts:
    """What is asked for in this test."""
    return Counts()


@pytest.fixture
def broken(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokenS3]:
    """An S3 that misbehaves, in whose bucket is an object `key`."""
    assert s3
    with BrokenS3() as server:
        server.objects["/bucket/key"] = WHOLE
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        forget_s3_client()
        yield server


def fill(bucket: str, objects: dict[str, bytes], counts: Counts | None = None) -> tuple[Bucket, dict[str, str]]:
    """A bucket with these objects, and their tags."""
    store = open_store(bucket)
    for key, data in objects.items():
        store.write(key, data)
    return Bucket(bucket.removeprefix("s3://"), counts or Counts()), {entry.key: entry.etag for entry in store.list()}


def counted(counts: Counts) -> tuple[float, float, float]:
    """Requests, bytes, and how often boto3 had to be asked."""
    sums = counts.so_far()
    return sums["requests"], sums["bytes"], sums["repeated"]


# -- what is right


def test_objects_and_ranges_are_fetched_and_counted(bucket: str, counts: Counts) -> None:
    data = bytes(range(256)) * 1000
    there, tags = fill(bucket, {"a/image.jpg": data}, counts)
    assert bytes(there.get("a/image.jpg", tags["a/image.jpg"], len(data))) == data
    assert bytes(there.get("a/image.jpg", tags["a/image.jpg"], 1000, 70_001)) == data[70_001:71_001]
    assert bytes(there.get("a/image.jpg", "", 1, len(data) - 1)) == data[-1:]
    assert bytes(there.get("a/image.jpg", tags["a/image.jpg"], 0)) == b""
    assert counted(counts) == (3, len(data) + 1001, 0)


@pytest.mark.parametrize("key", ["ünï cödé.jpg", "a b/c+d%20e?#&~*'.jpg", "cats//1.jpg", "/lead", "trail/", "a/./b"])
def test_any_key_is_fetched_as_it_is_spelled(bucket: str, key: str) -> None:
    there, tags = fill(bucket, {key: b"right", key.strip("/"): b"right" if key == key.strip("/") else b"wrong"})
    assert bytes(there.get(key, tags[key], 5)) == b"right"


def test_many_threads_get_what_each_asked_for(bucket: str, counts: Counts) -> None:
    objects = {f"{number:03}": bytes([number]) * (2000 + number) for number in range(64)}
    there, tags = fill(bucket, objects, counts)
    with ThreadPoolExecutor(64) as pool:
        wanted = [*objects] * 3
        found = [*pool.map(lambda key: bytes(there.get(key, tags[key], len(objects[key]))), wanted)]
    assert found == [objects[key] for key in wanted]
    assert counted(counts) == (192, sum(map(len, found)), 0)


def test_without_credentials_requests_are_unsigned(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = bucket.removeprefix("s3://")
    s3_client().put_object(Bucket=name, Key="public", Body=b"free", ACL="public-read")
    s3_client().put_object(Bucket=name, Key="private", Body=b"mine")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    forget_s3_client()
    assert bytes(Bucket(name, Counts()).get("public", "", 4)) == b"free"
    with pytest.raises(SiteError, match="refuses access"):
        Bucket(name, Counts()).get("private", "", 4)


def test_the_endpoint_is_the_one_that_boto3_uses(
    broken: BrokenS3, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", broken.url)
    forget_s3_client()
    assert bytes(Bucket("bucket", counts).get("key", "tag", len(WHOLE))) == WHOLE
    assert counted(counts)[2] == 0


@pytest.mark.usefixtures("s3")
def test_the_certificates_that_boto3_trusts_are_trusted(
    tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = certificate(tmp_path / "own"), certificate(tmp_path / "other")
    with BrokenS3(own / "both.pem") as server:
        server.objects["/bucket/key"] = WHOLE
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(own / "ca.pem"))
        forget_s3_client()
        assert bytes(Bucket("bucket", counts).get("key", "tag", len(WHOLE))) == WHOLE
        assert counted(counts) == (1, len(WHOLE), 0)
        for bundle in (other / "ca.pem", tmp_path / "missing.pem"):
            monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
            forget_s3_client()
            with pytest.raises(InfrastructureError, match="SSL validation failed") as raised:
                Bucket("bucket", counts).get("key", "tag", len(WHOLE))
            assert "AWS_CA_BUNDLE" in raised.value.hint


def test_a_bucket_in_another_region_is_found_once(broken: BrokenS3, counts: Counts) -> None:
    broken.region = "eu-west-3"
    there = Bucket("bucket", counts)
    for start in range(5):
        assert bytes(there.get("key", "tag", 10, start)) == WHOLE[start : start + 10]
    assert counted(counts) == (5, 50, 1)


FORK = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from trainers.data.counts import Counts
from trainers.data.fetch import Bucket

def get(start):
    return there.get("key", "tag", 100, start)

counts = Counts()
there = Bucket("bucket", counts)
if sys.argv[1] == "used":
    with ThreadPoolExecutor(8) as pool:
        before = [*pool.map(get, range(0, 800, 100))]
child = os.fork()
with ThreadPoolExecutor(8) as pool:
    got = [*pool.map(get, range(0, 800, 100))]
assert b"".join(got) == bytes(range(256)) * 3 + bytes(range(32)), "wrong bytes"
assert counts.so_far()["requests"] == (16 if child and sys.argv[1] == "used" else 8), counts.so_far()
if child:
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
os._exit(0)
"""


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("parent", ["used", "unused"])
def test_a_forked_child_fetches_too_beside_its_parent(parent: str) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# -- what fails


def test_a_changed_a_missing_and_a_foreign_object_are_told_as_the_store_tells_them(bucket: str) -> None:
    there, tags = fill(bucket, {"image": b"old"})
    store = open_store(bucket)
    store.write("image", b"newer")
    told = []
    for read in (lambda: there.get("image", tags["image"], 3), lambda: store.read("image", tags["image"])):
        with pytest.raises(DataError, match="changed after the run was planned") as changed:
            read()
        told.append(changed.value.to_record())
    assert told[0] == told[1]
    with pytest.raises(FileNotFoundError):
        there.get("other", "tag", 3)
    with pytest.raises(DataError, match="no bucket nobody-made-this"):
        Bucket("nobody-made-this", Counts()).get("image", "tag", 3)
    with pytest.raises(UserError, match=r"[Bb]ucket"):
        Bucket("no spaces", Counts()).get("image", "tag", 3)


@pytest.mark.parametrize(
    "faults", [["SlowDown"], ["InternalError", "SlowDown"], ["cut"], ["short"], ["hang"], ["ExpiredToken"]]
)
def test_what_passes_is_tried_again(broken: BrokenS3, counts: Counts, faults: list[str]) -> None:
    broken.faults["/bucket/key"] = [*faults]
    assert bytes(Bucket("bucket", counts, patience=0.5).get("key", "tag", 5000, 7)) == WHOLE[7:5007]
    assert broken.faults["/bucket/key"] == []
    assert len(broken.asked) == len(faults) + 1
    assert counted(counts)[:2] == (1, 5000)


@pytest.mark.parametrize(
    ("fault", "kind", "expected"),
    [
        ("SlowDown", InfrastructureError, "S3 answered SlowDown: as told"),
        ("InternalError", InfrastructureError, "S3 answered InternalError: as told"),
        ("cut", InfrastructureError, "the download broke off three times"),
        ("short", InfrastructureError, "S3 sent 2500 of 5000 bytes"),
        ("ExpiredToken", SiteError, "S3 does not accept the credentials (ExpiredToken: as told)"),
        ("AccessDenied", SiteError, "S3 refuses access (AccessDenied)"),
    ],
)
def test_what_does_not_pass_is_named(broken: BrokenS3, fault: str, kind: type[LaunchError], expected: str) -> None:
    broken.faults["/bucket/key"] = [fault] * 20
    with pytest.raises(kind) as raised:
        Bucket("bucket", Counts(), patience=0.1).get("key", "tag", 5000)
    assert type(raised.value) is kind
    assert expected in raised.value.what
    assert raised.value.where == "s3://bucket/key"
    assert raised.value.hint


@pytest.mark.usefixtures("s3")
def test_a_server_that_is_not_there_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_s3_client()
        with pytest.raises(InfrastructureError, match="connect") as raised:
            Bucket("bucket", Counts(), patience=0.1).get("key", "tag", 3)
    assert "AWS_ENDPOINT_URL" in raised.value.hint


def test_credentials_are_renewed_before_they_expire(
    broken: BrokenS3, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{broken.url}/credentials")
    forget_s3_client()
    broken.lifetime = timedelta(minutes=5)  # so little that boto3 renews them at each use
    there, limit = Bucket("bucket", counts), time.monotonic() + 20
    while len({token for _, token, _ in broken.asked}) < 3 and time.monotonic() < limit:
        assert bytes(there.get("key", "tag", 100)) == WHOLE[:100]
    tokens = [token for _, token, _ in broken.asked]
    assert len({*tokens}) == 3
    assert all(tokens)
    assert counted(counts)[2] == 0


def test_credentials_that_cannot_be_had_are_a_site_error(broken: BrokenS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_s3_client()
    with pytest.raises(SiteError, match="nobody"):
        Bucket("bucket", Counts()).get("key", "tag", 3)
    assert broken.asked == []
