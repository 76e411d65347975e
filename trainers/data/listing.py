"""What a look at the data finds: one row of columns for each labelled image, and what the layouts have in common.

It knows how splits are named and how an image is addressed. How each layout is read is said in the modules of the
layouts; which classes are used, and what is held out for validation, is the index's business.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import DataError, UserError, nearest
from launcher.storage import open_store

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"})
VAL_NAMES = frozenset({"val", "valid", "validation"})
SPLIT_NAMES = VAL_NAMES | {"train", "training", "test", "testing"}

COLUMNS = {
    "key": "string",
    "object": "string",
    "offset": "int64",
    "size": "int64",
    "etag": "string",
    "label": "string",
    "split": "string",
    "weight": "float64",
}
"""Columns of a listing and their Arrow types; `Index` says what they mean."""


@dataclass(frozen=True)
class Listing:
    """All labelled images at `uri`.

    Attributes:
        uri: root that relative keys and objects hang from.
        layout: what the data is laid out as, in words.
        table: one row for each image, with COLUMNS; `split` is train, val, test, or empty if the data does not say.
        ignored: number of files or rows that are no labelled images.
        empty: class folders without an image.
    """

    uri: str
    layout: str
    table: pa.Table
    ignored: int = 0
    empty: tuple[str, ...] = ()


class Rows:
    """A table that grows by rows: a million tuples of Python objects would be a gigabyte, Arrow's columns are not."""

    CHUNK = 1 << 16

    def __init__(self, *names: str) -> None:
        import pyarrow as pa

        self._schema = pa.schema([(name, COLUMNS[name]) for name in names])
        self._pending: list[tuple[Any, ...]] = []
        self._chunks: list[pa.RecordBatch] = []

    def add(self, *row: Any) -> None:
        """Adds a row, with the values in the order of the names."""
        self._pending.append(row)
        if len(self._pending) == self.CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        """All rows so far."""
        import pyarrow as pa

        self._flush()
        return pa.Table.from_batches(self._chunks, self._schema)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            columns = zip(*self._pending, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            self._chunks.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._pending.clear()


def complete(table: pa.Table) -> pa.Table:
    """The table with exactly COLUMNS: what it lacks is null, and `offset` 0."""
    import pyarrow as pa

    columns = {}
    for name, kind in COLUMNS.items():
        if name in table.column_names:
            columns[name] = table[name].cast(kind)
        elif name == "offset":
            columns[name] = pa.repeat(pa.scalar(0, pa.int64()), len(table))
        else:
            columns[name] = pa.nulls(len(table), kind)
    return pa.table(columns)


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


def suffix(key: str) -> str:
    """The end of the name after its last dot, in lower case."""
    return posixpath.splitext(key)[1][1:].lower()


def hidden(key: str) -> bool:
    """Whether a file is a folder's own mark, or hidden by a dot."""
    return key.endswith("/") or key.startswith(".") or "/." in key


def roles(found: set[str], val_split: str | None, where: str) -> dict[str, str]:
    """Which of the splits of the data is train, val and test: a dict of their names.

    Raises:
        DataError: there are several validation splits.
        UserError: `val_split` names none of `found`.
    """
    if val_split and val_split not in found:
        known = few(sorted(found - {""})) or "not given"
        raise UserError(f"there is no split {val_split}", where="data.val_split",
                        hint=nearest(val_split, found) or f"the splits are {known}")  # fmt: skip
    chosen = [val_split] if val_split else sorted(found & VAL_NAMES)
    if len(chosen) > 1:
        raise DataError(f"there are several validation splits: {few(chosen)}", where=where,
                        hint=f"choose one: --set data.val_split={chosen[0]}")  # fmt: skip
    return {"test": "test", "train": "train", **dict.fromkeys(chosen, "val")}


def file_splits(keys: list[str], val_split: str | None, where: str) -> dict[str, str | None]:
    """The split of each file by its folders, or its name (`train-0001.tar`); None if it is not to be used.

    All are empty if no file says one.

    Raises:
        DataError: some files say none, there is no training split, or there are several to validate on.
        UserError: `val_split` is said by no file.
    """
    said = {key: _said(key, val_split) for key in keys}
    found = set(said.values())
    if found == {""} and not val_split:
        return dict.fromkeys(keys, "")
    silent = [key for key, name in said.items() if not name]
    split_of = roles(found, val_split, where)
    if silent:
        raise DataError(f"{len(silent)} files do not say their split: {few(silent)}", where=where,
                        hint="name them like train-0001, val-0001, test-0001, or use such folders")  # fmt: skip
    if "train" not in found:
        raise DataError(f"there is {few(sorted(found))}, but no train", where=where,
                        hint="name the files to train on like train-0001")  # fmt: skip
    return {key: split_of.get(name) for key, name in said.items()}


def _said(key: str, val_split: str | None) -> str:
    """The split that a file's folders or name say, or nothing."""
    *folders, name = key.split("/")
    for word in (*folders, *re.split(r"[-_.]", name)):
        if word == val_split:
            return word
        if word.lower() in SPLIT_NAMES:
            return {"training": "train", "testing": "test"}.get(word.lower(), word.lower())
    return ""


def missing(what: str, uri: str) -> DataError:
    """The error for nothing at `uri`; its hint says what is beside it."""
    parent, _, name = uri.rpartition("/")
    if uri.startswith("s3://"):
        beside = open_store(parent).folders() if parent != "s3:/" else []
    else:
        beside = sorted(os.listdir(parent)) if parent and os.path.isdir(parent) else []
    hint = nearest(name, beside) or (f"{parent}/ holds {few(beside)}" if beside else "check the address")
    return DataError(what, where=uri, hint=hint)
