"""What a look into an object found, kept in the user's cache by address and ETag: each object is looked into once.

It knows nothing of what is looked for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.errors import LaunchError
from launcher.storage import Entry, LocalStore, Store, cache_folder

if TYPE_CHECKING:
    import pyarrow as pa


def once(kind: str, version: int, store: Store, entry: Entry, look: Callable[[Store, Entry], pa.Table]) -> pa.Table:
    """What `look` finds in an object, or found there before.

    Args:
        kind: name of the folder that it is kept in.
        version: to be raised when `look` finds something else than it did.
        store: where the object is.
        entry: the object.
        look: what to call; its errors are the caller's.
    """
    import pyarrow.parquet as pq

    cache = LocalStore(cache_folder() / kind)
    address = f"{version}\0{store.uri}/{entry.key}\0{entry.etag}\0{entry.size}"
    name = f"{hashlib.blake2b(address.encode(), digest_size=16).hexdigest()}.parquet"
    with suppress(OSError, ValueError, LaunchError):  # a cache that cannot be read is no cache
        return pq.read_table(io.BytesIO(cache.read(name)))
    table = look(store, entry)
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    with suppress(OSError, LaunchError):
        cache.write(name, out.getvalue())
    return table
