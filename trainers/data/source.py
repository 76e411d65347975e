"""Image bytes by row of the index. What lies on S3 is fetched once per node and shared through a cache folder.

All workers, trials and restarts on a node read the same cache. A cached object is named by a hash of its address
and ETag, so it is never stale and never escapes the folder. Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from launcher.errors import DataError
from launcher.storage import Store, cache_folder, open_store
from trainers.data.index import Index


class Source:
    """The images of an index. Thread safe, and safe beside other processes with the same cache.

    Args:
        index: what to read.
        cache: folder for objects of S3; `default_cache()` if None.
    """

    def __init__(self, index: Index, cache: Path | None = None) -> None:
        self.index = index
        self._cache = cache or default_cache()
        self._stores: dict[str, Store] = {}

    def read(self, row: int) -> bytes:
        """The file of a row, as it was when the index was built.

        Raises:
            DataError: it changed, or it is gone.
            SiteError: credentials or permissions do not suffice.
            InfrastructureError: S3 does not answer.
        """
        uri, inner, etag, offset, size, shared = self.index.place(row)
        span = (offset, offset + size) if shared else None
        store = self._stores.get(uri) or self._open(uri)
        try:
            if not store.uri.startswith("s3://"):
                return store.read(inner, etag or None, span)
            address = f"{uri}/{inner}" + (f"\0{offset}" if span else "")
            return self._cached(address, size, etag, lambda: store.read(inner, etag, span))
        except FileNotFoundError as error:
            raise DataError("the image is gone", where=f"{uri}/{inner}",
                            hint="restore it, or launch a new run, which indexes the data anew") from error  # fmt: skip

    def _open(self, uri: str) -> Store:
        folder: str | Path = uri
        if uri.startswith("sample://"):
            from trainers.data.sample import materialise

            folder = materialise(uri.removeprefix("sample://"))
        return self._stores.setdefault(uri, open_store(folder))

    def _cached(self, address: str, size: int, etag: str, fetch: Callable[[], bytes]) -> bytes:
        name = hashlib.sha256(f"{address}\0{etag}".encode()).hexdigest()
        path = self._cache / name[:2] / name
        data = _whole(path, size)
        if data is not None:
            return data
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _Lock(path.with_suffix(".part"))
        except OSError:  # a full or read-only disk makes reading slow, never impossible
            return fetch()
        with lock:
            data = _whole(path, size)
            if data is None:
                data = fetch()
                with contextlib.suppress(OSError):
                    lock.write(data)
                    os.replace(lock.path, path)
            return data


def default_cache() -> Path:
    """`$RAYLAUNCH_CACHE`, else a folder in the user's cache."""
    return Path(os.environ.get("RAYLAUNCH_CACHE") or cache_folder() / "objects")


def _whole(path: Path, size: int) -> bytes | None:
    """The cached file, if it is there in full: a node that lost power may leave less."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if len(data) == size else None


class _Lock:
    """A file that one thread of one process on the node holds; the kernel frees it when that process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except OSError:
                os.close(self._file)
                raise
            # The holder before may have renamed or removed the file that we waited for; then it guards nothing.
            if self._current():
                return
            os.close(self._file)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._current():
            self.path.unlink()
        os.close(self._file)

    def write(self, data: bytes) -> None:
        os.ftruncate(self._file, 0)
        with os.fdopen(os.dup(self._file), "wb") as file:
            file.write(data)

    def _current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False
