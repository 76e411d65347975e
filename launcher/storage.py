"""Objects under one root, on local disk or S3, with the few promises that runs rest on.

A write is whole or absent; `create` has exactly one winner; a reader never sees half an object. Every failure
of the storage comes out as a `LaunchError` that names who has to act. boto3 is imported on first use of S3.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import DataError, InfrastructureError, LaunchError, SiteError, UserError

SEGMENT_BYTES = 64 * 1024
"""Size at which a journal on S3 starts a new object: each flush rewrites at most this much."""


@dataclass(frozen=True)
class Entry:
    """One object: its key below the store's root, its size in bytes, and a tag that changes with its content."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """Objects by key (`a/b.json`, always `/`) below `uri`. A missing object raises `FileNotFoundError`."""

    uri: str

    def read(self, key: str, etag: str | None = None) -> bytes:
        """The whole object. With `etag`, a changed object raises `DataError`."""

    def write(self, key: str, data: bytes) -> None:
        """Replaces the object; readers see the old or the new one."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes the object if there is none; False when there is. Of many callers one gets True."""

    def upload(self, key: str, path: Path) -> None:
        """`write` from a file."""

    def download(self, key: str, path: Path) -> None:
        """The object as a file at `path`, which appears whole."""

    def delete(self, key: str) -> None:
        """Removes the object; a missing one is no error."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, in key order."""

    def folders(self) -> tuple[str, ...]:
        """Names of the first-level folders."""

    def child(self, folder: str) -> Store:
        """The store rooted at a folder of this one."""

    def append(self, key: str) -> Appender:
        """A writer that adds to the journal `key`, after what is there."""

    def read_from(self, key: str, cursor: Cursor) -> tuple[bytes, Cursor]:
        """What was added to the journal `key` since `cursor`, and the cursor after it."""


class Appender(Protocol):
    """Adds bytes to a journal. `flush` makes what was written readable to others."""

    def write(self, data: bytes, /) -> object: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Cursor:
    """A place in a journal; the default is its beginning."""

    segment: int = 0
    offset: int = 0


def open_store(uri: str | Path) -> Store:
    """The store at a folder or at `s3://bucket/prefix`. Nothing is created or requested."""
    text = str(uri)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text:
        scheme = text.split("://", 1)[0]
        raise UserError(f"storage of kind {scheme}:// is not supported", where=text, hint="use a folder or s3://")
    return LocalStore(Path(text).expanduser().absolute())


