"""What is there: the labelled images of class folders or of a manifest, as they were laid out.

It knows layouts, file names and manifest columns, and it reads no image. Which classes are used, and what is
held out for validation, is the index's business.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import DataError, UserError, nearest
from launcher.s3 import S3Store
from launcher.storage import Entry, LocalStore, Store, file_tag, open_store

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"})
MANIFEST_SUFFIXES = frozenset({"csv", "jsonl", "parquet"})
VAL_NAMES = frozenset({"val", "valid", "validation"})
SPLIT_NAMES = VAL_NAMES | {"train", "training", "test", "testing"}


class Sample(NamedTuple):
    """One labelled image. `split` is train, val or test, or empty where the data does not say."""

    key: str
    size: int
    etag: str
    label: str
    split: str


@dataclass(frozen=True)
class Listing:
    """All images below `uri`; `ignored` counts other files, `empty` names class folders without an image."""

    uri: str
    samples: list[Sample]
    ignored: int
    empty: list[str]


def list_images(uri: str, val_split: str | None) -> Listing:
    """The labelled images at a folder, an s3:// prefix or a manifest file.

    Raises:
        DataError: nothing is there, or not in a layout that gives each image a class.
        UserError: `val_split` names no split of the data.
    """
    store = open_store(uri)
    local = isinstance(store, LocalStore)
    if _suffix(uri) in MANIFEST_SUFFIXES and not (local and os.path.isdir(store.uri)):
        return _list_manifest(store.uri, val_split)
    if local and not os.path.isdir(store.uri):
        if os.path.exists(store.uri):
            raise DataError("this is a file, not a folder or a manifest", where=store.uri,
                            hint="give a folder of class folders, or a .csv, .jsonl or .parquet manifest")  # fmt: skip
        raise _missing("there is no such folder", store.uri)
    return _list_folders(store, val_split)


def locate(uri: str, key: str) -> tuple[str, str]:
    """The root of a store, and the key in it, of an index's key: relative to `uri`, or standing alone."""
    if key.startswith("s3://"):
        bucket, _, rest = key.removeprefix("s3://").partition("/")
        return f"s3://{bucket}", rest
    if key.startswith("/"):
        return "/", key[1:]
    return uri, key


