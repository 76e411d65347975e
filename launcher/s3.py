"""The S3 side of `launcher.storage`: boto3, imported on first use, and its errors in terms of who has to act.

Nothing outside this file and the tests knows botocore.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import DataError, InfrastructureError, LaunchError, SiteError, UserError
from launcher.storage import Appender, Cursor, Entry, changed

SEGMENT_BYTES = 64 * 1024
"""Size at which a journal on S3 starts a new object: each flush rewrites at most this much."""
NEEDED = {
    "GetObject": "s3:GetObject and s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
}
"""What a user has to be allowed for an operation. Without s3:ListBucket, S3 refuses an object that is not there."""


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

    def read(self, key: str, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
        from botocore.exceptions import ClientError

        asked = {"IfMatch": f'"{etag}"'} if etag else {}
        if span is not None:
            if span[1] <= span[0]:
                return b""
            asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        for last in (False, False, True):
            with self._errors(key):
                try:
                    answer = s3_client().get_object(Bucket=self.bucket, Key=self._key(key), **asked)
                except ClientError as error:
                    if error.response["Error"]["Code"] == "InvalidRange":  # it lies behind the end
                        return b""
                    raise
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

    def _errors(self, key: str) -> s3_errors:
        return s3_errors(self, key)


class _S3Appender:
    """S3 cannot append: a journal is a row of objects, of which each flush rewrites the last."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        segments = [entry.key for entry in store.list(f"{key}.") if entry.key[-6:].isdigit()]
        self._number = int(segments[-1][-6:]) if segments else 1
        self._data = bytearray(store.read(segments[-1])) if segments else bytearray()
        self._dirty = False
        if self._data and not self._data.endswith(b"\n"):
            self._data += b"\n"
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


class s3_errors:
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

        if isinstance(error, (BotoCoreError, Boto3Error, ClientError)):
            answer = error if isinstance(error, ClientError) else error.__context__
            if isinstance(answer, ClientError):
                code = answer.response["Error"]["Code"]
                message = answer.response["Error"].get("Message", code)
                raise self._answered(code, message, answer.operation_name) from error
            raise self._not_sent(error) from error

    def _answered(self, code: str, message: str, operation: str) -> Exception:
        """The error for an answer of S3 with this code, such as NoSuchKey, or the number of the status without one."""
        if code in ("NoSuchKey", "404", "NotFound"):
            return FileNotFoundError(self.where)
        if code == "NoSuchBucket":
            return DataError(f"there is no bucket {self.bucket}", where=self.where, hint="check the name: aws s3 ls")
        if code in ("PreconditionFailed", "412"):
            return changed(self.where)
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
                hint=f"the credentials in use need {NEEDED.get(operation, NEEDED['GetObject'])} on {self.bucket};"
                " aws sts get-caller-identity shows whose they are",
            )  # fmt: skip
        return InfrastructureError(
            f"S3 answered {code}: {message}", where=self.where, hint="try again, or resume the run"
        )

    def _not_sent(self, error: Exception) -> LaunchError:
        from botocore.exceptions import BotoCoreError

        name, said = type(error).__name__, " ".join(str(error).split())
        if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
            return SiteError(str(error), where=self.where, hint="set AWS_PROFILE, or run aws configure")
        if name == "ParamValidationError" or not isinstance(error, BotoCoreError):
            return UserError(said, where=self.where, hint="write s3://bucket/prefix")
        settings = "AWS_ENDPOINT_URL and AWS_CA_BUNDLE" if name == "SSLError" else "AWS_ENDPOINT_URL"
        return InfrastructureError(said, where=self.where, hint=f"check the network and {settings}")
