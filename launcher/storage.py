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
from typing import Protocol

from launcher.errors import DataError, LaunchError, SiteError, UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One object: its key below the store's root, its size in bytes, and a tag that changes with its content."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """Objects by key (`a/b.json`, always `/`) below `uri`. A missing object raises `FileNotFoundError`."""

    uri: str

    def read(self, key: str, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
        """The object; with `span`, only its bytes from the first number on and before the second, as far as it goes.

        With `etag`, a changed object raises `DataError`.
        """

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
        """A writer that adds to the journal `key`, after what is there: on a new line, should that be cut short."""

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


def cache_folder() -> Path:
    """Where this user keeps, on this machine, what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylaunch"


def standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: on the disk that it would lie on."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def open_store(uri: str | Path) -> Store:
    """The store at a folder or at `s3://bucket/prefix`. Nothing is created or requested."""
    text = str(uri)
    if text.startswith("s3://"):
        from launcher.s3 import S3Store

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

    def read(self, key: str, etag: str | None = None, span: tuple[int, int] | None = None) -> bytes:
        try:
            with open(self.path(key), "rb") as file:
                if etag is not None and file_tag(os.fstat(file.fileno())) != etag:
                    raise changed(f"{self.uri}/{key}")
                if span is None:
                    return file.read()
                file.seek(span[0])
                return file.read(max(span[1] - span[0], 0))
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
        inner = base.relative_to(self.root).as_posix()
        for entry in _walk(base, "" if inner == "." else f"{inner}/"):
            if entry.key.startswith(prefix):
                yield entry

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
            file = open(self.path(key), "a+b")  # noqa: SIM115 - the caller closes it
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            return file

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


def _walk(folder: Path, base: str) -> Iterator[Entry]:
    """The files below a folder in the order of their keys, which begin with `base`; one folder is held at a time."""
    try:
        with os.scandir(folder) as found:
            # A folder is ordered as its keys are, which go on with a slash.
            items = sorted((f"{item.name}/" if item.is_dir() else item.name, item) for item in found)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _refused(error, folder) from error
    for name, item in items:
        if name.endswith("/"):
            if not _leads_back(item.path):
                yield from _walk(Path(item.path), base + name)
        elif not name.startswith(".tmp-"):
            try:
                stat = item.stat()
            except FileNotFoundError:
                continue
            yield Entry(base + name, stat.st_size, file_tag(stat))


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


def changed(where: str) -> DataError:
    """The error for an object that is not the one the index names."""
    return DataError(
        "the image changed after the run was planned", where=where, hint="launch a new run, which indexes the data anew"
    )
