"""Parquet files that hold images, as Hugging Face's `datasets` writes them: listed without reading an image, and read
by row groups, which are their smallest parts that can be had.

An image is a column of bytes, or of structs with `bytes`; its class is a whole number, or text. The names of numbered
classes are those that the file's own schema gives. What reads the bytes of a row group is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError
from launcher.storage import Entry, Store, open_store
from trainers.data.listing import Listing, complete, few, file_splits
from trainers.data.ranged import Ranged, Seekable
from trainers.data.scans import once

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

GROUP_BITS = 32
"""In the index, the `offset` of an image is `group << GROUP_BITS | row`, both counted from 0: its row group, and its
row in that."""
THREADS = 32
IMAGES = ("image", "img")
LABELS = ("label", "labels", "class", "cls")
"""Names of columns of which the first that is there counts, if the schema does not say what it is, or says several."""
_VERSION = 1

Offset = TypeVar("Offset", int, npt.NDArray[np.int64])


def list_parquet(store: Store, files: list[Entry], ignored: int, val_split: str | None) -> Listing:
    """The images in some Parquet files of a store, with `ignored` other files beside them.

    Images of the test split without a label are left out.

    Raises:
        DataError: a file is damaged, has no column of images or labels, or rows lack either.
        UserError: `val_split` names no split of the data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    split_of = file_splits([file.key for file in files], val_split, store.uri)
    used = [file for file in files if split_of[file.key] is not None]
    with ThreadPoolExecutor(min(THREADS, len(used)), thread_name_prefix="parquet") as pool:
        scans = list(pool.map(partial(once, "parquet", _VERSION, store, look=_look), used))
    named = [scan.schema.metadata[b"named"] for scan in scans if len(scan)]
    if len({*named}) > 1:
        raise DataError("some of the files name their classes, and others number them", where=store.uri,
                        hint="write them anew by one version of the program that made them")  # fmt: skip
    parts: list[pa.Table] = []
    for file, scan in zip(used, scans, strict=True):
        bare = scan["label"].null_count
        if bare:
            if split_of[file.key] != "test":
                rows = np.flatnonzero(pc.is_null(scan["label"]).to_numpy())
                raise DataError(f"{bare} rows have no label: {few(rows)}", where=f"{store.uri}/{file.key}",
                                hint="rows count from 0; label or remove them")  # fmt: skip
            scan = scan.filter(pc.is_valid(scan["label"]))
            ignored += bare
        columns = {name: scan[name] for name in ("offset", "size", "label")}
        number = pc.utf8_lpad(scan["row"].cast(pa.string()), 9, "0")
        same = {"object": file.key, "etag": file.etag, "split": split_of[file.key] or ""}
        parts.append(complete(pa.table({
            "key": pc.binary_join_element_wise(pa.scalar(file.key), number, "/"), **columns,
            **{name: pa.repeat(value, len(scan)) for name, value in same.items()},
        })))  # fmt: skip
    table = pa.concat_tables(parts)
    if not len(table):
        raise DataError(f"the {len(used)} Parquet files hold no labelled image", where=store.uri, hint="fill them")
    return Listing(store.uri, "Parquet files", table, ignored)


def holds_images(uri: str) -> bool:
    """Whether the Parquet file at `uri` holds images, and is no manifest with their paths."""
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or "/")
    entry = _entry(store, name)
    if entry is None:
        return False
    with _damage(uri):
        schema = _open(store, entry).schema_arrow
    return "path" not in schema.names and bool(_image_columns(schema, _features(schema)))


class Groups:
    """The row groups of a Parquet file with images. Thread safe. Its footer is read when it is made.

    Args:
        store: where it is.
        key: of the file.
        etag: of the file, as the index has it; empty: not to be checked.

    Raises:
        DataError: it changed, is gone, damaged, or without a column of images.
    """

    def __init__(self, store: Store, key: str, etag: str) -> None:
        self._where = f"{store.uri}/{key}"
        entry = _entry(store, key)
        if entry is None:
            raise DataError("the Parquet file is gone", where=self._where, hint="restore it, or launch a new run")
        self._size = entry.size
        with _damage(self._where):
            file = _open(store, Entry(key, entry.size, etag or entry.etag))
        self._footer = file.metadata
        self._column = _columns(file.schema_arrow, self._where).image

    def span(self, group: int) -> tuple[int, int]:
        """Where the images of a row group are in the file: its first byte, and that after the last."""
        about = _leaf(self._footer, group, self._column)
        first = about.data_page_offset
        if about.has_dictionary_page and about.dictionary_page_offset:
            first = min(first, about.dictionary_page_offset)
        return first, first + about.total_compressed_size

    def images(self, group: int, data: bytes | memoryview) -> list[bytes]:
        """The images of a row group, by their rows, from the bytes of its `span`; nothing for a row without one.

        Raises:
            DataError: they are damaged.
        """
        import pyarrow.parquet as pq

        with _damage(self._where):
            window = _Window(data, self.span(group)[0], self._size)
            file = pq.ParquetFile(window, metadata=self._footer)
            table = file.read_row_group(group, columns=[self._column], use_threads=False)
            return [image or b"" for image in table.flatten().column(0).to_pylist()]


def group_of(offset: Offset) -> tuple[Offset, Offset]:
    """The row group of an image, and its row in that, from its `offset` in the index; or of several images."""
    return offset >> GROUP_BITS, offset & ((1 << GROUP_BITS) - 1)


# -- one file


