"""Where the images are, whatever the layout: looks once at what lies at an address, and calls the layout's reader.

It decides between layouts by the names of files alone.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import DataError
from launcher.spec import Data
from launcher.storage import Entry, LocalStore, Store, open_store
from trainers.data.folders import list_folders
from trainers.data.listing import IMAGE_SUFFIXES, Listing, Rows, few, hidden, missing, suffix
from trainers.data.manifests import MANIFEST_SUFFIXES, list_manifest
from trainers.data.parquet import holds_images, list_parquet
from trainers.data.shards import compressed, expand, list_shards

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = frozenset({"tar", "gz", "tgz"})
ARCHIVES = frozenset({"zip", "gz", "7z"})


def find_images(data: Data) -> Listing:
    """The labelled images at a folder, an s3:// prefix, a manifest, or of a built-in sample.

    Raises:
        DataError: nothing is there, or not in a layout that gives each image a class.
        UserError: `data.val_split` names no split of the data; there is no such sample.
    """
    if not data.uri.startswith("sample://"):
        return _list(data.uri, data.val_split)
    import pyarrow as pa

    from trainers.data.sample import materialise

    found = _list(str(materialise(data.uri.removeprefix("sample://"))), data.val_split)
    # Each machine makes its own copy, so neither the folder nor the time of writing may be held against it.
    place = found.table.column_names.index("etag")
    table = found.table.set_column(place, "etag", pa.array([""] * len(found.table), pa.string()))
    return Listing(data.uri, found.layout, table, found.ignored, found.empty)


def _list(uri: str, val_split: str | None) -> Listing:
    store = open_store(uri)
    local = isinstance(store, LocalStore)
    folder = local and os.path.isdir(store.uri)
    kind = suffix(uri)
    images = not folder and kind == "parquet" and ("{" in uri or holds_images(store.uri))
    if not folder and kind in MANIFEST_SUFFIXES and not images:
        return list_manifest(store.uri, val_split)
    if not folder and ("{" in uri or images or kind in SHARDS):
        return _list_named(store.uri, val_split)
    if local and not folder:
        if os.path.exists(store.uri):
            raise DataError("this is a file, not a folder or a manifest", where=store.uri,
                            hint="give a folder of class folders, or a .csv, .jsonl or .parquet manifest")  # fmt: skip
        raise missing("there is no such folder", store.uri)
    found = _Found.below(store)
    if len(found.images):
        return list_folders(store, found.images, found.others.total(), val_split)
    if found.shards:
        return _list_shards(store, found.shards, found.others.total(), val_split)
    if found.tables:
        return list_parquet(store, found.tables, found.others.total(), val_split)
    raise _no_images(store, found.others)


def _list_named(uri: str, val_split: str | None) -> Listing:
    """The tar shards or Parquet files that an address with braces names, or one."""
    root, _, pattern = uri.partition("{")
    root, _, start = root.rpartition("/")
    wanted = expand(start + uri[len(root) + 1 + len(start) :])
    store = open_store(root or "/")
    entries = {entry.key: entry for entry in store.list(start) if not hidden(entry.key)}
    gone = [key for key in wanted if key not in entries]
    if gone:
        what = f"{len(gone)} of {len(wanted)} shards are not there: {few(gone)}"
        raise DataError(what, where=uri, hint="check the numbers") if pattern else missing("there is no such file", uri)
    found = [entries[key] for key in dict.fromkeys(wanted)]
    if all(suffix(entry.key) == "parquet" for entry in found):
        return list_parquet(store, found, 0, val_split)
    return _list_shards(store, found, 0, val_split)


def _list_shards(store: Store, shards: list[Entry], ignored: int, val_split: str | None) -> Listing:
    packed = [shard.key for shard in shards if suffix(shard.key) != "tar"]
    if packed:
        raise compressed(store.uri, packed)
    return list_shards(store, shards, ignored, val_split)


@dataclass
class _Found:
    """What lies below a root.

    Attributes:
        images: columns key, size and etag.
        shards: files that are, or seem to be, tar shards.
        tables: Parquet files.
        others: the kinds of all other files, with their number.
    """

    images: pa.Table
    shards: list[Entry]
    tables: list[Entry]
    others: Counter[str]

    @classmethod
    def below(cls, store: Store) -> _Found:
        images = Rows("key", "size", "etag")
        shards: list[Entry] = []
        tables: list[Entry] = []
        others: Counter[str] = Counter()
        for entry in store.list():
            if hidden(entry.key):
                continue
            kind = suffix(entry.key)
            if kind in IMAGE_SUFFIXES:
                images.add(entry.key, entry.size, entry.etag)
            elif kind in SHARDS and (kind != "gz" or entry.key.endswith(".tar.gz")):
                shards.append(entry)
            elif kind == "parquet":
                tables.append(entry)
            else:
                others[kind] += 1
        if len(table := images.table()):
            others["tar"] += len(shards)
        if len(table) or shards:
            others["parquet"] += len(tables)
        return cls(table, shards, tables, others)


def _no_images(store: Store, others: Counter[str]) -> DataError:
    if not others:
        return missing("there is nothing here", store.uri)
    kinds = sorted(f".{kind}" for kind in others if kind)
    return DataError(
        f"there are {others.total()} files, but no images" + (f" ({few(kinds)})" if kinds else ""), where=store.uri,
        hint="unpack the archives first" if others.keys() & ARCHIVES
        else f"images end with .{', .'.join(sorted(IMAGE_SUFFIXES))}",
    )  # fmt: skip
