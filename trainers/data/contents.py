"""The list of contents at the end of each shard of a pack: with it a shard is listed by one read, or two, of its end.

It is a file of the tar itself, so it is there wherever the shard goes; WebDataset's readers pass over its name. What it
says is what looking at every header would find.
"""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

from launcher.storage import Entry, Store

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "__contents__"
TAIL = 64 * 1024
"""Bytes of the end that are read first."""
COLUMNS = {"sample": "string", "member": "string", "offset": "int64", "size": "int64", "label": "string",
           "weight": "float64"}  # fmt: skip
"""Of each image: name of its sample and file, first byte and number of bytes, label, and weight or null."""

_MAGIC = b"raylaunch contents 1"
_DIGITS = 20


def written(rows: list[tuple[Any, ...]]) -> bytes:
    """The file, for images with the values of COLUMNS."""
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(COLUMNS, ())
    data = json.dumps(columns).encode()
    return data + f"{len(data):{_DIGITS}d}".encode() + _MAGIC


def read(store: Store, shard: Entry) -> pa.Table | None:
    """A table of COLUMNS, with `ignored` in the metadata; None if the shard has no such file.

    Raises what `Store.read` raises.
    """
    import pyarrow as pa

    first = max(shard.size - TAIL, 0)
    end = store.read(shard.key, shard.etag, (first, shard.size))
    body = end.rstrip(b"\0")
    # What a tar ends with follows: the rest of a block, and two that are empty.
    if not body.endswith(_MAGIC) or len(end) - len(body) < 2 * tarfile.BLOCKSIZE:
        return None
    try:
        stop = len(body) - len(_MAGIC) - _DIGITS
        start = stop - int(body[stop : stop + _DIGITS])
        data = body[start:stop] if start >= 0 else store.read(shard.key, shard.etag, (first + start, first + stop))
        columns = json.loads(data)
        table = pa.table({name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()})
    except (ValueError, KeyError, TypeError):
        return None
    return table.replace_schema_metadata({"ignored": "0"})
