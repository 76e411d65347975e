"""Class folders: each image lies in a folder named after its class, maybe below folders of splits.

It works on the names in a listing, as columns, and reads no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import DataError, UserError
from launcher.storage import Store
from trainers.data.listing import SPLIT_NAMES, VAL_NAMES, Listing, complete, few, roles

if TYPE_CHECKING:
    import pyarrow as pa


def list_folders(store: Store, images: pa.Table, ignored: int, val_split: str | None) -> Listing:
    """The images (columns key, size, etag) with the classes and splits that their folders say.

    Raises:
        DataError: an image lies in no class folder, or the splits are not whole.
        UserError: `val_split` names no split of the data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    outer: set[str] = set()
    nested: set[str] = set()
    for keys in images["key"].chunks:
        tops, depths = pc.list_element(pc.split_pattern(keys, "/", max_splits=1), 0), pc.count_substring(keys, "/")
        outer.update(tops.filter(pc.greater(depths, 0)).unique().to_pylist())
        nested.update(tops.filter(pc.greater(depths, 1)).unique().to_pylist())
    split_of = _split_folders(outer, nested, val_split, store.uri)
    _check_depth(images, 2 if split_of else 1, store.uri)

    filled: set[str] = set()
    known: list[pa.Table] = []
    # In pieces, for the names of a million files, cut into parts, are some hundred megabytes.
    for batch in images.to_batches():
        parts = pc.split_pattern(batch["key"], "/", max_splits=2)
        tops = pc.list_element(parts, 0)
        if split_of:
            labels = pc.list_element(parts, 1)
            filled.update(pc.binary_join_element_wise(tops, labels, "/").unique().to_pylist())
            splits = pa.array(split_of.values()).take(pc.index_in(tops, value_set=pa.array(split_of)))
        else:
            labels, splits = tops, pa.repeat("", len(batch))
            filled.update(labels.unique().to_pylist())
        table = complete(pa.table([*batch.columns, labels, splits], [*batch.schema.names, "label", "split"]))
        known.append(table.filter(pc.is_valid(splits)) if splits.null_count else table)
    return Listing(
        store.uri, "class folders", pa.concat_tables(known), ignored, _empty(store, outer & split_of.keys(), filled)
    )


def _check_depth(images: pa.Table, depth: int, where: str) -> None:
    """Raises `DataError` if an image lies in no class folder, which is `depth` folders below the root."""
    import pyarrow.compute as pc

    keys = images["key"]
    # A key that looks like an address would be read from there, and not from below this root.
    elsewhere = pc.or_(pc.starts_with(keys, "/"), pc.starts_with(keys, "s3://"))
    loose = keys.filter(pc.or_(pc.less(pc.count_substring(keys, "/"), depth), elsewhere)).to_pylist()
    if loose:
        raise DataError(
            f"{len(loose)} images lie in no class folder: {few(loose)}", where=where,
            hint="move each into a folder named after its class, or give a manifest with columns path,label",
        )  # fmt: skip


def _empty(store: Store, splits: set[str], filled: set[str]) -> tuple[str, ...]:
    """The class folders that hold no image."""
    if splits:
        found = [f"{split}/{name}" for split in sorted(splits) for name in store.child(split).folders()]
    else:
        found = sorted(store.folders())
    return tuple(name for name in found if name not in filled and not name.rpartition("/")[2].startswith("."))


def _split_folders(tops: set[str], nested: set[str], val_split: str | None, where: str) -> dict[str, str]:
    """Which top folder is which split; empty if the top folders are the classes."""
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
    return roles(tops, val_split, where)
