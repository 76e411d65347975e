"""Objects of a bucket and ranges of them, fetched by many threads at once with little CPU: what a cache is filled by.

It asks by obstore, whose requests hold no Python lock and cost about an eighth of boto3's CPU time. Credentials,
endpoint, region and trusted certificates are those of the process's boto3 client, and what obstore does not get, boto3
is asked for once more: its patience, and what a failure is called, are the same for all that reads S3. Nothing is kept,
and nothing decoded.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from launcher.errors import InfrastructureError, LaunchError
from launcher.s3 import S3Store, forget_s3_client, s3_client, s3_errors
from trainers.data.counts import Counts
from trainers.data.spaces import Spaces

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Credential
    from obstore.store import S3Store as Client

RETRIES = 4
"""How often obstore tries again, within seconds; whoever needs more patience gets boto3's."""
SHORTEST, LONGEST = timedelta(seconds=0.1), timedelta(seconds=5)
"""Pauses before the first of them and at most."""
PART = 1 << 18
"""Bytes at least that are copied at once of what is longer."""
KEPT = 48 << 20
"""Bytes of memory for long ranges that are kept for later ones: of all that a source has on their way at once."""


class Bucket:
    """The objects of a bucket. Thread safe, for any number of threads, and usable in a forked child.

    Args:
        name: of the bucket.
        counts: where `requests`, `repeated`, `bytes` and `fetch_seconds` are counted, but for a forked child's.
        patience: seconds without a byte after which a request is sent again.
    """

    def __init__(self, name: str, counts: Counts, patience: float = 30.0) -> None:
        self.name = name
        self._counts = counts
        self._patience = timedelta(seconds=patience)
        self._store = S3Store(f"s3://{name}")
        self._spaces = Spaces(KEPT)
        self._opening = threading.Lock()
        self._client: Client | None = None
        self._region: str | None = None

    def get(self, key: str, etag: str, length: int, start: int = 0) -> memoryview:
        """`length` bytes of an object from `start` on, read-only; the whole object if that is its size.

        Raises:
            FileNotFoundError: there is no such object.
            DataError: it is not the one with this `etag`, or there is no such bucket.
            SiteError: credentials or permissions do not suffice.
            InfrastructureError: S3 does not answer, or sends another number of bytes, time and again.
        """
        if not length:
            return memoryview(b"")
        began = time.monotonic()
        data = self._ask(key, etag, start, start + length)
        repeated = data is None
        if data is None:
            data = memoryview(self._store.read(key, etag or None, (start, start + length)))
            if len(data) != length:
                raise InfrastructureError(f"S3 sent {len(data)} of {length} bytes", where=f"{self._store.uri}/{key}",
                                          hint="try again, or resume the run")  # fmt: skip
            self._find()
        if not _forked():  # the lock of the counts may be held by a thread that the child does not have
            self._counts.add(requests=1, repeated=repeated, bytes=length, fetch_seconds=time.monotonic() - began)
        return data

    def _ask(self, key: str, etag: str, start: int, stop: int) -> memoryview | None:
        """The bytes by obstore, or None if it did not get them."""
        if _forked() or not _nameable(key):
            return None
        import obstore
        from obstore.exceptions import BaseError

        client = self._client or self._opened()
        options: GetOptions = {"range": (start, stop)}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            found = obstore.get(client, key, options=options)
            if stop - start <= PART:
                data = memoryview(found.bytes())
                return data if len(data) == stop - start else None
            # Else each of many threads would be left with malloc's memory for the largest that it ever got.
            whole, at = self._spaces.lend(stop - start), 0
            for part in found.stream(min_chunk_size=PART):
                whole[at : at + len(part)] = memoryview(part)
                at += len(part)
            return whole.data.toreadonly() if at == len(whole) else None
        except (BaseError, FileNotFoundError, ValueError):
            return None

    def _opened(self) -> Client:
        with self._opening:
            self._client = self._client or self._open()
            return self._client

    def _open(self) -> Client:
        from obstore.store import S3Store as Client

        with s3_errors(self._store, ""):
            boto = s3_client()
            endpoint, region = boto.meta.endpoint_url, self._region or boto.meta.region_name
            if region != boto.meta.region_name:
                import boto3

                endpoint = boto3.client("s3", region_name=region).meta.endpoint_url
            # Whether the name of the bucket goes into that of the host depends on both, and on the user's settings.
            example = boto.generate_presigned_url("get_object", Params={"Bucket": self.name, "Key": "key"})
            credentials = boto._get_credentials()
            trusted = boto._endpoint.http_session._verify
        in_host = not urlsplit(example).path.endswith(f"/{self.name}/key")
        if in_host:
            endpoint = endpoint.replace("://", f"://{self.name}.", 1)
        more: ClientConfig = {}
        if isinstance(trusted, str):  # AWS_CA_BUNDLE, or ca_bundle of the profile
            with suppress(OSError):  # boto3 is asked next, and says what is wrong with it
                more["root_certificate"] = Path(trusted).read_bytes()
        # All is said, so that obstore takes nothing of it from the environment in its own way.
        return Client(
            self.name, region=region, endpoint=endpoint, aws_endpoint_url_s3=endpoint,
            virtual_hosted_style_request=in_host, skip_signature=credentials is None,
            credential_provider=_Credentials(credentials) if credentials else None,
            client_options={"allow_http": endpoint.startswith("http://"), "connect_timeout": timedelta(seconds=5),
                            "read_timeout": self._patience, "timeout": 10 * self._patience, **more},
            retry_config={"max_retries": RETRIES, "retry_timeout": 2 * self._patience,
                          "backoff": {"init_backoff": SHORTEST, "max_backoff": LONGEST, "base": 2}},
        )  # fmt: skip

    def _find(self) -> None:
        """Learns, once, the bucket's region: boto3 turns to it by itself, obstore does not."""
        if _forked():
            return
        with self._opening:
            if self._region:
                return
            boto = s3_client()
            self._region = boto.meta.region_name
            with suppress(LaunchError, FileNotFoundError), s3_errors(self._store, ""):
                try:
                    answer = boto.head_bucket(Bucket=self.name)
                except boto.exceptions.ClientError as error:  # it says so even to those who may not ask
                    answer = error.response
                found = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
                if found and found != self._region:
                    self._region, self._client = found, None


class _Credentials:
    """What obstore signs with: boto3's credentials, which know themselves when to be renewed."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> S3Credential:
        now = self._credentials.get_frozen_credentials()
        return {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token,
                # obstore then asks each time, but no more than ten times a second.
                "expires_at": datetime.now(UTC)}  # fmt: skip


def _nameable(key: str) -> bool:
    """Whether obstore asks for just this key: it refuses some, and takes the slash off others."""
    return not any(part in ("", ".", "..") for part in key.split("/"))


_process = 0


def _forked() -> bool:
    """Whether this is a child of the process that uses obstore, whose threads it does not have."""
    global _process
    _process = _process or os.getpid()
    return _process != os.getpid()


# The child must not share the parent's connections.
os.register_at_fork(after_in_child=forget_s3_client)
