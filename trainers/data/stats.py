"""What a data set is: counts and sizes from its index, and from a look into some of its images or all what they are.

It changes and keeps nothing. What packing would bring is judged by sizes and places alone, not measured.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from trainers.data.index import SPLITS, Index
from trainers.data.order import permutation

SMALL = 256_000
"""Bytes of an object below which asking for it takes longer than sending it."""
MANY = 10_000
"""Objects below which fetching each of them once is over soon."""
IMBALANCE = 10
"""From so many times the images of the smallest class on, the largest one is worth a word of advice."""
CHANNELS = 3


def summary(index: Index) -> dict[str, Any]:
    """What the index alone tells, as JSON-able values."""
    facts = index.facts()
    counts = index.counts()
    sizes = index.table["size"].to_numpy()
    train = {label: split["train"] for label, split in counts.items()}
    few, most = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
    ratio = round(train[most] / train[few], 2)
    advice = "--set data.sampling=balanced draws all classes equally often" if ratio >= IMBALANCE else ""
    return {
        "uri": index.uri, "images": facts["images"], "bytes": facts["bytes"], "ignored": facts["ignored"],
        "splits": {split: facts[split] for split in SPLITS}, "classes": counts,
        "imbalance": {"smallest": few, "largest": most, "ratio": ratio, "advice": advice},
        "file_bytes": spread(sizes), "packing": packing(index),
    }  # fmt: skip


def spread(values: npt.NDArray[Any]) -> dict[str, float]:
    """Least, median, 95th percentile and most of some values."""
    return {
        "min": int(values.min()), "median": round(float(np.median(values)), 1),
        "p95": round(float(np.percentile(values, 95)), 1), "max": int(values.max()),
    }  # fmt: skip


def packing(index: Index) -> dict[str, Any]:
    """Whether `launch data pack` is likely to help, and why, in one sentence."""
    import pyarrow.compute as pc

    alone = pc.is_null(index.table["object"]).to_numpy()
    sizes = index.table["size"].to_numpy()[alone & index.remote]
    count = len(sizes)
    if not alone.any():
        return {"pays": False, "why": "many images lie in one object already"}
    if not count:
        return {
            "pays": False,
            "why": "the images are files, not objects of S3; on a slow network disk it may all the same",
        }
    median = float(np.median(sizes))
    if median >= SMALL:
        return {"pays": False, "why": f"an object has {median / 1000:,.0f} kB (median), enough to be fetched by itself"}
    if count < MANY:
        return {"pays": False, "why": f"{count:,} objects are few: each node fetches them once"}
    return {"pays": True, "why": f"each node asks S3 for {count:,} objects of {median / 1000:,.0f} kB (median), "
                                 "and waits for answers more than for bytes"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look into an image found; of one that cannot be read only `why` and the digest of its content."""

    digest: bytes
    why: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    rotated: bool = False


def look(data: bytes | memoryview) -> Seen:
    """Decodes an image, as training does. Width and height are as it is seen, upright."""
    from trainers.data.bulk import DECODERS
    from trainers.data.images import BadImage, pixels

    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with DECODERS:
            height, width, _ = pixels(data).shape
    except BadImage as error:
        return Seen(digest, str(error))
    image = Image.open(io.BytesIO(data))
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # EXIF that cannot be read counts as none
        rotated = False
    return Seen(digest, "", image.format or "", image.mode, width, height, rotated)


def contents(index: Index, sample: int | None, seed: int = 0) -> dict[str, Any]:
    """What is in a random sample of the images, or in all (None), as JSON-able values.

    Raises what `Source.read` raises.
    """
    from trainers.data.bulk import read_each
    from trainers.data.source import Source

    every = len(index.table)
    rows = permutation(seed, 0, every)[: every if sample is None else sample]
    rows.sort()
    source = Source(index)
    try:
        with closing(read_each(source, rows.tolist(), look)) as seen:
            found = dict(seen)
    finally:
        source.close()
    good = {row: one for row, one in found.items() if not one.why}
    widths = np.array([one.width for one in good.values()], np.int64)
    heights = np.array([one.height for one in good.values()], np.int64)
    document: dict[str, Any] = {
        "looked_at": len(found), "all": len(found) == every,
        "unreadable": [{"key": index.key(row), "why": one.why} for row, one in found.items() if one.why],
    }  # fmt: skip
    if good:
        document |= {
            "formats": _counted(one.format for one in good.values()),
            "modes": _counted(one.mode for one in good.values()),
            "width": spread(widths), "height": spread(heights),
            "sizes": _counted(f"{one.width}x{one.height}" for one in good.values()),
            "rotated": sum(one.rotated for one in good.values()) / len(good),
            # An estimate, unless all were looked at.
            "decoded_bytes": round(float((widths * heights).sum()) * CHANNELS / len(found) * every),
        }  # fmt: skip
    if document["all"]:
        document["duplicates"] = _duplicates(index, found)
    return document


def _counted(values: Any, most: int = 10) -> dict[str, int]:
    """The most frequent values with their number."""
    return dict(Counter(values).most_common(most))


def _duplicates(index: Index, found: dict[int, Seen]) -> dict[str, Any]:
    """Images of the same content: how many beside the first of each, and those that mislead."""
    groups: dict[bytes, list[int]] = {}
    for row, one in found.items():
        groups.setdefault(one.digest, []).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    labels, splits = index.table["label"], index.table["split"]

    def differing(column: Any) -> list[list[str]]:
        return [[index.key(row) for row in rows] for rows in several if len({column[row].as_py() for row in rows}) > 1]

    return {
        "images": sum(len(rows) - 1 for rows in several),
        "of_several_classes": differing(labels), "in_several_splits": differing(splits),
    }  # fmt: skip
