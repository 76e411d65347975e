"""The index: every image of a run with its class and its split, found once and stored in the run directory.

There is one list of classes, from the training split, so a label can never shift. The held-out part depends on
the names of the files alone. The index never reads an image.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError, UserError, nearest
from launcher.runs import Run
from launcher.spec import Data
from launcher.storage import Store
from trainers.data.layouts import find_images
from trainers.data.listing import Listing, complete, few, locate
from trainers.data.order import val_count

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
ID_BYTES = 16
PIECE = 1 << 16
"""Rows that are Python objects at a time: of a million rows they would be a gigabyte."""


class Place(NamedTuple):
    """Where an image's bytes are: `size` bytes from `offset` on, in the object `key` of the store at `uri`.

    In a Parquet file, `offset` is `row group << 32 | row in it`, and `size` an estimate. An empty `etag` is not to be
    checked.
    """

    uri: str
    key: str
    etag: str
    offset: int
    size: int
    shared: bool = False
    """Whether the object holds other images too."""


@dataclass(frozen=True)
class Index:
    """The samples of a run.

    Attributes:
        uri: root that relative keys hang from: a folder, an s3:// prefix or sample://NAME. Keys that are
            absolute paths or s3:// addresses stand alone.
        classes: names of the classes, sorted; the position is the class id.
        table: one row per image, sorted by key, each column in one piece:
            key: what the image is called; without an `object` also where it lies.
            object: the object that holds it among others (a tar shard, a Parquet file), or null.
            offset: its first byte in the object, int64; in a Parquet file see `Place`.
            size: bytes of the image itself, int64; in a Parquet file an estimate.
            etag: tag of the object that holds it; empty: not to be checked.
            label: name of the class.
            split: train, val or test.
            weight: how often to draw it in training, 1 being usual, float64; null where the data does not say.
            id: the content's name in caches, 16 bytes: blake2b of "{address of the object}\\0{etag}\\0{offset}".
        ignored: number of files that are no images.
    """

    uri: str
    classes: tuple[str, ...]
    table: pa.Table
    ignored: int = 0

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Class id of each row, int64 [n]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        ids = pc.index_in(self.table["label"], value_set=pa.array(self.classes, pa.string()))
        return np.asarray(ids.to_numpy(), np.int64)

    @property
    def ids(self) -> npt.NDArray[np.uint8]:
        """The column `id`, uint8 [n, 16], not copied."""
        column = self.table["id"].combine_chunks()
        column = column.chunk(0) if hasattr(column, "chunk") else column
        words = np.frombuffer(column.buffers()[1], np.uint8, len(column) * ID_BYTES, column.offset * ID_BYTES)
        return words.reshape(-1, ID_BYTES)

    def place(self, row: int) -> Place:
        """Where the bytes of a row are."""
        key, holder, etag, offset, size = (column[row].as_py() for column in self._places)
        return Place(*locate(self.uri, key if holder is None else holder), etag, offset, size, holder is not None)

    @cached_property
    def _places(self) -> list[pa.Array]:
        return [self.table[name].combine_chunks() for name in ("key", "object", "etag", "offset", "size")]

    @cached_property
    def remote(self) -> npt.NDArray[np.bool_]:
        """Which rows lie on S3, bool [n]."""
        import pyarrow.compute as pc

        where = pc.coalesce(self.table["object"], self.table["key"])
        remote = pc.starts_with(where, "s3://")
        if self.uri.startswith("s3://"):
            remote = pc.or_(remote, pc.invert(pc.starts_with(where, "/")))
        return np.asarray(remote.to_numpy())

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Row numbers of a split, ascending, int64."""
        import pyarrow.compute as pc

        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy()).astype(np.int64)

    def weights(self, sampling: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """How often to draw each of these rows, in proportion, float64 [n]; None: each once an epoch.

        Args:
            sampling: `uniform`; `balanced`: each class as often as any other; `weighted`: as the data's own column
                says, 1 where it says nothing.

        Raises:
            UserError: `weighted`, and the data has no weights.
        """
        if sampling == "uniform":
            return None
        if sampling == "balanced":
            classes = self.targets[rows]
            balanced: npt.NDArray[np.float64] = 1 / np.bincount(classes)[classes]
            return balanced
        column = self.table["weight"].take(rows)
        if column.null_count == len(column):
            raise UserError("the data has no weights", where="data.sampling",
                            hint="add a column `weight` to the manifest, or set data.sampling=balanced")  # fmt: skip
        given: npt.NDArray[np.float64] = column.fill_null(1.0).to_numpy()
        return given

    def key(self, row: int) -> str:
        """The key of a row."""
        key: str = self.table["key"][row].as_py()
        return key

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class in each split, classes in order."""
        table = {split: np.bincount(self.targets[self.rows(split)], minlength=len(self.classes)) for split in SPLITS}
        return {
            label: {split: int(table[split][number]) for split in SPLITS} for number, label in enumerate(self.classes)
        }

    def facts(self) -> dict[str, Any]:
        """What the plan needs to know of the data, as JSON-able values; classes are compared by all their images."""
        import pyarrow.compute as pc

        sizes = {label: sum(by_split.values()) for label, by_split in self.counts().items()}
        smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        return {
            "images": self.table.num_rows,
            "bytes": pc.sum(self.table["size"]).as_py(),
            "classes": len(self.classes),
            **{split: len(self.rows(split)) for split in SPLITS},
            "ignored": self.ignored,
            "smallest_class": [smallest, sizes[smallest]],
            "largest_class": [largest, sizes[largest]],
        }

    def save(self, store: Store, key: str = "index.parquet") -> None:
        """Writes the index as one Parquet file."""
        import pyarrow.parquet as pq

        about = {"uri": self.uri, "classes": json.dumps(self.classes), "ignored": str(self.ignored)}
        out = io.BytesIO()
        pq.write_table(
            self.table.replace_schema_metadata(about), out, compression="zstd",
            use_dictionary=["object", "label", "split"],  # what hardly repeats is read faster without
        )  # fmt: skip
        store.write(key, out.getvalue())

    @classmethod
    def load(cls, store: Store, key: str = "index.parquet") -> Index:
        """The index that `save` wrote, by this version or an earlier one; `FileNotFoundError` if there is none."""
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(store.read(key)))
        about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
        if "id" not in table.column_names:
            table = with_ids(about["uri"], complete(table))
        return cls(
            about["uri"], tuple(json.loads(about["classes"])),
            table.replace_schema_metadata().combine_chunks(), int(about["ignored"]),
        )  # fmt: skip


def index_of(run: Run) -> Index:
    """The index that a run is trained with: its own, or for a trial that of its sweep."""
    try:
        return Index.load(run.store)
    except FileNotFoundError:
        if run.home is run:
            raise
        return index_of(run.home)


def build_index(data: Data) -> Index:
    """Finds the images, checks that they can be trained on, and splits them. No image is read.

    Where the data has no validation split, `val_fraction` of each class is held out, chosen by the hash of the
    key: the order of a listing does not matter, and a new image moves at most one other.

    Raises:
        DataError: the images, classes or splits are wrong; all problems of one kind are named at once.
        UserError: `data.classes` or `data.val_split` names what is not there.
    """
    listing = find_images(data)
    table, empty = _chosen(listing, data.classes)
    if empty:
        raise DataError(f"{len(empty)} class folders hold no image: {few(empty)}", where=data.uri,
                        hint="fill or delete them, or choose others with data.classes")  # fmt: skip
    table = _sorted(table)
    if "val" not in table["split"].unique().to_pylist():
        table = _held_out(table, data)
    pairs = table.group_by(["split", "label"]).aggregate([]).to_pylist()
    trained = {pair["label"] for pair in pairs if pair["split"] == "train"}
    strays = sorted(f"{pair['split']}/{pair['label']}" for pair in pairs if pair["label"] not in trained)
    if strays:
        raise DataError(
            f"{len(strays)} classes have no training image: {few(strays)}", where=data.uri,
            hint="add training images or remove them, or choose others with data.classes",
        )  # fmt: skip
    classes = tuple(sorted(trained))
    if len(classes) < 2:
        raise DataError(f"there is only one class: {classes[0]}", where=data.uri,
                        hint="a classifier needs two or more class folders or labels")  # fmt: skip
    return Index(listing.uri, classes, with_ids(listing.uri, table), listing.ignored)


def with_ids(uri: str, table: pa.Table) -> pa.Table:
    """The table of a listing with the column `id`, each column in one piece."""
    import pyarrow as pa

    parts = []
    for batch in table.select(["key", "object", "etag", "offset"]).to_batches(PIECE):
        words = bytearray()
        for key, holder, etag, offset in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            where = key if holder is None else holder
            address = where if where.startswith(("/", "s3://")) else f"{uri}/{where}"
            words += hashlib.blake2b(f"{address}\0{etag}\0{offset}".encode(), digest_size=ID_BYTES).digest()
        parts.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(batch), [None, pa.py_buffer(words)]))
    return table.append_column("id", pa.chunked_array(parts, pa.binary(ID_BYTES))).combine_chunks()


def _chosen(listing: Listing, classes: tuple[str, ...] | None) -> tuple[pa.Table, list[str]]:
    """The rows and the empty folders of the classes that were asked for."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if classes is None:
        return listing.table, list(listing.empty)
    labels = listing.table["label"]
    known = {*labels.unique().to_pylist(), *(folder.rpartition("/")[2] for folder in listing.empty)}
    unknown = [name for name in classes if name not in known]
    if unknown:
        hints = [hint for name in unknown if (hint := nearest(name, known))]
        raise UserError(f"there is no class {few(unknown)}", where="data.classes",
                        hint=" ".join(hints) or f"the classes are {few(sorted(known))}")  # fmt: skip
    wanted = set(classes)
    return (
        listing.table.filter(pc.is_in(labels, value_set=pa.array(sorted(wanted), pa.string()))),
        [folder for folder in listing.empty if folder.rpartition("/")[2] in wanted],
    )


def _sorted(table: pa.Table) -> pa.Table:
    """The rows in the order of their keys, as a listing of S3 already is."""
    import pyarrow.compute as pc

    keys = table["key"].combine_chunks()
    if pc.all(pc.less(keys[:-1], keys[1:])).as_py():
        return table
    return table.take(pc.sort_indices(keys))


def _held_out(table: pa.Table, data: Data) -> pa.Table:
    """The rows with part of the training images as validation split."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ours = np.flatnonzero(pc.not_equal(table["split"], "test").to_numpy())
    if not len(ours):
        raise DataError("there is no training image", where=data.uri, hint="add a split named train")
    labels = table["label"].take(ours).combine_chunks().dictionary_encode()
    classes = labels.indices.to_numpy()
    sizes = np.bincount(classes)
    single = sorted(labels.dictionary[int(number)].as_py() for number in np.flatnonzero(sizes == 1))
    if single:
        raise DataError(
            f"{len(single)} classes have a single image, which cannot be in training and validation: {few(single)}",
            where=data.uri, hint="add images, or choose other classes with data.classes",
        )  # fmt: skip
    held_back = np.array([val_count(int(size), data.val_fraction) for size in sizes])
    high, low = _hashes(table["key"])[ours].T
    order = np.lexsort((low, high, classes))
    first = np.cumsum(sizes) - sizes
    place = np.arange(len(ours)) - first[classes[order]]
    splits = np.full(len(table), SPLITS.index("test"))
    splits[ours[order]] = np.where(place < held_back[classes[order]], SPLITS.index("val"), SPLITS.index("train"))
    column = table.column_names.index("split")
    return table.set_column(column, "split", pa.array(SPLITS, pa.string()).take(pa.array(splits)))


def _hashes(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """The first half of each key's SHA-256, uint64 [n, 2]: in numerical order."""
    words = bytearray()
    for start in range(0, len(keys), PIECE):
        for key in keys[start : start + PIECE].to_pylist():
            words += hashlib.sha256(key.encode()).digest()[:16]
    return np.frombuffer(words, ">u8").astype(np.uint64).reshape(-1, 2)
