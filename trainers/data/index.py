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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError, UserError, nearest
from launcher.runs import Run
from launcher.spec import Data
from launcher.storage import Store
from trainers.data.listing import Listing, Sample, few, list_images
from trainers.data.order import val_count

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Index:
    """The samples of a run.

    Attributes:
        uri: root that relative keys hang from: a folder, an s3:// prefix or sample://NAME. Keys that are
            absolute paths or s3:// addresses stand alone.
        classes: names of the classes, sorted; the position is the class id.
        table: one row per image, columns key, size (bytes), etag (empty: not to be checked), label, split.
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

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Row numbers of a split, ascending, int64."""
        import pyarrow.compute as pc

        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy()).astype(np.int64)

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
        pq.write_table(self.table.replace_schema_metadata(about), out, compression="zstd")
        store.write(key, out.getvalue())

    @classmethod
    def load(cls, store: Store, key: str = "index.parquet") -> Index:
        """The index that `save` wrote; `FileNotFoundError` if there is none."""
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(store.read(key)))
        about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
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
    listing = _listing(data)
    samples, empty = _chosen(listing, data.classes)
    if empty:
        raise DataError(f"{len(empty)} class folders hold no image: {few(empty)}", where=data.uri,
                        hint="fill or delete them, or choose others with data.classes")  # fmt: skip
    if not any(sample.split == "val" for sample in samples):
        samples = _held_out(samples, data)
    trained = {sample.label for sample in samples if sample.split == "train"}
    strays = sorted({f"{sample.split}/{sample.label}" for sample in samples if sample.label not in trained})
    if strays:
        raise DataError(
            f"{len(strays)} classes have no training image: {few(strays)}", where=data.uri,
            hint="add training images or remove them, or choose others with data.classes",
        )  # fmt: skip
    classes = tuple(sorted(trained))
    if len(classes) < 2:
        raise DataError(f"there is only one class: {classes[0]}", where=data.uri,
                        hint="a classifier needs two or more class folders or labels")  # fmt: skip
    return Index(listing.uri, classes, _table(samples), listing.ignored)


def _listing(data: Data) -> Listing:
    if not data.uri.startswith("sample://"):
        return list_images(data.uri, data.val_split)
    from trainers.data.sample import materialise

    found = list_images(str(materialise(data.uri.removeprefix("sample://"))), data.val_split)
    # Each machine makes its own copy, so neither the folder nor the time of writing may be held against it.
    return Listing(data.uri, [sample._replace(etag="") for sample in found.samples], found.ignored, found.empty)


def _chosen(listing: Listing, classes: tuple[str, ...] | None) -> tuple[list[Sample], list[str]]:
    """The samples and the empty folders of the classes that were asked for."""
    if classes is None:
        return listing.samples, listing.empty
    known = {sample.label for sample in listing.samples} | {folder.rpartition("/")[2] for folder in listing.empty}
    unknown = [name for name in classes if name not in known]
    if unknown:
        hints = [hint for name in unknown if (hint := nearest(name, known))]
        raise UserError(f"there is no class {few(unknown)}", where="data.classes",
                        hint=" ".join(hints) or f"the classes are {few(sorted(known))}")  # fmt: skip
    wanted = set(classes)
    return (
        [sample for sample in listing.samples if sample.label in wanted],
        [folder for folder in listing.empty if folder.rpartition("/")[2] in wanted],
    )


def _held_out(samples: list[Sample], data: Data) -> list[Sample]:
    """The samples with part of the training images as validation split."""
    held_back = [sample for sample in samples if sample.split == "test"]
    by_class: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.split != "test":
            by_class.setdefault(sample.label, []).append(sample)
    if not by_class:
        raise DataError("there is no training image", where=data.uri, hint="add a split named train")
    single = sorted(label for label, members in by_class.items() if len(members) == 1)
    if single:
        raise DataError(
            f"{len(single)} classes have a single image, which cannot be in training and validation: {few(single)}",
            where=data.uri, hint="add images, or choose other classes with data.classes",
        )  # fmt: skip
    for members in by_class.values():
        members.sort(key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
        count = val_count(len(members), data.val_fraction)
        held_back += [sample._replace(split="val") for sample in members[:count]]
        held_back += [sample._replace(split="train") for sample in members[count:]]
    return held_back


def _table(samples: list[Sample]) -> pa.Table:
    import pyarrow as pa

    keys, sizes, etags, labels, splits = zip(*sorted(samples), strict=True)
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "size": pa.array(sizes, pa.int64()),
            "etag": pa.array(etags, pa.string()),
            "label": pa.array(labels, pa.string()),
            "split": pa.array(splits, pa.string()),
        }
    )
