"""What both stores promise, and what each failure of a storage is called."""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from launcher.errors import DataError, InfrastructureError, SiteError, UserError
from launcher.s3 import SEGMENT_BYTES, S3Store, forget_s3_client, s3_client
from launcher.storage import Cursor, LocalStore, Store, open_store


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place)


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b.bin", b"\0one")
    assert store.read("a/b.bin") == b"\0one"
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    store.write("empty", b"")
    assert store.read("empty") == b""


@pytest.mark.parametrize("span", [(0, 4), (2, 5), (3, 99), (5, 5), (10, 12), (11, 20), (4, 2)])
def test_a_span_reads_as_a_slice_does(store: Store, span: tuple[int, int]) -> None:
    store.write("some", b"0123456789")
    (entry,) = store.list()
    assert store.read("some", span=span) == store.read("some", entry.etag, span) == b"0123456789"[slice(*span)]
    store.write("empty", b"")
    assert store.read("empty", span=span) == b""
    store.write("some", b"changed")
    with pytest.raises(DataError, match="changed"):
        store.read("some", entry.etag, (0, 1))
    with pytest.raises(FileNotFoundError):
        store.read("other", span=(0, 1))


@pytest.mark.parametrize("key", ["nothing", "a", "a/b/c"])
def test_a_missing_object_is_file_not_found(store: Store, key: str) -> None:
    store.write("a/b", b"x")
    with pytest.raises(FileNotFoundError):
        store.read(key)


def test_create_has_one_winner(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: store.create("name", b"%d" % number), range(16)))
    assert won.count(True) == 1
    assert store.read("name") == b"%d" % won.index(True)
    assert not store.create("name", b"late")
    assert [entry.key for entry in store.list()] == ["name"]


def test_list_is_sorted_and_exact_in_its_prefix(store: Store) -> None:
    keys = ["b", "a/10", "a/9", "a-c", "a/x/y", "ab/c", "é/ü"]
    for key in keys:
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("a/")] == ["a/10", "a/9", "a/x/y"]
    assert [entry.key for entry in store.list("a")] == ["a-c", "a/10", "a/9", "a/x/y", "ab/c"]
    assert [entry.key for entry in store.list("a/x/y")] == ["a/x/y"]
    assert list(store.list("none/")) == []
    assert [entry.size for entry in store.list("a/1")] == [4]


def test_a_store_of_which_nothing_exists_is_empty(store: Store) -> None:
    assert list(store.list()) == []
    assert list(store.folders()) == []


def test_the_tag_of_an_entry_reads_the_object_until_it_changes(store: Store) -> None:
    store.write("image", b"old")
    (entry,) = store.list()
    assert store.read("image", entry.etag) == b"old"
    store.write("image", b"newer")
    with pytest.raises(DataError, match="changed"):
        store.read("image", entry.etag)


def test_delete_can_be_repeated(store: Store) -> None:
    store.write("a/b", b"x")
    store.write("a/c", b"y")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert [entry.key for entry in store.list()] == ["a/c"]


def test_folders_are_those_of_the_first_level(store: Store) -> None:
    for key in ("b/x/y", "a/z", "file"):
        store.write(key, b"")
    assert list(store.folders()) == ["a", "b"]


def test_a_child_is_the_store_of_a_folder(store: Store) -> None:
    store.child("run").write("spec.json", b"{}")
    assert store.read("run/spec.json") == b"{}"
    assert [entry.key for entry in store.child("run").list()] == ["spec.json"]
    assert store.child("run").uri == f"{store.uri}/run"