def few(names: Iterable[object], most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = [str(name) for name in names]
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def _suffix(key: str) -> str:
    return posixpath.splitext(key)[1][1:].lower()


# -- class folders


def _list_folders(store: Store, val_split: str | None) -> Listing:
    images: list[Entry] = []
    others: list[str] = []
    for entry in store.list():
        if entry.key.endswith("/") or entry.key.startswith(".") or "/." in entry.key:
            continue
        if _suffix(entry.key) in IMAGE_SUFFIXES:
            images.append(entry)
        else:
            others.append(entry.key)
    if not images:
        raise _no_images(store, others)

    roles = _folder_roles(images, val_split, store.uri)
    depth = 2 if roles else 1
    # A key that looks like an address would be read from there, and not from below this root.
    loose = [entry.key for entry in images if entry.key.count("/") < depth or entry.key.startswith(("/", "s3://"))]
    if loose:
        raise DataError(
            f"{len(loose)} images lie in no class folder: {few(loose)}", where=store.uri,
            hint="move each into a folder named after its class, or give a manifest with columns path,label",
        )  # fmt: skip

    samples = []
    for entry in images:
        folders = entry.key.split("/", depth)
        split = roles.get(folders[0]) if roles else ""
        if split is not None:
            samples.append(Sample(entry.key, entry.size, entry.etag, folders[depth - 1], split))
    filled = {"/".join(entry.key.split("/", depth)[:depth]) for entry in images}
    splits = {entry.key.split("/", 1)[0] for entry in images} & roles.keys()
    found = [f"{split}/{name}" for split in sorted(splits) for name in store.child(split).folders()]
    empty = [name for name in found if name not in filled] if roles else sorted(set(store.folders()) - filled)
    return Listing(
        store.uri, samples, len(others), [name for name in empty if not name.rpartition("/")[2].startswith(".")]
    )


def _folder_roles(images: list[Entry], val_split: str | None, where: str) -> dict[str, str]:
    """Which top folder is which split; empty if the top folders are the classes."""
    tops = {entry.key.split("/", 1)[0] for entry in images if "/" in entry.key}
    nested = {entry.key.split("/", 1)[0] for entry in images if entry.key.count("/") > 1}
    if "train" not in nested:
        # A class may be named `test`; but folders of folders named so are splits that lack their training part.
        splits = sorted(name for name in nested if name.lower() in SPLIT_NAMES)
        if splits:
            raise DataError(
                f"there is {few(splits)}, but no train", where=where,
                hint="name the folder to train on `train`, or give a manifest with columns path,label,split",
            )  # fmt: skip
        if val_split:
            raise UserError(
                f"there is no split {val_split}: the folders are classes ({few(sorted(tops))})", where="data.val_split",
                hint="leave it out to hold out data.val_fraction of each class",
            )  # fmt: skip
        return {}
    strangers = sorted(tops - VAL_NAMES - {"train", "test"})
    if strangers and not val_split:
        raise DataError(f"beside train there is {few(strangers)}, which is no split", where=where,
                        hint=f"move it away, or validate on it: --set data.val_split={strangers[0]}")  # fmt: skip
    return _roles(tops, val_split, where)


def _roles(found: set[str], val_split: str | None, where: str) -> dict[str, str]:
    if val_split and val_split not in found:
        known = few(sorted(found - {""})) or "not given"
        raise UserError(f"there is no split {val_split}", where="data.val_split",
                        hint=nearest(val_split, found) or f"the splits are {known}")  # fmt: skip
    chosen = [val_split] if val_split else sorted(found & VAL_NAMES)
    if len(chosen) > 1:
        raise DataError(f"there are several validation splits: {few(chosen)}", where=where,
                        hint=f"choose one: --set data.val_split={chosen[0]}")  # fmt: skip
    return {"test": "test", "train": "train", **dict.fromkeys(chosen, "val")}


def _no_images(store: Store, others: list[str]) -> DataError:
    if not others:
        return _missing("there is nothing here", store.uri)
    kinds = sorted({f".{_suffix(name)}" for name in others if _suffix(name)})
    packed = any(kind in (".zip", ".tar", ".gz", ".tgz", ".7z") for kind in kinds)
    return DataError(
        f"there are {len(others)} files, but no images" + (f" ({few(kinds)})" if kinds else ""), where=store.uri,
        hint="unpack the archives first" if packed else f"images end with .{', .'.join(sorted(IMAGE_SUFFIXES))}",
    )  # fmt: skip


def _missing(what: str, uri: str) -> DataError:
    """Nothing is at `uri`; the hint says what is beside it."""
    parent, _, name = uri.rpartition("/")
    if uri.startswith("s3://"):
        beside = open_store(parent).folders() if parent != "s3:/" else []
    else:
        beside = sorted(os.listdir(parent)) if parent and os.path.isdir(parent) else []
    hint = nearest(name, beside) or (f"{parent}/ holds {few(beside)}" if beside else "check the address")
    return DataError(what, where=uri, hint=hint)


# -- manifests


def _list_manifest(uri: str, val_split: str | None) -> Listing:
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or "/")
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise _missing("there is no such manifest", uri) from None
    rows = list(_manifest_rows(uri, data))
    _check_rows(uri, rows)

    named = {_text(row.get("split")).lower() for _, row in rows}
    roles = {"": ""} if named == {""} and not val_split else _roles(named, val_split and val_split.lower(), uri)
    unknown = [number for number, row in rows if _text(row.get("split")).lower() not in roles.keys() | VAL_NAMES]
    if unknown:
        raise DataError(f"the split of rows {few(unknown)} is none of {', '.join(sorted(roles))}", where=uri,
                        hint="write train, val or test in the column split")  # fmt: skip

    keys = [_normal(store.uri, _text(row["path"])) for _, row in rows]
    first: dict[str, int] = {}
    twice = [f"{key} (row {number})" for (number, _), key in zip(rows, keys, strict=True)
             if first.setdefault(key, number) != number]  # fmt: skip
    if twice:
        raise DataError(f"{len(twice)} images are named more than once: {few(twice)}", where=uri,
                        hint="leave one row for each image")  # fmt: skip
    entries = _entries(store.uri, keys)
    gone = [f"{key} (row {number})" for (number, _), key in zip(rows, keys, strict=True) if key not in entries]
    if gone:
        raise DataError(f"{len(gone)} files of the manifest do not exist: {few(gone)}", where=uri,
                        hint=f"paths are relative to {store.uri}")  # fmt: skip

    samples = []
    for (_, row), key in zip(rows, keys, strict=True):
        split = roles.get(_text(row.get("split")).lower())
        if split is not None:
            samples.append(Sample(key, entries[key].size, entries[key].etag, _text(row["label"]), split))
    return Listing(store.uri, samples, 0, [])


