"""Tar shards in the layout of WebDataset: files of one sample share their name up to its first dot.

Only headers and label files are read, and of the shards of a pack only their lists of contents. What a shard holds is
kept in the user's cache by address and ETag, so it is looked at once. Compressed archives are refused, for nothing can
be read from their middle.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.errors import DataError
from launcher.storage import Entry, Store
from trainers.data import contents
from trainers.data.listing import IMAGE_SUFFIXES, Listing, complete, few, file_splits, suffix
from trainers.data.ranged import Ranged
from trainers.data.scans import once

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 32
LABELS = ("cls", "json", "txt")
"""Endings of files that may hold the label; the first one that is there counts."""
LABEL_KEYS = ("label", "class", "cls")
WEIGHT_KEY = "sampling_weight"
"""In a JSON file: how often to draw the image, 1 being usual."""
MOST_LABEL_BYTES = 1 << 20
FINISHED, UNFINISHED = "pack.json", ".packing.json"
"""What lies beside the shards of a pack once all are there, and until then."""
_VERSION = 2
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")


def list_shards(store: Store, shards: list[Entry], ignored: int, val_split: str | None) -> Listing:
    """The samples in some tar files of a store, with `ignored` other files beside them.

    Raises:
        DataError: a shard is damaged, or a sample has no label, several images, or the name of another one.
        UserError: `val_split` names no split of the data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_there(store, UNFINISHED):
        raise DataError("this pack is not finished", where=store.uri,
                        hint="go on with it by the same launch data pack as before")  # fmt: skip
    look = _scan
    if _is_there(store, FINISHED):
        look, ignored = _listed, max(ignored - 1, 0)  # the record of a pack is no stranger in it
    split_of = file_splits([shard.key for shard in shards], val_split, store.uri)
    used = [shard for shard in shards if split_of[shard.key] is not None]
    with ThreadPoolExecutor(min(THREADS, len(used)), thread_name_prefix="shards") as pool:
        scans = list(pool.map(partial(once, "shards", _VERSION, store, look=look), used))
    names = _class_names(store)
    parts: list[pa.Table] = []
    samples: dict[str, list[tuple[str, pa.ChunkedArray]]] = {}
    for shard, scan in zip(used, scans, strict=True):
        split = split_of[shard.key] or ""
        samples.setdefault(split, []).append((shard.key, scan["sample"]))
        count = len(scan)
        ignored += int(scan.schema.metadata[b"ignored"])
        parts.append(complete(pa.table({
            "key": pc.binary_join_element_wise(pa.scalar(shard.key), scan["member"], "/"),
            "object": pa.repeat(shard.key, count), "offset": scan["offset"], "size": scan["size"],
            "etag": pa.repeat(shard.etag, count), "label": _named(scan["label"], names, f"{store.uri}/{shard.key}"),
            "split": pa.repeat(split, count), "weight": scan["weight"],
        })))  # fmt: skip
    for split, of_shards in samples.items():
        _check_unique(of_shards, split, store.uri)
    table = pa.concat_tables(parts)
    if not len(table):
        raise DataError(f"the {len(used)} shards hold no image", where=store.uri,
                        hint=f"images end with .{', .'.join(sorted(IMAGE_SUFFIXES))}")  # fmt: skip
    return Listing(store.uri, "tar shards", table, ignored)


def expand(pattern: str) -> list[str]:
    """What a pattern with braces stands for, as shells and WebDataset read it: `a-{08..10}.tar`, `{x,y}.tar`."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if any(n.startswith("0") for n in numbers.groups()) else 0
        step = 1 if last >= first else -1
        choices: Iterable[str] = (f"{number:0{width}d}" for number in range(first, last + step, step))
    else:
        choices = found[1].split(",")
    return [one for choice in choices for one in expand(pattern[: found.start()] + choice + pattern[found.end() :])]


def compressed(where: str, names: Iterable[str]) -> DataError:
    """The error for shards that cannot be read from their middle."""
    return DataError(f"compressed shards cannot be read: {few(names)}", where=where,
                     hint="images are compressed already; repack them as .tar: gunzip *.tar.gz")  # fmt: skip


def _is_there(store: Store, key: str) -> bool:
    try:
        store.read(key, span=(0, 1))
    except FileNotFoundError:
        return False
    return True


# -- one shard


def _listed(store: Store, shard: Entry) -> pa.Table:
    """What `_scan` finds, from the shard's own list if it has one."""
    with suppress(FileNotFoundError):
        found = contents.read(store, shard)
        if found is not None:
            return found
    return _scan(store, shard)