class _Window(Seekable):
    """A file of which only a part is there."""

    def __init__(self, data: bytes | memoryview, start: int, size: int) -> None:
        super().__init__(size)
        self._data = memoryview(data)
        self._start = start

    def read(self, size: int = -1) -> bytes:
        first = self._place - self._start
        if size < 0 or first < 0 or first + size > len(self._data):
            raise ValueError("the row group reaches out of its part of the file")
        self._place += size
        return bytes(self._data[first : first + size])


def _entry(store: Store, key: str) -> Entry | None:
    return next((entry for entry in store.list(key) if entry.key == key), None)


def _open(store: Store, entry: Entry) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(Ranged(store, entry))


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turns what pyarrow says of a file that it cannot read into `DataError`."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise DataError("the Parquet file is gone", where=where, hint="restore it, or launch a new run") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise DataError(f"the Parquet file cannot be read, it is damaged or none: {told}", where=where,
                        hint="write or copy it anew") from error  # fmt: skip


def _look(store: Store, entry: Entry) -> pa.Table:
    """Columns row, offset, size and label of the images in a file; whether it names its classes in the metadata."""
    import pyarrow as pa

    where = f"{store.uri}/{entry.key}"
    with _damage(where):
        file = _open(store, entry)
        schema, footer = file.schema_arrow, file.metadata
        columns = _columns(schema, where)
        labels = file.read(columns=[columns.label], use_threads=False).column(0)
    offsets, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    lacking = 0
    for group in range(footer.num_row_groups):
        about, count = _leaf(footer, group, columns.image), footer.row_group(group).num_rows
        lacking += about.statistics.null_count or 0 if about.statistics else 0
        offsets.append(np.arange(count) + (group << GROUP_BITS))
        sizes.append(np.full(count, about.total_uncompressed_size // max(count, 1)))
    if lacking:
        raise DataError(f"{lacking} rows have no image in the column {columns.image}", where=where,
                        hint="store the images, not their paths (datasets: embed_external_files=True)")  # fmt: skip
    table = pa.table({
        "row": pa.array(np.arange(footer.num_rows)), "offset": np.concatenate(offsets), "size": np.concatenate(sizes),
        "label": _labels(labels, columns, where),
    })  # fmt: skip
    return table.replace_schema_metadata({"named": str(columns.names is not None)})


def _leaf(footer: pq.FileMetaData, group: int, path: str) -> pq.ColumnChunkMetaData:
    """What the footer says of a column in a row group."""
    part = footer.row_group(group)
    return next(about for about in map(part.column, range(part.num_columns)) if about.path_in_schema == path)


class _Columns(NamedTuple):
    """Of a file: the path of the column with the images' bytes, the column of labels, and what these are called."""

    image: str
    label: str
    names: list[str] | None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of the columns, as {name: {"_type": ...}}; empty if it wrote nothing."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: about for name, about in said.items() if isinstance(about, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _columns(schema: pa.Schema, where: str) -> _Columns:
    features = _features(schema)
    image = _one(_image_columns(schema, features), IMAGES, "images", schema, where)
    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    label = _one(classes or [name for name in LABELS if name in schema.names], LABELS, "labels", schema, where)
    names = features.get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"the names of the classes in the column {label} are no list of texts", where=where,
                        hint="write the file anew, with the feature ClassLabel(names=[...])")  # fmt: skip
    return _Columns(image if _is_bytes(schema.field(image).type) else f"{image}.bytes", label, names)


def _image_columns(schema: pa.Schema, features: dict[str, Any]) -> list[str]:
    """The columns that can hold images: bytes, or structs with bytes, that are said to be images or named so."""
    import pyarrow.types as kinds

    found = []
    for field in schema:
        inner = field.type
        if kinds.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field("bytes").type
            likely = True
        else:
            likely = field.name in IMAGES
        said = features.get(field.name, {}).get("_type")
        if _is_bytes(inner) and (said == "Image" if said else likely):
            found.append(field.name)
    return found


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind))


def _one(found: list[str], usual: tuple[str, ...], what: str, schema: pa.Schema, where: str) -> str:
    """Of the columns that were found the only one, or that with a usual name."""
    if not found:
        raise DataError(f"there is no column of {what}: the columns are {few(schema.names)}", where=where,
                        hint=f"name it {usual[0]}")  # fmt: skip
    chosen = found if len(found) == 1 else [name for name in usual if name in found][:1]
    if not chosen:
        raise DataError(f"there are several columns of {what}: {few(found)}", where=where,
                        hint=f"name the one to use {usual[0]}, or remove the others")  # fmt: skip
    return chosen[0]


def _labels(labels: pa.ChunkedArray, columns: _Columns, where: str) -> pa.ChunkedArray:
    """The names of the classes; null where there is none, which numbers say by -1."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    if kinds.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if kinds.is_integer(labels.type):
        labels = pc.if_else(pc.equal(labels, -1), pa.scalar(None, labels.type), labels)
        if columns.names is None:
            return labels.cast(pa.string())
        wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, len(columns.names)))
        rows = np.flatnonzero(pc.fill_null(wrong, False).to_numpy())
        if len(rows):
            told = (f"{labels[int(row)].as_py()} (row {row})" for row in rows)
            raise DataError(f"the schema names {len(columns.names)} classes, and not these labels: {few(told)}",
                            where=where, hint="write the file anew, with the names of all classes")  # fmt: skip
        return pa.array(columns.names, pa.string()).take(labels)
    if kinds.is_string(labels.type) or kinds.is_large_string(labels.type) or kinds.is_string_view(labels.type):
        texts = pc.utf8_trim_whitespace(labels.cast(pa.string()))
        return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    raise DataError(f"the labels in the column {columns.label} are no text or whole numbers, but {labels.type}",
                    where=where, hint="write the name or the number of the class")  # fmt: skip