def _manifest_rows(uri: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number: the line of a text file, counted from 1, or the row of a Parquet file."""
    kind = _suffix(uri)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            yield from enumerate(pq.read_table(io.BytesIO(data)).to_pylist(), 1)
            return
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        if kind == "csv":
            reader = csv.DictReader(text)
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(text, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is not an object")
                yield number, row
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"the manifest cannot be read: {error}", where=uri,
                        hint=f"write it anew as {kind}, in UTF-8") from error  # fmt: skip


def _check_rows(uri: str, rows: list[tuple[int, dict[str, Any]]]) -> None:
    if not rows:
        raise DataError("the manifest has no rows", where=uri, hint="write one row for each image: path,label")
    columns = [str(column) for column in rows[0][1]]
    lacking = [column for column in ("path", "label") if not any(column in row for _, row in rows)]
    if lacking:
        raise DataError(f"the manifest has no column {few(lacking)}", where=uri,
                        hint=nearest(lacking[0], columns) or f"its columns are {few(columns)}")  # fmt: skip
    partial = [number for number, row in rows if not (_text(row.get("path")) and _text(row.get("label")))]
    if partial:
        raise DataError(f"rows {few(partial)} lack a path or a label", where=uri, hint="fill in or delete them")


def _text(value: object) -> str:
    """A cell as text; missing values of CSV, JSON and Parquet are all empty."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _normal(root: str, path: str) -> str:
    """One spelling for each file: relative to `root` if it lies below, else an absolute path or an s3:// address."""
    bucket, is_s3 = root.removeprefix("s3://"), root.startswith("s3://")
    if path.startswith("s3://"):
        full = path
    elif is_s3 and not path.startswith("/"):
        full = f"s3://{posixpath.normpath(f'{bucket}/{path}')}"
    else:
        full = posixpath.normpath(posixpath.join("/" if is_s3 else root, path))
    return full.removeprefix(f"{root.rstrip('/')}/")


def _entries(root: str, keys: list[str]) -> dict[str, Entry]:
    """What is known of each key that exists."""
    found: dict[str, Entry] = {}
    remote: dict[str, dict[str, str]] = {}
    for key in keys:
        base, inner = locate(root, key)
        if base.startswith("s3://"):
            remote.setdefault(base, {})[inner] = key
        else:
            path = Path(base, inner)
            if path.is_file():
                stat = path.stat()
                found[key] = Entry(key, stat.st_size, file_tag(stat))
    for base, wanted in remote.items():
        for folder in _outermost(wanted):
            for entry in S3Store(base).list(folder):
                if entry.key in wanted:
                    found[wanted[entry.key]] = entry
    return found


def _outermost(keys: Iterable[str]) -> list[str]:
    """The folders that the keys lie in, without those below another: to list as little as possible."""
    folders: list[str] = []
    for folder in sorted({key.rpartition("/")[0] + "/" if "/" in key else "" for key in keys}):
        if not folders or not folder.startswith(folders[-1]):
            folders.append(folder)
    return folders