def _scan(store: Store, shard: Entry) -> pa.Table:
    """Columns sample, member, offset, size, label and weight of the images in a shard; `ignored` in the metadata."""
    import pyarrow as pa

    where = f"{store.uri}/{shard.key}"
    images: dict[str, list[tuple[str, int, int]]] = {}
    labels: dict[str, dict[str, str]] = {}
    weights: dict[str, float] = {}
    ignored = 0
    for member, data in _members(Ranged(store, shard), shard, where):
        name = _NAME.fullmatch(member.name.removeprefix("./"))
        kind = suffix(member.name)
        if name and kind in IMAGE_SUFFIXES:
            images.setdefault(name[1], []).append((name[2], member.offset_data, member.size))
        elif name and kind in LABELS:
            label, weight = _label(kind, data, f"{where}/{member.name}")
            if label is not None:
                labels.setdefault(name[1], {})[kind] = label
            if weight is not None:
                weights[name[1]] = weight
        else:
            ignored += 1
    several = [sample for sample, found in images.items() if len(_plain(found)) > 1]
    if several:
        raise DataError(f"{len(several)} samples have more than one image: {few(several)}", where=where,
                        hint="a sample is all files of one name up to the first dot; leave one image")  # fmt: skip
    bare = [sample for sample in images if not labels.get(sample)]
    if bare:
        raise DataError(f"{len(bare)} samples have no label: {few(bare)}", where=where,
                        hint="add a .cls, .txt or .json (with a key label) of the same name to each")  # fmt: skip
    ends, offsets, sizes = zip(*(_plain(found)[0] for found in images.values()), strict=True) if images else ((),) * 3
    chosen = [next(labels[sample][kind] for kind in LABELS if kind in labels[sample]) for sample in images]
    ignored += sum(len(found) - 1 for found in images.values())
    columns = {
        "sample": pa.array(images, pa.string()),
        "member": pa.array((f"{sample}.{end}" for sample, end in zip(images, ends, strict=True)), pa.string()),
        "offset": pa.array(offsets, pa.int64()),
        "size": pa.array(sizes, pa.int64()),
        "label": pa.array(chosen, pa.string()),
        "weight": pa.array(map(weights.get, images), pa.float64()),
    }
    return pa.table(columns).replace_schema_metadata({"ignored": str(ignored)})


def _plain(found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Of a sample's images those that are its image: `a.jpg` before `a.mask.png`."""
    return [image for image in found if "." not in image[0]] or found


def _members(file: Ranged, shard: Entry, where: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files of a tar, label files with their content. `DataError` if it is not whole."""
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # they would hold all headers of the shard
                last = member.name
                if member.offset_data + member.size > shard.size:
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isreg() or member.issparse():
                    continue
                data = b""
                if suffix(member.name) in LABELS and member.size <= MOST_LABEL_BYTES:
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                yield member, data
            # tarfile takes any end for the end, but a whole tar says so with a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"the shard is damaged or cut short ({error})" + (f" after {last}" if last else ""),
                        where=where, hint="write it anew as an uncompressed tar") from error  # fmt: skip
    except FileNotFoundError as error:
        raise DataError("the shard is gone", where=where, hint="restore it") from error


def _label(kind: str, data: bytes, where: str) -> tuple[str | None, float | None]:
    """The label and the weight that a file holds, each None if it holds none."""
    try:
        text = data.decode().strip()
        if kind != "json":
            return text or None, None
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"the label cannot be read: {error}", where=where,
                        hint="write it as UTF-8 text or JSON") from error  # fmt: skip
    found = found if isinstance(found, dict) else {}
    value, weight = next((found[key] for key in LABEL_KEYS if key in found), None), found.get(WEIGHT_KEY)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise DataError(f"the label is no text or whole number: {few([value])}", where=where,
                        hint='write {"label": "name of the class"}')  # fmt: skip
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < math.inf):
        raise DataError(f"the {WEIGHT_KEY} is no positive number: {few([weight])}", where=where,
                        hint="write how often to draw the image, 1 being usual, or leave it out")  # fmt: skip
    return None if value is None else str(value).strip() or None, weight


# -- over all shards


def _class_names(store: Store) -> list[str]:
    """The names of numbered classes, from classes.txt or classes.json; empty if neither is there."""
    where = f"{store.uri}/classes.json"
    with suppress(FileNotFoundError):
        return [line.strip() for line in store.read("classes.txt").decode("utf-8-sig").splitlines() if line.strip()]
    with suppress(FileNotFoundError):
        return names_of(_parsed(store.read("classes.json"), where), where)
    return []


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"it cannot be read: {error}", where=where, hint="write a list of names") from error


def names_of(found: Any, where: str) -> list[str]:
    """Class names by number, from a list, or a dict from numbers to names or from names to numbers."""
    if isinstance(found, dict):
        pairs = {str(key): value for key, value in found.items()}
        if all(key.isdecimal() for key in pairs):
            pairs = {str(name): int(number) for number, name in pairs.items()}
        if sorted(pairs.values(), key=str) == sorted(range(len(pairs)), key=str):
            return sorted(pairs, key=pairs.__getitem__)
    elif isinstance(found, list) and all(isinstance(name, (str, int)) for name in found):
        return [str(name) for name in found]
    raise DataError("it does not name classes by number", where=where, hint="write a list of names")


def _named(labels: pa.ChunkedArray, names: list[str], where: str) -> pa.ChunkedArray:
    """The labels with numbers replaced by the names of the classes, if these are given."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not names:
        return labels
    numbers = {str(number): name for number, name in enumerate(names)} | {name: name for name in names}
    strange = [label for label in labels.unique().to_pylist() if label not in numbers]
    if strange:
        raise DataError(f"the list of classes has {len(names)} names, and not these labels: {few(strange)}",
                        where=where, hint="mend classes.txt, or remove it to use the labels as names")  # fmt: skip
    return pa.array(numbers.values()).take(pc.index_in(labels, value_set=pa.array(numbers)))


def _check_unique(of_shards: list[tuple[str, pa.ChunkedArray]], split: str, where: str) -> None:
    """Raises `DataError` for samples of one split that have the same name."""
    import pyarrow as pa

    every = pa.chunked_array([chunk for _, samples in of_shards for chunk in samples.chunks], pa.string())
    if len(every.unique()) == len(every):
        return
    shards: dict[str, list[str]] = {}
    for shard, samples in of_shards:
        for sample in samples.to_pylist():
            shards.setdefault(sample, []).append(shard)
    twice = [f"{sample} ({' and '.join(found[:2])})" for sample, found in shards.items() if len(found) > 1]
    raise DataError(f"{len(twice)} samples{f' of {split}' if split else ''} have the name of another: {few(twice)}",
                    where=where, hint="give each sample a name of its own, or remove the copies")  # fmt: skip
