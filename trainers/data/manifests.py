"""Manifests: a CSV, JSON lines or Parquet file that names each image's path and label, and maybe split and weight.

Everything that is wrong is told by row. No image is read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import DataError, nearest
from launcher.s3 import S3Store
from launcher.storage import Entry, Store, file_tag, open_store
from trainers.data.listing import VAL_NAMES, Listing, Rows, complete, few, locate, missing, roles, suffix

MANIFEST_SUFFIXES = frozenset({"csv", "jsonl", "parquet"})

Row = tuple[int, str, str, str, float | None]
"""A row's number, path, label, split and weight."""


def list_manifest(uri: str, val_split: str | None) -> Listing:
    """The images that the manifest at `uri` names.

    Raises:
        DataError: a row, a column or a file is wrong.
        UserError: `val_split` names no split of the data.
    """
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or "/")
    rows = _rows(uri, store, name)
    named = {split for _, _, _, split, _ in rows}
    split_of = {"": ""} if named == {""} and not val_split else roles(named, val_split and val_split.lower(), uri)
    unknown = [number for number, _, _, split, _ in rows if split not in split_of.keys() | VAL_NAMES]
    if unknown:
        raise DataError(f"the split of rows {few(unknown)} is none of {', '.join(sorted(split_of))}", where=uri,
                        hint="write train, val or test in the column split")  # fmt: skip

    first: dict[str, int] = {}
    keys = [_normal(store.uri, path) for _, path, _, _, _ in rows]
    twice = [f"{key} (row {number})" for (number, *_), key in zip(rows, keys, strict=True)
             if first.setdefault(key, number) != number]  # fmt: skip
    if twice:
        raise DataError(f"{len(twice)} images are named more than once: {few(twice)}", where=uri,
                        hint="leave one row for each image")  # fmt: skip
    entries = _entries(store.uri, keys)
    gone = [f"{key} (row {number})" for (number, *_), key in zip(rows, keys, strict=True) if key not in entries]
    if gone:
        raise DataError(f"{len(gone)} files of the manifest do not exist: {few(gone)}", where=uri,
                        hint=f"paths are relative to {store.uri}")  # fmt: skip

    found = Rows("key", "size", "etag", "label", "split", "weight")
    for (_, _, label, split, weight), key in zip(rows, keys, strict=True):
        if split in split_of:
            found.add(key, entries[key].size, entries[key].etag, label, split_of[split], weight)
    return Listing(store.uri, "manifest", complete(found.table()))


def _rows(uri: str, store: Store, name: str) -> list[Row]:
    """The rows of the manifest, each with a path and a label."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise missing("there is no such manifest", uri) from None
    rows: list[Row] = []
    columns: dict[str, None] = {}
    weights: list[str] = []
    for number, row in _parsed(uri, data):
        columns.update(dict.fromkeys(map(str, row)))
        weight = _weight(row.get("weight"))
        if weight is not None and not 0 < weight < math.inf:
            weights.append(f"{number} ({_text(row['weight'])})")
        rows.append((number, _text(row.get("path")), _text(row.get("label")), _text(row.get("split")).lower(), weight))
    if not rows:
        raise DataError("the manifest has no rows", where=uri, hint="write one row for each image: path,label")
    lacking = [column for column in ("path", "label") if column not in columns]
    if lacking:
        raise DataError(f"the manifest has no column {few(lacking)}", where=uri,
                        hint=nearest(lacking[0], columns) or f"its columns are {few(columns)}")  # fmt: skip
    partial = [number for number, path, label, _, _ in rows if not (path and label)]
    if partial:
        raise DataError(f"rows {few(partial)} lack a path or a label", where=uri, hint="fill in or delete them")
    if weights:
        raise DataError(f"the weight of rows {few(weights)} is no positive number", where=uri,
                        hint="write how often to draw the image, 1 being usual, or leave the cell empty")  # fmt: skip
    return rows


def _parsed(uri: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number: the line of a text file, counted from 1, or the row of a Parquet file."""
    kind = suffix(uri)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            number = 1
            for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches():
                yield from enumerate(batch.to_pylist(), number)
                number += len(batch)
            return
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="" if kind == "csv" else None)
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


def _text(value: object) -> str:
    """A cell as text; missing values of CSV, JSON and Parquet are all empty."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _weight(value: object) -> float | None:
    """A cell as a number; NaN if it is none, None if it is empty."""
    text = _text(value)
    try:
        return float(text) if text else None
    except ValueError:
        return math.nan


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