class LocalStore:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def path(self, key: str) -> Path:
        """Where the object lies as a file."""
        return self.root / key

    def read(self, key: str, etag: str | None = None) -> bytes:
        try:
            with open(self.path(key), "rb") as file:
                if etag is not None and file_tag(os.fstat(file.fileno())) != etag:
                    raise _changed(f"{self.uri}/{key}")
                return file.read()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(str(self.path(key))) from error
        except PermissionError as error:
            raise _refused(error, self.path(key)) from error

    def write(self, key: str, data: bytes) -> None:
        with _os_errors(self.path(key)):
            os.replace(self._temporary(key, data), self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        with _os_errors(self.path(key)):
            temporary = self._temporary(key, data)
            try:
                os.link(temporary, self.path(key))
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True

    def upload(self, key: str, path: Path) -> None:
        with _os_errors(self.path(key)):
            temporary = self._temporary(key, b"")
            try:
                shutil.copyfile(path, temporary)
                _sync(temporary)
            except OSError:
                os.unlink(temporary)
                raise
            os.replace(temporary, self.path(key))

    def download(self, key: str, path: Path) -> None:
        with _os_errors(path):
            shutil.copyfile(self.path(key), f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def delete(self, key: str) -> None:
        with _os_errors(self.path(key)):
            self.path(key).unlink(missing_ok=True)
            for folder in self.path(key).parents:
                if folder == self.root.parent or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        base = self.root / prefix if prefix.endswith("/") or not prefix else (self.root / prefix).parent
        found: list[Entry] = []
        for folder, folders, names in os.walk(base, onerror=_unlisted, followlinks=True):
            folders[:] = [name for name in folders if not _leads_back(os.path.join(folder, name))]
            for name in names:
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self.root).replace(os.sep, "/")
                if key.startswith(prefix) and not name.startswith(".tmp-"):
                    try:
                        stat = os.stat(path)
                    except FileNotFoundError:
                        continue
                    found.append(Entry(key, stat.st_size, file_tag(stat)))
        yield from sorted(found, key=lambda entry: entry.key)

    def folders(self) -> tuple[str, ...]:
        if not self.root.is_dir():
            return ()
        names = (item.name for item in self.root.iterdir() if item.is_dir() and not item.name.startswith("."))
        return tuple(sorted(names))

    def child(self, folder: str) -> LocalStore:
        return LocalStore(self.root / folder)

    def append(self, key: str) -> Appender:
        with _os_errors(self.path(key)):
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            return open(self.path(key), "ab")

    def read_from(self, key: str, cursor: Cursor) -> tuple[bytes, Cursor]:
        try:
            with open(self.path(key), "rb") as file:
                file.seek(cursor.offset)
                data = file.read()
        except FileNotFoundError:
            return b"", cursor
        return data, Cursor(0, cursor.offset + len(data))

    def _temporary(self, key: str, data: bytes) -> str:
        folder = self.path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.unlink(name)
            raise
        os.chmod(name, 0o644)
        return name


def file_tag(stat: os.stat_result) -> str:
    """The tag of a local file, in the place of S3's ETag: size and time of the last change."""
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _unlisted(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise _refused(error, Path(error.filename)) from error


def _leads_back(folder: str) -> bool:
    """Whether the folder is a link to one that the way here went through, which a walk would follow for ever."""
    if not os.path.islink(folder):
        return False
    return os.path.realpath(folder) in {os.path.realpath(parent) for parent in Path(folder).parents}


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class _os_errors:
    """Turns the OSErrors of a block into errors that say who has to act; `FileNotFoundError` passes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise _refused(error, self.path) from error


def _refused(error: OSError, path: Path) -> LaunchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SiteError("no space left on the disk", where=str(path), hint="free some, or choose another --storage")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SiteError("permission denied", where=str(path), hint="check the owner and mode of the folder")
    return SiteError(f"{error.strerror or error}", where=str(path), hint="check the disk")


def _changed(where: str) -> DataError:
    return DataError(
        "the image changed after the run was planned", where=where, hint="launch a new run, which indexes the data anew"
    )


class S3Store:
    """Objects below `s3://bucket/prefix`.

    Credentials, profile, region and `AWS_ENDPOINT_URL` are boto3's own; without any credentials requests are
    unsigned, as public buckets want them.
    """

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError("no bucket in the address", where=uri, hint="write s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def read(self, key: str, etag: str | None = None) -> bytes:
        match = {"IfMatch": f'"{etag}"'} if etag else {}
        for last in (False, False, True):
            with self._errors(key):
                answer = s3_client().get_object(Bucket=self.bucket, Key=self._key(key), **match)
            try:
                data: bytes = answer["Body"].read()
                return data
            except Exception as error:  # a body that breaks off is not retried by botocore
                if last:
                    raise InfrastructureError(
                        f"the download broke off three times ({type(error).__name__})",
                        where=f"{self.uri}/{key}", hint="check the network, then resume",
                    ) from error  # fmt: skip
        raise AssertionError("unreachable")

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            s3_client().put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(key):
            while True:
                try:
                    s3_client().put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code in ("PreconditionFailed", "412"):
                        return False
                    # Two conditional writes met; S3 asks the loser to try again.
                    if code != "ConditionalRequestConflict":
                        raise

    def upload(self, key: str, path: Path) -> None:
        with self._errors(key):
            s3_client().upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            s3_client().download_file(self.bucket, self._key(key), str(path))

    def delete(self, key: str) -> None:
        with self._errors(key):
            s3_client().delete_object(Bucket=self.bucket, Key=self._key(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        base = f"{self.prefix}/" if self.prefix else ""
        with self._errors(prefix):
            pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"].removeprefix(base), item["Size"], item["ETag"].strip('"'))

    def folders(self) -> tuple[str, ...]:
        base = f"{self.prefix}/" if self.prefix else ""
        with self._errors(""):
            pages = (
                s3_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base, Delimiter="/")
            )
            found = (item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ()))
            return tuple(prefix.removeprefix(base).rstrip("/") for prefix in found)

    def child(self, folder: str) -> S3Store:
        return S3Store(f"{self.uri}/{folder}")

    def append(self, key: str) -> Appender:
        return _S3Appender(self, key)

    def read_from(self, key: str, cursor: Cursor) -> tuple[bytes, Cursor]:
        data = b""
        segment, offset = max(cursor.segment, 1), cursor.offset
        while True:
            try:
                part = self.read(f"{key}.{segment:06d}")
            except FileNotFoundError:
                return data, Cursor(segment, offset)
            data += part[offset:]
            # The next segment begins only when this one is full; until then there is nothing more to ask for.
            if len(part) < SEGMENT_BYTES:
                return data, Cursor(segment, len(part))
            segment, offset = segment + 1, 0

    def _errors(self, key: str) -> _s3_errors:
        return _s3_errors(self, key)


class _S3Appender:
    """S3 cannot append: a journal is a row of objects, of which each flush rewrites the last."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        segments = [entry.key for entry in store.list(f"{key}.") if entry.key[-6:].isdigit()]
        self._number = int(segments[-1][-6:]) if segments else 1
        self._data = bytearray(store.read(segments[-1])) if segments else bytearray()
        self._dirty = False
        self._next_when_full()

    def write(self, data: bytes) -> None:
        self._data += data
        self._dirty = True

    def flush(self) -> None:
        if not self._dirty:
            return
        self._store.write(f"{self._key}.{self._number:06d}", bytes(self._data))
        self._dirty = False
        self._next_when_full()

    def _next_when_full(self) -> None:
        if len(self._data) >= SEGMENT_BYTES:
            self._number += 1
            self._data.clear()

    def close(self) -> None:
        self.flush()


_client: Any = None


def s3_client() -> Any:
    """The process's one S3 client; boto3 clients may be shared by threads."""
    global _client
    if _client is None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        try:
            session = boto3.session.Session()
            credentials = session.get_credentials()
        except BotoCoreError as error:
            raise SiteError(str(error), where="AWS profile", hint="check AWS_PROFILE and ~/.aws/config") from error
        config = Config(
            # botocore's own default gives up after 3 attempts, within 2 s: too soon for a throttled bucket.
            retries={"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or 10)},
            connect_timeout=5,
            read_timeout=20,
            tcp_keepalive=True,
            max_pool_connections=64,
            signature_version=UNSIGNED if credentials is None else None,
        )
        _client = session.client("s3", config=config)
    return _client


def forget_s3_client() -> None:
    """The next S3 call reads credentials and endpoint anew."""
    global _client
    _client = None


class _s3_errors:
    """Turns botocore's errors into ours, in one place; a missing object becomes `FileNotFoundError`."""

    def __init__(self, store: S3Store, key: str) -> None:
        self.where = f"{store.uri}/{key}" if key else store.uri
        self.bucket = store.bucket

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or isinstance(error, (LaunchError, FileNotFoundError)):
            return
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            raise self._answered(error) from error
        if isinstance(error, (BotoCoreError, Boto3Error)):
            cause = error.__context__
            raise (self._answered(cause) if isinstance(cause, ClientError) else self._unanswered(error)) from error

    def _answered(self, error: Any) -> Exception:
        code = error.response["Error"]["Code"]
        message = error.response["Error"].get("Message", code)
        if code in ("NoSuchKey", "404", "NotFound"):
            return FileNotFoundError(self.where)
        if code == "NoSuchBucket":
            return DataError(f"there is no bucket {self.bucket}", where=self.where, hint="check the name: aws s3 ls")
        if code in ("PreconditionFailed", "412"):
            return _changed(self.where)
        if code in (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "InvalidToken",
            "TokenRefreshRequired",
        ):
            return SiteError(
                f"S3 does not accept the credentials ({code}: {message})", where=self.where,
                hint="renew them (aws sso login), or check AWS_PROFILE and AWS_ACCESS_KEY_ID",
            )  # fmt: skip
        if code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"):
            return SiteError(
                f"S3 refuses access ({code})", where=self.where,
                hint=f"the credentials in use need s3:GetObject and s3:ListBucket on {self.bucket};"
                " aws sts get-caller-identity shows whose they are",
            )  # fmt: skip
        return InfrastructureError(
            f"S3 answered {code}: {message}", where=self.where, hint="try again, or resume the run"
        )

    def _unanswered(self, error: Exception) -> LaunchError:
        from botocore.exceptions import BotoCoreError

        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
            return SiteError(str(error), where=self.where, hint="set AWS_PROFILE, or run aws configure")
        if name == "ParamValidationError" or not isinstance(error, BotoCoreError):
            return UserError(" ".join(str(error).split()), where=self.where, hint="write s3://bucket/prefix")
        return InfrastructureError(
            " ".join(str(error).split()), where=self.where, hint="check the network and AWS_ENDPOINT_URL"
        )
