"""One tar shard, written to this machine's disk as it comes: bytes that depend on the images and labels alone.

Where the shard goes, and which images are in it, is others' business.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from launcher.errors import SiteError
from trainers.data import contents
from trainers.data.listing import IMAGE_SUFFIXES, suffix
from trainers.data.shards import WEIGHT_KEY

HEADERS = 3 * tarfile.BLOCKSIZE
"""Bytes that an image takes beside its own, about: its header, and a small JSON file with its header."""
_MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"II": "tif", b"MM": "tif",
          b"GIF8": "gif"}  # fmt: skip


class ShardWriter:
    """A shard at `path`, whole once it is closed without an error, and gone after one. A context.

    Attributes:
        images: number of images so far.
        bytes: their bytes.
        size: bytes of the file; final once it is closed.
        sha256: of the file, as hexadecimal digits; final once it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = 0
        self.bytes = 0
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb")  # noqa: SIM115 - closed by the context
        self._rows: list[tuple[str, str, int, int, str, float | None]] = []
        self._summed = _Summed(self._file)
        self._tar = tarfile.open(fileobj=self._summed, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115

    @property
    def size(self) -> int:
        return self._summed.size

    @property
    def sha256(self) -> str:
        return self._summed.digest.hexdigest()

    def add(self, number: int, key: str, label: str, weight: float | None, data: bytes | memoryview) -> None:
        """Adds an image. `number` makes its name unique; `key`, what it was called, is kept beside it."""
        about: dict[str, str | float] = {"label": label, "key": key}
        if weight is not None:
            about[WEIGHT_KEY] = weight
        # For people; without the dots that would end a sample's name.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", key.rpartition("/")[2].rpartition(".")[0])[:60]
        name = f"{number:08d}-{stem}".rstrip("-_")
        image = f"{name}.{_kind(key, data)}"
        self._rows.append((name, image, self._tar.offset + tarfile.BLOCKSIZE, len(data), label, weight))
        with disk(self.path):
            self._file_of(image, data)
            self._file_of(f"{name}.json", json.dumps(about).encode())
        self.images += 1
        self.bytes += len(data)

    def _file_of(self, name: str, content: bytes | memoryview) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        self._tar.members.clear()  # they would hold all headers of the shard

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):  # on a full disk what is still to be written
                self._file.close()
            self.path.unlink(missing_ok=True)
            return
        with disk(self.path), self._file:
            self._file_of(contents.NAME, contents.written(self._rows))
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Tells a failure of the disk as one, and removes what was half written to `path`."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise SiteError(f"{error.strerror or error}".lower(), where=str(path),
                        hint="free space or mend it; the same command goes on") from error  # fmt: skip


class _Summed:
    """A file that is written to and summed up at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size


def _kind(key: str, data: bytes | memoryview) -> str:
    """The ending of an image's name: its own if that is one, else by its first bytes."""
    kind = suffix(key)
    if kind in IMAGE_SUFFIXES:
        return kind
    start = bytes(data[:4])
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "jpg")
