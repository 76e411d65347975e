"""A pack: the images of an index copied, byte for byte, into tar shards of WebDataset's layout, and verified there.

Which image lies in which shard, and so every byte of every shard, follows from the index and the options. A shard is
whole or absent. So a pack that was broken off at any moment is gone on with, and comes out the same. Nothing is
resized or encoded anew.

Beside the shards lies `pack.json`, written last; until then `.packing.json` says which shards are done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError, NotFinishedError, SiteError, UserError
from launcher.storage import Entry, LocalStore, cache_folder, open_store, standing
from trainers.data.bulk import in_order, read_each, why_unreadable
from trainers.data.index import SPLITS, Index
from trainers.data.listing import few
from trainers.data.order import epoch_draws
from trainers.data.shards import FINISHED, UNFINISHED
from trainers.data.source import Source, chunks_of
from trainers.data.writer import HEADERS, ShardWriter, disk

VERSION = 1
SPAN = 8 << 20
"""Bytes of a shard that are read back at once."""

Rows = npt.NDArray[np.int64]
Data = bytes | memoryview
Images = Iterator[tuple[int, tuple[Data, str]]]
Tell = Callable[[str, int, str], None]
"""Called with what is being done (`packing`, `verifying`), so many more bytes of it, and a shard that is done or ""."""


@dataclass(frozen=True)
class Options:
    """What decides, beside the index, what a pack is: size of a shard in MiB, seed of the order, and whether images
    that cannot be read are left out."""

    shard_mb: int = 128
    seed: int = 0
    check: bool = False


@dataclass(frozen=True)
class Shard:
    """A shard that is there: its number of images, their bytes, its own, and the images that it should hold but does
    not, each with key and reason."""

    name: str
    images: int
    bytes: int
    size: int
    sha256: str
    etag: str
    left_out: list[dict[str, str]]


class Pack:
    """The pack of an index at `uri`, a folder or an s3:// prefix; whatever of it is there already.

    Attributes:
        plan: rows of each shard, in the order in which they lie in it.
        done: the shards that are there, by name.
        finished: whether all are, and `pack.json` says so.

    Raises:
        UserError: something else is there, or a pack of other data or with other options.
        DataError: a class has a name that shards cannot give back.
    """

    def __init__(self, index: Index, uri: str, options: Options) -> None:
        strange = [label for label in index.classes if label != label.strip()]
        if strange:
            raise DataError(f"class names with spaces at their ends cannot be packed: {few(map(repr, strange))}",
                            where=index.uri, hint="rename them")  # fmt: skip
        self.index, self.options = index, options
        self.store = open_store(uri)
        self.uri = self.store.uri
        self._footprints = _footprints(index)
        self.plan = _plan(index, self._footprints, options)
        self.done: dict[str, Shard] = {}
        self.finished = False
        self._workspace = cache_folder() / "packing" / hashlib.sha256(self.uri.encode()).hexdigest()[:32]
        self._look()

    @property
    def missing(self) -> list[str]:
        """Names of the shards that are still to be written."""
        return [name for name in self.plan if name not in self.done]

    def expected(self, names: list[str]) -> int:
        """Bytes that some shards will have, nearly: the sizes in an index may be estimates."""
        return sum(int(self._footprints[self.plan[name]].sum()) for name in names)

    def document(self) -> dict[str, Any]:
        """What `pack.json` holds."""
        shards = [self.done[name] for name in self.plan if name in self.done]
        return {
            "version": VERSION, "source": {"uri": self.index.uri, "state": self._state},
            "options": asdict(self.options), "classes": list(self.index.classes),
            "images": sum(shard.images for shard in shards), "bytes": sum(shard.bytes for shard in shards),
            "left_out": sum(len(shard.left_out) for shard in shards), "shards": [asdict(shard) for shard in shards],
        }  # fmt: skip

    def make(self, tell: Tell, *, verify: bool = True) -> None:
        """Writes what is missing, compares all with its checksums if told so, and finishes the pack.

        Raises:
            DataError: an image changed or is gone.
            NotFinishedError: another process on this machine is making the same pack.
            SiteError: no space, no permission; or a shard reads back other than it was written.
            InfrastructureError: S3 does not answer.
        """
        with self._alone():
            if self.missing:
                self._check_space()
                self._unfinish()
                self._write(tell)
            if verify:
                self._verify(tell)
            if not self.finished:
                self._save(FINISHED)
                self.finished = True
            self.store.delete(UNFINISHED)
            if isinstance(self.store, LocalStore):
                for left in self.store.root.glob(".tmp-*"):  # by a process that was killed
                    left.unlink()
        shutil.rmtree(self._workspace, ignore_errors=True)

    # -- what is there already

    @cached_property
    def _state(self) -> str:
        """Changes whenever an image, a label, a split or a weight does."""
        weights = self.index.table["weight"].fill_null(0.0).to_numpy()
        digest = hashlib.blake2b(json.dumps(self.index.classes).encode(), digest_size=16)
        for part in (self.index.ids, self.index.targets, weights, *map(self.index.rows, SPLITS)):
            digest.update(f"\0{len(part)}\0".encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        return digest.hexdigest()

    def _look(self) -> None:
        found = {entry.key: entry for entry in self.store.list()}
        state = next((name for name in (FINISHED, UNFINISHED) if name in found), None)
        shards = [] if state is None else self._known(state)
        ours = set() if state is None else {*self.plan, FINISHED, UNFINISHED}
        if strangers := sorted(found.keys() - ours):
            raise UserError(f"something else is there already: {few(strangers)}", where=self.uri,
                            hint="give a folder or prefix that is empty or does not exist")  # fmt: skip
        for shard in shards:
            if shard.name in found and self._still(found[shard.name], shard):
                self.done[shard.name] = replace(shard, etag=found[shard.name].etag)
        self.finished = state == FINISHED and not self.missing

    def _known(self, name: str) -> list[Shard]:
        """The shards that a record names, if it is one of this pack."""
        hint = "choose another place, or empty this one"
        try:
            known = json.loads(self.store.read(name))
            if known["version"] != VERSION:
                raise ValueError(known["version"])
            source, options = known["source"], Options(**known["options"])
            shards = [Shard(**shard) for shard in known["shards"]]
            place, state = source["uri"], source["state"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError("this is not the record of a pack that this version can go on with",
                            where=f"{self.uri}/{name}", hint=hint) from error  # fmt: skip
        if place != self.index.uri:
            raise UserError(f"there is a pack of {place} already", where=self.uri, hint=hint)
        if state != self._state:
            raise UserError("there is a pack already, and its images, labels or splits have changed since at"
                            f" {place}", where=self.uri, hint=hint)  # fmt: skip
        other = [f"{key} {value}" for key, value in asdict(options).items() if value != asdict(self.options)[key]]
        if other:
            raise UserError(
                f"there is a pack with other options already: {', '.join(other)}", where=self.uri, hint=hint
            )
        return shards

    def _still(self, entry: Entry, shard: Shard) -> bool:
        """Whether a shard is what its record says. A copied pack has other tags and the same contents."""
        if entry.size != shard.size:
            return False
        return entry.etag == shard.etag or self._sums({shard.name: shard}, lambda *_: None)[shard.name] == shard.sha256

    # -- writing

    def _unfinish(self) -> None:
        self._save(UNFINISHED)
        self.finished = False
        self.store.delete(FINISHED)

    def _save(self, name: str) -> None:
        self.store.write(name, json.dumps(self.document(), indent=1).encode())

    def _write(self, tell: Tell) -> None:
        names = self.missing
        # Objects of their own are read once here, and need no place in the node's cache.
        source = Source(self.index, budget=0 if chunks_of(self.index) is None else None)
        rows = (int(row) for name in names for row in self.plan[name])
        with ExitStack() as stack:
            stack.callback(source.close)
            images = stack.enter_context(closing(read_each(source, rows, self._judged)))
            # One shard is delivered while the next one is read.
            courier = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="courier"))
            last: Future[None] | None = None
            for name in names:
                path, shard = self._shard(name, images, tell)
                if last is not None:
                    last.result()
                last = courier.submit(self._deliver, path, shard, tell)
            if last is not None:
                last.result()

    def _judged(self, data: Data) -> tuple[Data, str]:
        """An image, and why it is to be left out."""
        why = why_unreadable(data) if self.options.check else ""
        return (b"" if why else data), why

    def _shard(self, name: str, images: Images, tell: Tell) -> tuple[Path, Shard]:
        """The next shard as a file of this machine, yet without a tag."""
        local = isinstance(self.store, LocalStore)
        left_out = []
        labels, weights = self.index.table["label"], self.index.table["weight"]
        with ShardWriter(Path(self.uri, f".tmp-{name}") if local else self._workspace / name) as out:
            for row, (data, why) in (next(images) for _ in self.plan[name]):
                if why:
                    left_out.append({"key": self.index.key(row), "why": why})
                else:
                    out.add(row, self.index.key(row), labels[row].as_py(), weights[row].as_py(), data)
                tell("packing", HEADERS + len(data), "")
        return out.path, Shard(name, out.images, out.bytes, out.size, out.sha256, "", left_out)

    def _deliver(self, path: Path, shard: Shard, tell: Tell) -> None:
        """Puts a shard in its place, and notes that it is there."""
        if isinstance(self.store, LocalStore):
            with disk(path):
                os.replace(path, self.store.path(shard.name))
        else:
            self.store.upload(shard.name, path)
            path.unlink()
        (etag,) = (entry.etag for entry in self.store.list(shard.name) if entry.key == shard.name)
        self.done[shard.name] = replace(shard, etag=etag)
        self._save(UNFINISHED)
        tell("packing", 0, shard.name)

    # -- verifying

    def _verify(self, tell: Tell) -> None:
        wrong = [name for name, total in self._sums(self.done, tell).items() if total != self.done[name].sha256]
        if not wrong:
            return
        for name in wrong:
            del self.done[name]
        self._unfinish()
        raise SiteError(f"{len(wrong)} shards read back other than they were written: {few(wrong)}", where=self.uri,
                        hint="check the disk or the S3 server; the same command writes them anew")  # fmt: skip

    def _sums(self, shards: dict[str, Shard], tell: Tell) -> dict[str, str]:
        """The SHA-256 of each shard as it reads back."""
        sums = {name: hashlib.sha256() for name in shards}
        spans = ((name, start) for name, shard in shards.items() for start in range(0, shard.size, SPAN))
        with closing(in_order(spans, lambda _: SPAN, self._span)) as read:
            for (name, start), data in read:
                sums[name].update(data)
                tell("verifying", len(data), name if start + SPAN >= shards[name].size else "")
        return {name: total.hexdigest() for name, total in sums.items()}

    def _span(self, span: tuple[str, int]) -> bytes:
        try:
            return self.store.read(span[0], span=(span[1], span[1] + SPAN))
        except FileNotFoundError:  # its checksum will be wrong
            return b""

    # -- this machine

    def _check_space(self) -> None:
        """Raises `SiteError` if the disk cannot hold what is to be written to it."""
        local = isinstance(self.store, LocalStore)
        folder = Path(self.uri) if local else self._workspace
        # Two shards at most wait for their upload.
        need = self.expected(self.missing) if local else 2 * max(self.expected([name]) for name in self.missing)
        folder = standing(folder)
        free = shutil.disk_usage(folder).free
        if need > free:
            hint = "free some, or " + ("choose another place" if local else "set XDG_CACHE_HOME to a folder with space")
            raise SiteError(f"it takes {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free", where=str(folder),
                            hint=hint)  # fmt: skip

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one process of this machine make the pack; the kernel frees it when that process dies."""
        lock = self._workspace / "lock"
        with disk(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115 - closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotFinishedError("another launch data pack is writing there", where=self.uri,
                                       hint="wait for its end") from None  # fmt: skip
            yield


def _plan(index: Index, footprints: Rows, options: Options) -> dict[str, Rows]:
    """The rows of each shard by its name; the shards of a split are about equally large."""
    plan: dict[str, Rows] = {}
    # What lies in large objects is read from one end to the other, and mixed as far as a window reaches.
    chunks = chunks_of(index)
    most = options.shard_mb << 20
    for number, split in enumerate(SPLITS):
        rows = index.rows(split)
        if not len(rows):
            continue
        rows = rows[epoch_draws(options.seed, number, len(rows), chunks=None if chunks is None else chunks[rows])]
        ends = np.cumsum(footprints[rows])
        each = -(-int(ends[-1]) // -(-int(ends[-1]) // most))
        shard = np.unique((ends - footprints[rows]) // each, return_inverse=True)[1]
        parts = np.split(rows, np.flatnonzero(np.diff(shard)) + 1)
        plan |= {f"{split}-{place:06d}.tar": part for place, part in enumerate(parts)}
    return plan


def _footprints(index: Index) -> Rows:
    """Bytes that each row takes in a shard, int64 [n]; as exact as the sizes in the index."""
    sizes = index.table["size"].to_numpy()
    return np.asarray(-(-sizes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + HEADERS, np.int64)