def test_files_go_up_and_come_down(store: Store, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(bytes(range(256)) * 1000)
    store.upload("deep/er/file", tmp_path / "up")
    store.download("deep/er/file", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()
    with pytest.raises(FileNotFoundError):
        store.download("missing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_journal_is_read_as_it_grows(store: Store) -> None:
    journal = store.append("log")
    assert store.read_from("log", Cursor())[0] == b""
    seen, cursor = b"", Cursor()
    for line in (b"one\n", b"two\n", b"three\n"):
        journal.write(line)
        journal.flush()
        data, cursor = store.read_from("log", cursor)
        assert data == line
        seen += data
    assert store.read_from("log", cursor)[0] == b""
    assert store.read_from("log", Cursor())[0] == seen
    journal.close()


def test_a_journal_goes_on_over_segments_and_after_reopening(store: Store) -> None:
    pieces = [bytes([65 + number]) * (SEGMENT_BYTES // 3) + b"\n" for number in range(8)]
    cursor, seen = Cursor(), b""
    for number, piece in enumerate(pieces):
        if number % 3 == 0:
            journal = store.append("log")
        journal.write(piece)
        journal.flush()
        if number % 2:
            data, cursor = store.read_from("log", cursor)
            seen += data
        if number % 3 == 2:
            journal.close()
    journal.close()
    assert seen == b"".join(pieces)
    assert store.read_from("log", Cursor())[0] == b"".join(pieces)


# -- failures of a disk


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_the_old_object(full_disk: Path) -> None:
    store = LocalStore(full_disk)
    store.write("state", b"old")
    for write in (store.write, store.create):
        with pytest.raises(SiteError, match="no space left") as raised:
            write("state", bytes(1 << 20))
        assert raised.value.where.endswith("state")
        assert raised.value.hint
    assert store.read("state") == b"old"
    assert [entry.key for entry in store.list()] == ["state"]


def test_a_failed_upload_leaves_nothing_behind(full_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(SiteError, match="no space left"):
        LocalStore(full_disk).upload("large", tmp_path / "large")
    assert os.listdir(full_disk) == []


def test_a_file_where_a_folder_should_be_is_a_site_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError):
        LocalStore(tmp_path / "file").write("key", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SiteError, match="permission denied"):
        LocalStore(tmp_path).write("key", b"")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "else" / "cats").mkdir(parents=True)
    (tmp_path / "else" / "cats" / "1").write_text("")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "up").symlink_to(tmp_path / "else")
    assert [entry.key for entry in LocalStore(tmp_path / "root").list()] == ["again/cats/1", "linked/cats/1"]
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / "pair" / one).mkdir(parents=True)
        (tmp_path / "pair" / one / "file").write_text("")
        (tmp_path / "pair" / one / other).symlink_to(tmp_path / "pair" / other)
    assert [entry.key for entry in LocalStore(tmp_path / "pair").list()] == ["a/b/file", "a/file", "b/a/file", "b/file"]


# -- failures of S3


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_a_data_error() -> None:
    store = open_store("s3://nobody-made-this/prefix")
    for act in (lambda: store.read("key"), lambda: list(store.list()), lambda: store.write("key", b"")):
        with pytest.raises(DataError, match="no bucket nobody-made-this"):
            act()


@pytest.mark.parametrize("address", ["s3://", "s3:///prefix", "gs://bucket"])
def test_an_address_that_cannot_be_is_a_user_error(address: str) -> None:
    with pytest.raises(UserError):
        open_store(address)


@pytest.mark.usefixtures("s3")
def test_a_bucket_name_that_cannot_be_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"[Bb]ucket"):
        open_store("s3://no spaces/prefix").read("key")


@pytest.fixture
def strict_s3(bucket: str, s3_endpoint: str) -> Iterator[str]:
    """A bucket on a server that checks credentials."""

    def unchecked_calls(count: str) -> None:
        address, kind = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, count.encode(), kind, method="POST")).close()

    unchecked_calls("0")
    yield bucket
    unchecked_calls("inf")


def test_credentials_that_are_not_accepted_are_a_site_error(strict_s3: str) -> None:
    with pytest.raises(SiteError, match="InvalidAccessKeyId") as raised:
        list(open_store(strict_s3).list())
    assert "AWS_PROFILE" in raised.value.hint


@pytest.mark.parametrize(
    ("act", "needed"),
    [
        (lambda store, _: store.read("key"), "s3:GetObject and s3:ListBucket"),
        (lambda store, _: list(store.list()), "s3:ListBucket"),
        (lambda store, _: store.write("key", b"data"), "s3:PutObject"),
        (lambda store, path: store.upload("key", path), "s3:PutObject"),
        (lambda store, _: store.delete("key"), "s3:DeleteObject"),
    ],
    ids=["read", "list", "write", "upload", "delete"],
)
def test_who_is_refused_is_told_which_permission_is_needed(
    bucket: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path,
    act: Callable[[Store, Path], object], needed: str,
) -> None:  # fmt: skip
    iam, name = boto3.client("iam"), tmp_path.name
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    (tmp_path / "file").write_bytes(b"data")
    request.getfixturevalue("strict_s3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    forget_s3_client()
    with pytest.raises(SiteError, match="refuses access") as raised:
        act(open_store(bucket), tmp_path / "file")
    assert f"need {needed} on " in raised.value.hint


def test_without_credentials_requests_are_unsigned(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = bucket.removeprefix("s3://")
    s3_client().put_object(Bucket=name, Key="key", Body=b"public", ACL="public-read")
    s3_client().put_object(Bucket=name, Key="private", Body=b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_s3_client()
    headers: list[str] = []
    s3_client().meta.events.register("before-send.s3", lambda request, **_: headers.extend(request.headers))
    assert open_store(bucket).read("key") == b"public"
    assert headers
    assert "Authorization" not in headers
    with pytest.raises(SiteError, match="refuses access"):
        open_store(bucket).read("private")


@pytest.mark.usefixtures("s3")
def test_an_unknown_profile_is_a_site_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(SiteError, match="nobody"):
        open_store("s3://bucket").read("key")


@pytest.mark.usefixtures("s3")
def test_a_server_that_is_not_there_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_s3_client()
        with pytest.raises(InfrastructureError, match="connect") as raised:
            open_store("s3://bucket").read("key")
    assert "AWS_ENDPOINT_URL" in raised.value.hint


def test_a_prefix_is_kept_out_of_the_keys(bucket: str) -> None:
    S3Store(f"{bucket}/a/b/").write("c", b"x")
    assert [entry.key for entry in open_store(bucket).list()] == ["a/b/c"]
    assert [entry.key for entry in open_store(f"{bucket}/a").list()] == ["b/c"]
    assert S3Store(f"{bucket}/a/b").read("c") == b"x"
