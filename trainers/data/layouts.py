"""Where the images are, whatever the layout: looks once at what lies at an address, and calls the layout's reader.

It decides between layouts by the names of files alone, but for Parquet, whose columns decide.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.errors import DataError
from launcher.spec import Data
from launcher.storage import LocalStore, Store, open_store
from trainers.data.folders import list_folders
from trainers.data.listing import IMAGE_SUFFIXES, Listing, Rows, few, hidden, missing, suffix
from trainers.data.manifests import MANIFEST_SUFFIXES, list_manifest

if TYPE_CHECKING:
    import pyarrow as pa

ARCHIVES = frozenset({"zip", "tar", "gz", "tgz", "7z"})


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
    if suffix(uri) in MANIFEST_SUFFIXES and not (local and os.path.isdir(store.uri)):
        return list_manifest(store.uri, val_split)
    if local and not os.path.isdir(store.uri):
        if os.path.exists(store.uri):
            raise DataError("this is a file, not a folder or a manifest", where=store.uri,
                            hint="give a folder of class folders, or a .csv, .jsonl or .parquet manifest")  # fmt: skip
        raise missing("there is no such folder", store.uri)
    found = _Found.below(store)
    if len(found.images):
        return list_folders(store, found.images, found.others.total(), val_split)
    raise _no_images(store, found.others)


@dataclass
class _Found:
    """What lies below a root: the images as columns key, size and etag, the kinds of other files with their number."""

    images: pa.Table
    others: Counter[str] = field(default_factory=Counter)

    @classmethod
    def below(cls, store: Store) -> _Found:
        images = Rows("key", "size", "etag")
        others: Counter[str] = Counter()
        for entry in store.list():
            if hidden(entry.key):
                continue
            kind = suffix(entry.key)
            if kind in IMAGE_SUFFIXES:
                images.add(entry.key, entry.size, entry.etag)
            else:
                others[kind] += 1
        return cls(images.table(), others)


def _no_images(store: Store, others: Counter[str]) -> DataError:
    if not others:
        return missing("there is nothing here", store.uri)
    kinds = sorted(f".{kind}" for kind in others if kind)
    return DataError(
        f"there are {others.total()} files, but no images" + (f" ({few(kinds)})" if kinds else ""), where=store.uri,
        hint="unpack the archives first" if others.keys() & ARCHIVES
        else f"images end with .{', .'.join(sorted(IMAGE_SUFFIXES))}",
    )  # fmt: skip
